"""Winsor-CAM: Grad-CAM maps of every convolution, weighed by winsorized layer importance. arXiv 2507.10846."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from ...kernels import AGGREGATIONS, fuse_layers, layer_importance, normalize_layers, winsorize
from ..errors import InputError
from .data import LayerMaps
from .registry import Result, cam, chosen


@cam("winsor_cam", needs=LayerMaps, layers="conv", source="Winsor-CAM, arXiv 2507.10846", on_gpu=True)
def winsor_cam(
    layers: LayerMaps,
    percentile: float = 90,
    gradient_aggregation: str = "mean",
    layer_aggregation: str = "mean",
    interpolation: str = "bilinear",
    low: float = 0.1,
    high: float = 1.0,
) -> Result:
    """sum_l w_l up(minmax(ReLU(sum_k alpha_lk A_lk))), not normalised.

    w = winsorize(ReLU(aggregate_k alpha_lk), percentile), rescaled to [low, high]. Maps are resized to the largest
    grid of all taps, then to the input, by interpolation: bilinear or nearest. layer_aggregation: mean, max, min,
    absmean, absmax or l2. gradient_aggregation: how alpha is pooled from the gradient, one of the same or sum.
    InputError or UnknownMethod for an option that does not fit. Warns if no layer has a positive importance: the map is
    then zero.
    """
    del gradient_aggregation  # LayerMaps.read used it already
    stream, on_gpu = layers.memory.stream, layers.memory.stream is not None
    normalized = layers.maps if on_gpu else normalize_layers(layers.maps, layers.grids)  # once for all retunings
    channels = [t.channels for t in layers.taps]
    importances: dict[str, Any] = {}

    def fuse(**options: Any) -> Result:
        check_options(**options)
        aggregation = options["layer_aggregation"]
        if aggregation not in importances:
            importances[aggregation] = layer_importance(layers.alphas, channels, aggregation, stream=stream)
        bounds = options["percentile"], options["low"], options["high"]
        weights = winsorize(importances[aggregation], *bounds, stream=stream)
        sizes = layers.size, options["interpolation"]
        maps = fuse_layers(normalized, layers.grids, weights, *sizes, normalize=on_gpu, stream=stream)

        def check(result: Result) -> None:
            if not result.layer_weights.any(axis=1).all():
                warnings.warn(
                    f"winsor_cam: no layer has positive {aggregation} importance for some image, so its map is zero: "
                    "try layer_aggregation='max'",
                    stacklevel=4,
                )

        def retune(**changes: Any) -> Result:
            unknown = [o for o in changes if o not in options]
            if unknown:
                raise InputError(
                    f"winsor_cam cannot retune {unknown[0]!r}, only {', '.join(options)}: call explain again"
                )
            return fuse(**options | changes)

        return Result(maps, weights, retune=retune, check=check)

    return fuse(
        percentile=percentile, layer_aggregation=layer_aggregation, interpolation=interpolation, low=low, high=high
    )


def check_options(percentile: float, layer_aggregation: str, interpolation: str, low: float, high: float) -> None:
    """InputError or UnknownMethod names the option that does not fit."""
    if not isinstance(percentile, int | float | np.number) or not 0 <= percentile <= 100:
        raise InputError(f"percentile {percentile!r} is outside 0..100")
    chosen(layer_aggregation, AGGREGATIONS, "layer_aggregation")
    chosen(interpolation, ("bilinear", "nearest"), "interpolation")
    if not all(isinstance(bound, int | float | np.number) for bound in (low, high)) or not 0 < low <= high:
        raise InputError(f"rescale bounds low={low!r}, high={high!r}: they need 0 < low <= high")
