"""What the kernels take: the same checks for NumPy's arrays and for a GPU's. ValueError, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .reference import AGGREGATIONS, FILTERS, GATES, INTERPOLATIONS, PROBABILITIES


def _expect(
    kernel: str, name: str, array: Any, shape: Sequence[int | str], dtypes: Sequence[str] = ("float32",)
) -> None:
    """shape: a number where the length is known, a letter where it is not."""
    if not hasattr(array, "shape") or not isinstance(array.dtype, np.dtype):
        raise ValueError(f"{kernel}: {name} is a {type(array).__name__}, needed an array of NumPy's or of a GPU's")
    known = all(isinstance(want, str) or want == got for want, got in zip(shape, array.shape, strict=False))
    if len(array.shape) != len(shape) or not known:
        raise ValueError(f"{kernel}: {name} is {tuple(array.shape)}, needed ({', '.join(map(str, shape))})")
    if np.dtype(array.dtype).name not in dtypes:
        raise ValueError(f"{kernel}: {name} {tuple(array.shape)} is {array.dtype}, needed {' or '.join(dtypes)}")


def _expect_choice(kernel: str, what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{kernel}: {what} {value!r}: use {', '.join(choices)}")


def _expect_sides(kernel: str, **sides: Sequence[int]) -> None:
    for name, (height, width) in sides.items():
        if height < 1 or width < 1:
            raise ValueError(f"{kernel}: {name} is {height} x {width}, needed at least 1 x 1")


def check_mask_batch(image: Any, activations: Any, kind: str, interpolation: str, out: Any, gates: Any) -> None:
    kernel = "mask_batch"
    _expect_choice(kernel, "gate", kind, GATES)
    _expect_choice(kernel, "interpolation", interpolation, INTERPOLATIONS)
    _expect(kernel, "image", image, ("C", "H", "W"))
    _expect(kernel, "activations", activations, ("K", "h", "w"))
    _expect_sides(kernel, image=image.shape[1:], activations=activations.shape[1:])
    if out is not None:
        _expect(kernel, "out", out, (activations.shape[0], *image.shape), ("float32", "float16"))
    if gates is not None:
        _expect(kernel, "gates", gates, (activations.shape[0], *image.shape[1:]))


def check_accumulate_maps(total: Any, scores: Any, activations: Any, kind: str, interpolation: str, gates: Any) -> None:
    kernel = "accumulate_maps"
    _expect_choice(kernel, "gate", kind, GATES)
    _expect_choice(kernel, "interpolation", interpolation, INTERPOLATIONS)
    _expect(kernel, "total", total, ("S", "H", "W"))
    _expect(kernel, "activations", activations, ("K", "h", "w"))
    _expect(kernel, "scores", scores, (total.shape[0], activations.shape[0]))
    _expect_sides(kernel, total=total.shape[1:], activations=activations.shape[1:])
    if gates is not None:
        _expect(kernel, "gates", gates, (activations.shape[0], *total.shape[1:]))


def check_winsorize(rows: Any, percentile: float, low: float, high: float, on_gpu: bool = False) -> None:
    kernel = "winsorize"
    if not 0 <= percentile <= 100:
        raise ValueError(f"{kernel}: percentile {percentile} is outside 0..100")
    if not low <= high:
        raise ValueError(f"{kernel}: low {low} is above high {high}")
    if not rows.shape:
        raise ValueError(f"{kernel}: rows is a single number, needed (..., L)")
    if on_gpu:
        _expect(kernel, "rows", rows, ["..."] * (len(rows.shape) - 1) + ["L"])


def check_fuse_layers(
    maps: Any,
    grids: Sequence[tuple[int, int]],
    weights: Any,
    size: Sequence[int],
    interpolation: str,
    on_gpu: bool = False,
) -> None:
    kernel = "fuse_layers"
    _expect_choice(kernel, "interpolation", interpolation, INTERPOLATIONS)
    if len(grids) == 0:
        raise ValueError(f"{kernel}: no layers")
    for grid in grids:
        _expect_sides(kernel, grid=grid)
    _expect_sides(kernel, size=size)
    _expect(kernel, "maps", maps, ("B", sum(h * w for h, w in grids)))
    _expect(kernel, "weights", weights, (maps.shape[0], len(grids)), ("float32",) if on_gpu else ("float32", "float64"))


def check_layer_importance(alphas: Any, channels: Sequence[int], kind: str) -> None:
    kernel = "layer_importance"
    _expect_choice(kernel, "aggregation", kind, AGGREGATIONS)
    if len(channels) == 0 or min(channels) < 1:
        raise ValueError(f"{kernel}: layers of {list(channels)} channels, needed one or more of at least one")
    _expect(kernel, "alphas", alphas, ("B", sum(channels)))


def check_class_scores(logits: Any, seeds: Any, kind: str, offset: Any, weights: Any) -> None:
    kernel = "class_scores"
    _expect_choice(kernel, "probability", kind, PROBABILITIES)
    _expect(kernel, "logits", logits, ("N", "C"))
    _expect(kernel, "seeds", seeds, ("S", logits.shape[1]))
    if logits.shape[1] < 1:
        raise ValueError(f"{kernel}: logits of no classes")
    if offset is not None:
        _expect(kernel, "offset", offset, (seeds.shape[0],))
    if weights is not None:
        _expect(kernel, "weights", weights, (logits.shape[0],))


def check_activations(kernel: str, activations: Any, index: Any = None) -> None:
    _expect(kernel, "activations", activations, ("K", "h", "w"))
    _expect_sides(kernel, activations=activations.shape[1:])
    if index is not None:
        _expect(kernel, "index", index, ("n",), ("int32",))


def check_resize_picture(
    picture: Any,
    size: Sequence[int],
    crop: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    filter: str,
    out: Any,
) -> None:
    kernel = "resize_picture"
    _expect_choice(kernel, "filter", filter, list(FILTERS))
    _expect(kernel, "picture", picture, ("H", "W", len(mean)), ("uint8",))
    _expect_sides(kernel, picture=picture.shape[:2], size=size, crop=crop[2:])
    top, left, height, width = crop
    if min(top, left) < 0 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"{kernel}: crop {tuple(crop)} lies outside {tuple(size)}")
    if len(std) != len(mean):
        raise ValueError(f"{kernel}: {len(mean)} means and {len(std)} deviations")
    if out is not None:
        _expect(kernel, "out", out, (len(mean), height, width))
