'''CAM methods of your own.

A method is a function that is registered with the class of data that it reads:

    import numpy as np
    from camrt.kernels import upsample
    from camrt.methods import Gradients, Result, cam

    @cam("my_cam", needs=Gradients, layers="last", source="My paper, 2026")
    def my_cam(data: Gradients, power: float = 1.0) -> Result:
        """sum_k |g_k A_k|^power. power: of each term."""
        activation, gradient = next(data.pairs())  # (S, K, h, w) each: S explanations that run together
        maps = (np.abs(gradient * activation) ** power).sum(axis=1)
        return Result(upsample(maps, data.size), np.ones((len(maps), 1), np.float32))

The result holds maps (S, H, W) of the network's size, `data.size`, and layer_weights (S, L), both float32.

Once its module is imported, `Explainer.explain(images, "my_cam", power=2.0)` knows it. A package that names the module
in the entry point group `camrt.methods` is imported by camrt itself, the command line included:

    [project.entry-points."camrt.methods"]
    my_cam = "my_package.my_cam"
'''

from .runtime.cams import (
    Activations,
    Gradients,
    GridMaps,
    Heads,
    Lane,
    LayerMaps,
    MaskedRuns,
    Result,
    SignedMaps,
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
    "SignedMaps",
    "all_methods",
    "cam",
]
