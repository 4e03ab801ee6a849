"""The gates of ScoreCAM++ and Score-CAM, which turn maps into masks; min-max scaling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..gpu.arrays import DeviceArray, is_device_array
from ..gpu.queue import FULL, NOTHING, THREADS, WARP, Argument, Launch, Queue, blocks, int32s

GATES = ("tanh", "sigmoid_relu", "minmax", "identity")


def gate(maps: np.ndarray, kind: str, out: np.ndarray | None = None) -> np.ndarray:
    """Masks of maps: tanh(x), sigmoid(ReLU(x / 2)), min-max over the last two axes, or x itself, as `kind` says.

    maps (K, H, W) -> the same shape; any shape for kinds other than "minmax". kind: a name in GATES. "tanh" and
    "sigmoid_relu" are ScoreCAM++'s (arXiv 2404.19341), "minmax" is Score-CAM's. `out` may be `maps`. ValueError for
    another kind.
    """
    out = np.empty_like(maps) if out is None else out
    if kind == "tanh":
        np.tanh(maps, out=out)
    elif kind == "sigmoid_relu":
        np.exp(np.minimum(maps / -2, 0, out=out), out=out)
        np.reciprocal(np.add(out, 1, out=out), out=out)
    elif kind == "minmax":
        if out.dtype == maps.dtype and out.dtype.kind == "f":
            minmax(maps, out=out)
        else:
            out[:] = minmax(maps)
    elif kind == "identity":
        out[:] = maps
    else:
        raise ValueError(f"gate {kind!r}: use {', '.join(GATES)}")
    return out


def minmax(maps: np.ndarray, axes: tuple[int, ...] = (-2, -1), out: np.ndarray | None = None) -> np.ndarray:
    """(x - min) / (max - min) over `axes`; a constant map becomes zeros. Shape and dtype stay.

    out: of that shape and dtype; it may be `maps`.
    """
    low, high = maps.min(axis=axes, keepdims=True), maps.max(axis=axes, keepdims=True)
    with np.errstate(over="ignore"):
        span = high - low
    if maps.dtype != np.float64 and np.isinf(span).any():  # the difference overflows the dtype
        out = np.empty_like(maps) if out is None else out
        out[:] = minmax(maps.astype(np.float64), axes)
        return out
    shifted = np.subtract(maps, low, out=out)
    return np.divide(shifted, np.where(span > 0, span, 1), out=out)


def within_range(resized: np.ndarray, activations: np.ndarray) -> np.ndarray:
    """Clips resized maps to the range of their activations, in place. Otherwise min-max scaling would turn the rounding
    errors of a constant map into a full-range map.
    """
    low, high = activations.min(axis=(1, 2), keepdims=True), activations.max(axis=(1, 2), keepdims=True)
    return np.clip(resized, low, high, out=resized)


def refuse_gates_on_gpu(kernel: str, gates: Any, *arrays: Any) -> None:
    """ValueError if `gates` is given and an array is on a GPU."""
    if gates is not None and any(map(is_device_array, arrays)):
        raise ValueError(f"{kernel}: gates are not kept on a GPU, computing them again is faster: leave gates out")


def gate_extremes(queue: Queue, kind: str, maps: DeviceArray, tables: Sequence[DeviceArray]) -> Argument:
    """Lowest and highest value of each resized map, (K, 2), for the gate "minmax"; a null pointer for other gates."""
    if kind != "minmax":
        return NOTHING
    count, h, w = maps.shape
    extremes = queue.empty((count, 2))
    height, width = (len(table) for table in tables)
    sides = int32s("mask_batch", maps=count, height=height, width=width, h=h, w=w)
    warps = THREADS // WARP
    parts = min(-(-FULL // count), -(-height // warps), WARP)  # of a map; a warp joins them
    partial = queue.empty((count, parts, 2)) if parts > 1 else extremes
    arguments = (maps, *tables, partial, *sides, np.int32(parts))
    grid = blocks(count, 1), blocks(parts, 1, 1)
    queue.launch(Launch("extremes", "resized_extremes", grid, THREADS, 0, arguments))
    if parts > 1:
        arguments = (partial, extremes, sides[0], np.int32(parts))
        queue.launch(Launch("extremes", "join_extremes", (blocks(count, warps), 1), THREADS, 0, arguments))
    return extremes
