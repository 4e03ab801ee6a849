"""CAM methods of your own.

A method is a function that is registered with the class of data that it reads:

    from camrt.methods import Gradients, Result, cam

    @cam("my_cam", needs=Gradients, layers="last", source="My paper, 2026")
    def my_cam(data: Gradients, power: float = 1.0) -> Result:
        ...

Once its module is imported, `Explainer.explain(images, "my_cam", power=2.0)` knows it. A package that names the module
in the entry point group `camrt.methods` is imported by camrt itself, the command line included:

    [project.entry-points."camrt.methods"]
    my_cam = "my_package.my_cam"
"""

from .runtime.cams import (
    Activations,
    Gradients,
    GridMaps,
    Heads,
    Lane,
    LayerMaps,
    MaskedRuns,
    Result,
    all_methods,
    cam,
)

__all__ = [
    "Activations",
    "Gradients",
    "GridMaps",
    "Heads",
    "Lane",
    "LayerMaps",
    "MaskedRuns",
    "Result",
    "all_methods",
    "cam",
]
