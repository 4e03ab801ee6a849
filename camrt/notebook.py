"""Widgets for notebooks. Needs the extra `notebook`."""

from __future__ import annotations

import warnings
from typing import Any

from . import install
from .runtime.errors import CamrtError, InputError
from .runtime.explanation import Explanation, Index


def percentile_slider(result: Explanation, index: Index = 0, **options: Any) -> Any:
    """A slider for Winsor-CAM's percentile over the overlay of image `index`; the network does not run again.

    options: of `Explanation.overlay`. InputError if the explanation has no percentile; CamrtError without ipywidgets.
    """
    try:
        import ipywidgets as widgets
    except ImportError as error:
        raise CamrtError(install.repair("a slider", "ipywidgets", "notebook", error)) from None
    if "percentile" not in result.options:
        raise InputError(f"{result.method} has no percentile: explain with winsor_cam")
    picture = widgets.Image(value=result.png(index, **options), format="png")
    slider = widgets.FloatSlider(float(result.options["percentile"]), min=0, max=100, step=1, readout_format=".0f")
    slider.description = "percentile"

    def draw(change: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values on the way to the one that is wanted
            picture.value = result.retune(percentile=change["new"]).png(index, **options)

    slider.observe(draw, names="value")
    return widgets.VBox([slider, picture])
