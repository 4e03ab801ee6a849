"""Makes a network's input of a picture, resized exactly as by Pillow: cuda/resize_picture.cu."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..call import Stream, prepared
from ..checks import expect, expect_choice, expect_sides
from ..gpu.queue import THREADS, Launch, blocks, int32s

FRACTION_BITS = 22  # of Pillow's weights
FILTERS = {"bilinear": 1, "bicubic": 2, "lanczos": 3}  # filter -> its radius, in source pixels before stretching
SPAN = np.dtype([("first", np.int32), ("count", np.int32), ("weights", np.int32)])


def resize_picture(
    picture: Any,
    size: Sequence[int],
    crop: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    filter: str = "bilinear",
    rows_first: bool = False,
    out: Any = None,
    *,
    stream: Stream = None,
) -> Any:
    """Resizes a picture to size, with the same bits as Pillow, crops it, and returns (pixel / 255 - mean) / std.

    picture (H, W, C) uint8; size: (height, width); crop: (top, left, height, width), inside size; mean, std: C numbers
    -> (C, height, width) float32, in `out` if it is given. One axis is resized after the other, each result rounded to
    8 bits. filter: bilinear, bicubic, lanczos; rows_first: the height is resized first. ValueError for what does not
    fit; DeviceError.
    """
    with prepared("resize_picture", stream, "out", picture=picture, out=out) as (queue, (picture, out)):
        expect_choice("resize_picture", "filter", filter, list(FILTERS))
        expect("resize_picture", "picture", picture, ("H", "W", len(mean)), ("uint8",))
        expect_sides("resize_picture", picture=picture.shape[:2], size=size, crop=crop[2:])
        top, left, height, width = crop
        if min(top, left) < 0 or top + height > size[0] or left + width > size[1]:
            raise ValueError(f"resize_picture: crop {tuple(crop)} lies outside {tuple(size)}")
        if len(std) != len(mean):
            raise ValueError(f"resize_picture: {len(mean)} means and {len(std)} deviations")
        if out is not None:
            expect("resize_picture", "out", out, (len(mean), height, width))
        if queue is None:
            image = _by_numpy(picture, size, crop, mean, std, filter, rows_first)
            if out is None:
                return image
            out[:] = image
            return out
        top, left, height, width = crop
        channels = picture.shape[2]
        pixels = picture
        for axis in (0, 1) if rows_first else (1, 0):
            start, length = ((top, height), (left, width))[axis]
            spans, weights = _span_tables(picture.shape[axis], size[axis], filter, start, length)
            shape = list(pixels.shape)
            inner, before = math.prod(shape[axis + 1 :]), shape[axis]
            shape[axis] = length
            resized = queue.empty(shape, np.uint8)
            entries = math.prod(shape)
            sides = int32s("resize_picture", size=before, target=length, inner=inner)
            arguments = (pixels, queue.upload(spans), queue.upload(weights), resized, np.int64(entries), *sides)
            queue.launch(Launch("resize_picture", "resize_axis", (blocks(entries, THREADS), 1), THREADS, 0, arguments))
            pixels = resized
        image = queue.empty((channels, height, width)) if out is None else out
        shades = queue.constant(np.array(mean, np.float32)), queue.constant(np.array(std, np.float32))
        arguments = (pixels, *shades, image, np.int64(height * width), *int32s("resize_picture", channels=channels))
        grid = blocks(height * width * channels, THREADS), 1
        queue.launch(Launch("resize_picture", "normalize_picture", grid, THREADS, 0, arguments))
        return image


def _by_numpy(
    picture: np.ndarray,
    size: Sequence[int],
    crop: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    filter: str,
    rows_first: bool,
) -> np.ndarray:
    top, left, height, width = crop
    pixels = picture
    axes = ((1, (left, width)), (0, (top, height)))
    for axis, (start, length) in axes[::-1] if rows_first else axes:
        first, count, weights = (
            table[start : start + length] for table in resize_spans(picture.shape[axis], size[axis], filter)
        )
        moved = np.moveaxis(pixels, axis, 0).astype(np.int64)
        rows = [
            np.tensordot(w[:n].astype(np.int64), moved[f : f + n], 1)
            for f, n, w in zip(first, count, weights, strict=True)
        ]
        summed = np.stack(rows) + (1 << (FRACTION_BITS - 1)) >> FRACTION_BITS
        pixels = np.moveaxis(np.clip(summed, 0, 255).astype(np.uint8), 0, axis)
    scaled = (pixels.astype(np.float32) / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), np.float32)


@functools.lru_cache(maxsize=64)
def resize_spans(size: int, target: int, filter: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `target` positions: its first source position, the number of source positions, and their weights in
    fixed point.

    (target,) int32, (target,) int32, (target, most) int32. As in Pillow's antialiasing, the filter is stretched by
    size / target if that is above 1. If the sizes are equal, every weight is 1.
    """
    if size == target:
        ones = np.ones(target, np.int32)
        return np.arange(target, dtype=np.int32), ones, ones[:, None] << FRACTION_BITS
    scale = size / target
    stretch = max(scale, 1.0)
    reach = FILTERS[filter] * stretch
    centres = (np.arange(target) + 0.5) * scale
    first = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    count = np.minimum((centres + reach + 0.5).astype(np.int64), size) - first
    steps = np.arange(count.max())
    distance = (steps + first[:, None] - centres[:, None] + 0.5) * (1 / stretch)
    weights = np.where(steps < count[:, None], _filter(distance, filter), 0)
    weights *= 1 / weights.sum(axis=1, keepdims=True)
    fixed = np.trunc(weights * (1 << FRACTION_BITS) + np.where(weights < 0, -0.5, 0.5))
    return first.astype(np.int32), count.astype(np.int32), fixed.astype(np.int32)


def _filter(x: np.ndarray, name: str) -> np.ndarray:
    """Filter weight at distance x: triangle (bilinear), Keys' cubic with a = -1/2, or sinc(x) sinc(x / 3) (Lanczos)."""
    x = np.abs(x)
    if name == "bilinear":
        return np.maximum(1 - x, 0)
    if name == "bicubic":
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0))
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)


def _span_tables(size: int, target: int, filter: str, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The spans (SPAN) of `length` positions from `start` on, and their concatenated weights."""
    first, count, weights = (table[start : start + length] for table in resize_spans(size, target, filter))
    spans = np.empty(length, SPAN)
    spans["first"], spans["count"], spans["weights"] = first, count, np.arange(length) * weights.shape[1]
    return spans, weights.ravel()
