"""Winsor-CAM: Grad-CAM maps of every convolution, weighed by winsorized layer importance. arXiv 2507.10846."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from ...kernels import fuse_layers, normalize_layers, winsorize
from ..errors import InputError
from .data import LayerMaps
from .registry import Result, cam, chosen

CANCELLED = 1e-6  # a mean below this part of the mean magnitude is rounding noise: float32 leaves about 1e-8


def mean_of_alphas(alphas: np.ndarray) -> np.ndarray:
    """The mean over channels, and exactly 0 where the channels cancel.

    They do behind a layer norm (ConvNeXt): it makes gradients sum to zero over channels, so that the mean's sign, and with
    it the layers that Winsor-CAM keeps, would be decided by rounding.
    """
    mean = alphas.mean(axis=-1)
    return np.where(np.abs(mean) > CANCELLED * np.abs(alphas).mean(axis=-1), mean, 0)


LAYER_AGGREGATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": mean_of_alphas,
    "max": lambda a: a.max(axis=-1),
    "min": lambda a: a.min(axis=-1),
    "absmean": lambda a: np.abs(a).mean(axis=-1),
    "absmax": lambda a: np.abs(a).max(axis=-1),
    "l2": lambda a: np.sqrt((a * a).sum(axis=-1)),
}


@cam("winsor_cam", needs="layer_maps", layers="conv", source="Winsor-CAM, arXiv 2507.10846")
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

    w = winsorize(ReLU(aggregate_k alpha_lk), percentile) rescaled to [low, high]; maps are resized to the largest tap's
    grid, then to the input, by interpolation: bilinear or nearest. layer_aggregation: mean, max, min, absmean, absmax, l2; gradient_aggregation, how the alphas
    were pooled: the same and sum. InputError for a value out of range. Warns where no layer is important: that map is zero.
    """
    del gradient_aggregation  # the layers come pooled by it
    normalized = normalize_layers(layers.maps, layers.grids)
    importances: dict[str, np.ndarray] = {}

    def fuse(**options: Any) -> Result:
        check_options(**options)
        aggregation = options["layer_aggregation"]
        if aggregation not in importances:
            importances[aggregation] = importance(layers, aggregation)
            if not importances[aggregation].any(axis=1).all():
                warnings.warn(
                    f"winsor_cam: no layer has positive {aggregation} importance for some image, so its map is zero: "
                    "try layer_aggregation='max'",
                    stacklevel=3,
                )
        weights = winsorize(importances[aggregation], options["percentile"], options["low"], options["high"])
        maps = fuse_layers(normalized, layers.grids, weights, layers.size, options["interpolation"])

        def retune(**changes: Any) -> Result:
            unknown = [o for o in changes if o not in options]
            if unknown:
                raise InputError(
                    f"winsor_cam cannot retune {unknown[0]!r}, only {', '.join(options)}: call explain again"
                )
            return fuse(**options | changes)

        return Result(maps, weights, retune=retune)

    return fuse(
        percentile=percentile, layer_aggregation=layer_aggregation, interpolation=interpolation, low=low, high=high
    )


def importance(layers: LayerMaps, layer_aggregation: str = "mean") -> np.ndarray:
    """ReLU of the aggregated alphas, (S, L) float32."""
    aggregate = LAYER_AGGREGATIONS[layer_aggregation]
    return np.maximum(np.stack([aggregate(a) for a in layers.alpha_of_layers()], axis=1), 0)


def check_options(percentile: float, layer_aggregation: str, interpolation: str, low: float, high: float) -> None:
    """InputError or UnknownMethod names the option that does not fit."""
    if not isinstance(percentile, int | float | np.number) or not 0 <= percentile <= 100:
        raise InputError(f"percentile {percentile!r} is outside 0..100")
    chosen(layer_aggregation, list(LAYER_AGGREGATIONS), "layer_aggregation")
    chosen(interpolation, ("bilinear", "nearest"), "interpolation")
    if not all(isinstance(bound, int | float | np.number) for bound in (low, high)) or not 0 < low <= high:
        raise InputError(f"rescale bounds low={low!r}, high={high!r}: they need 0 < low <= high")
