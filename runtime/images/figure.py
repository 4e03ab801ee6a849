"""An explanation as a matplotlib figure."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import install
from ..errors import CamrtError
from .colormaps import colorize

if TYPE_CHECKING:
    from ..explanation import Explanation, Index

MOST_LAYERS = 60  # whose names are written


def explanation_figure(result: Explanation, index: Index, options: Mapping[str, Any]) -> Any:
    """The photo, its overlay with a colour bar, and the layers' weights. options: of `overlay`. CamrtError without
    matplotlib.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CamrtError(install.repair("plot", "matplotlib", "bench", error)) from None

    class ShownFigure(Figure):
        """A figure that notebooks show by themselves, whatever matplotlib's backend."""

        def _repr_png_(self) -> bytes:
            out = io.BytesIO()
            self.savefig(out, format="png", dpi=100)
            return out.getvalue()

    image = index[0] if isinstance(index, tuple) else index
    overlay = result.overlay(index, **options)
    photo = result.images.picture(image) if options.get("size") == "input" else result.images.photo(image)
    weights = result.layer_weights[index]
    figure = ShownFigure(figsize=(13 if len(weights) > 1 else 9, 4), layout="constrained")
    axes = figure.subplots(1, 3 if len(weights) > 1 else 2)
    for place, picture in zip(axes, (photo, overlay), strict=False):
        place.imshow(picture)
        place.set_axis_off()
    axes[0].set_title("photo")
    axes[1].set_title("\n".join(result.caption(index)), fontsize=10)
    colours = ListedColormap(colorize(np.linspace(0, 1, 256)[None], options.get("colormap", "turbo"))[0] / 255)
    figure.colorbar(ScalarMappable(cmap=colours), ax=axes[1], shrink=0.8)
    if len(weights) > 1:
        places = np.arange(len(weights))
        axes[2].barh(places, weights, color="tab:blue")
        if len(weights) <= MOST_LAYERS:
            axes[2].set_yticks(places, result.layers, fontsize=7)
        axes[2].invert_yaxis()
        axes[2].set_xlabel("weight of the layer")
    return figure
