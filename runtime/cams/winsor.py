"""Winsor-CAM: Grad-CAM maps of every convolution, weighed by winsorized layer importance. arXiv 2507.10846."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

from ...kernels import AGGREGATIONS, fuse_layers, layer_importance, normalize_layers, winsorize
from ..errors import InputError
from .data import LayerMaps
from .registry import Result, cam, chosen, is_number


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
    on_gpu = layers.memory.stream is not None
    normalized = layers.maps if on_gpu else normalize_layers(layers.maps, layers.grids)  # once for all retunings
    return _Fusion(layers, normalized, {})(
        percentile=percentile, layer_aggregation=layer_aggregation, interpolation=interpolation, low=low, high=high
    )


@dataclass(frozen=True)
class _Fusion:
    """Weighs and fuses the maps of layers, again for every retuning. normalized: the layers' maps, scaled on the host;
    importances: those that were computed, by aggregation; options: of the last call, which a retuning changes.
    """

    layers: LayerMaps
    normalized: Any
    importances: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **changes: Any) -> Result:
        options = self.options | changes
        unknown = [o for o in changes if self.options and o not in self.options]
        if unknown:
            raise InputError(
                f"winsor_cam cannot retune {unknown[0]!r}, only {', '.join(self.options)}: call explain again"
            )
        check_options(**options)
        layers, stream, aggregation = self.layers, self.layers.memory.stream, options["layer_aggregation"]
        if aggregation not in self.importances:
            channels = [t.channels for t in layers.taps]
            self.importances[aggregation] = layer_importance(layers.alphas, channels, aggregation, stream=stream)
        bounds = options["percentile"], options["low"], options["high"]
        weights = winsorize(self.importances[aggregation], *bounds, stream=stream)
        sizes, on_gpu = (layers.size, options["interpolation"]), stream is not None
        maps = fuse_layers(self.normalized, layers.grids, weights, *sizes, normalize=on_gpu, stream=stream)
        check = functools.partial(_warn_of_no_layer, aggregation)
        return Result(maps, weights, retune=replace(self, options=options), check=check)


def _warn_of_no_layer(aggregation: str, result: Result) -> None:
    if not result.layer_weights.any(axis=1).all():
        warnings.warn(
            f"winsor_cam: no layer has positive {aggregation} importance for some image, so its map is zero: "
            "try layer_aggregation='max'",
            stacklevel=4,
        )


def check_options(percentile: float, layer_aggregation: str, interpolation: str, low: float, high: float) -> None:
    """InputError or UnknownMethod names the option that does not fit."""
    if not is_number(percentile) or not 0 <= percentile <= 100:
        raise InputError(f"percentile {percentile!r} is outside 0..100")
    if 0 < percentile < 1:
        warnings.warn(f"percentile {percentile} is of 0..100: did you mean {100 * percentile:g}?", stacklevel=6)
    chosen(layer_aggregation, AGGREGATIONS, "layer_aggregation")
    chosen(interpolation, ("bilinear", "nearest"), "interpolation")
    if not all(is_number(bound) for bound in (low, high)) or not 0 < low <= high:
        raise InputError(f"rescale bounds low={low!r}, high={high!r}: they need 0 < low <= high")
