"""Winsor-CAM: Grad-CAM maps of every convolution, weighed by winsorized layer importance. arXiv 2507.10846."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...kernels import AGGREGATIONS, fuse_layers, layer_importance, normalize_layers, winsorize
from ..errors import InputError, warn
from .data import LayerMaps
from .data.layer_maps import NoiseOfLayers
from .registry import Result, Retune, cam, chosen, is_number


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
class _Fusion(Retune):
    """Weighs and fuses the maps of layers, again for every retuning. normalized: the layers' maps, scaled on the host;
    importances: by aggregation, those that were computed, as layer_importance gives them; options: of the last call,
    which a retuning changes.
    """

    layers: LayerMaps
    normalized: Any
    importances: dict[str, tuple[Any, Any]]
    options: dict[str, Any] = field(default_factory=dict)

    def rows(self, which: slice) -> _Fusion:
        importances = {name: (found[which], relative[which]) for name, (found, relative) in self.importances.items()}
        return replace(self, layers=self.layers.rows(which), normalized=self.normalized[which], importances=importances)

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
            found = layer_importance(layers.alphas, channels, aggregation, layers.noise.zero, stream=stream)
            self.importances[aggregation] = found
        bounds = options["percentile"], options["low"], options["high"]
        importance, relative = self.importances[aggregation]
        weights = winsorize(importance, *bounds, stream=stream)
        sizes, on_gpu = (layers.size, options["interpolation"]), stream is not None
        maps = fuse_layers(self.normalized, layers.grids, weights, *sizes, normalize=on_gpu, stream=stream)
        check = functools.partial(_check, aggregation, tuple(t.name for t in layers.taps), layers.noise)
        return Result(maps, weights, retune=replace(self, options=options), evidence=relative, check=check)


def _check(aggregation: str, layers: Sequence[str], noise: NoiseOfLayers, result: Result) -> dict[str, np.ndarray]:
    """The details: per explanation the layers whose weight rounding decides. Warns of them and of maps without a layer.

    result.evidence: importances relative to the magnitude of their alphas, before those near zero counted as zero.
    """
    within = _undetermined(np.abs(result.evidence), aggregation, noise)
    undetermined = np.empty(len(within), object)
    undetermined[:] = [[layers[int(i)] for i in np.flatnonzero(row)] for row in within]
    if within.any():
        names = [layers[int(i)] for i in np.flatnonzero(within.any(axis=0))]
        warn(
            f"winsor_cam: for some image rounding may decide whether {', '.join(names[:5])}"
            f"{', ...' if len(names) > 5 else ''} counts: the importance there is zero within its noise, so that "
            "another machine may draw another map (details['undetermined'])"
        )
    if not result.layer_weights.any(axis=1).all():
        warn(
            f"winsor_cam: no layer has positive {aggregation} importance for some image, so its map is zero: "
            "try layer_aggregation='max'"
        )
    return {"undetermined": undetermined}


def _undetermined(relative: np.ndarray, aggregation: str, noise: NoiseOfLayers) -> np.ndarray:
    """Whether rounding decides a layer's weight, of relative importances (S, L): they are within the noise of zero."""
    if aggregation not in ("mean", "max", "min"):
        return np.zeros(relative.shape, bool)
    counted = noise.zero < (1 if aggregation == "mean" else 2)
    change = noise.mean if aggregation == "mean" else noise.extreme
    return (relative <= change) & counted & (change > 0)


def check_options(percentile: float, layer_aggregation: str, interpolation: str, low: float, high: float) -> None:
    """InputError or UnknownMethod names the option that does not fit."""
    if not is_number(percentile) or not 0 <= percentile <= 100:
        raise InputError(f"percentile {percentile!r} is outside 0..100")
    if 0 < percentile < 1:
        warn(f"percentile {percentile} is of 0..100: did you mean {100 * percentile:g}?")
    chosen(layer_aggregation, AGGREGATIONS, "layer_aggregation")
    chosen(interpolation, ("bilinear", "nearest"), "interpolation")
    if not all(is_number(bound) for bound in (low, high)) or not 0 < low <= high:
        raise InputError(f"rescale bounds low={low!r}, high={high!r}: they need 0 < low <= high")
