"""Weighed sums of layers' maps: cuda/fuse_layers.cu."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..call import Stream, prepared
from ..checks import expect, expect_choice, expect_sides
from ..gpu.queue import NOTHING, THREADS, Argument, Launch, blocks, int32s
from .resizing import INTERPOLATIONS, resize_tables, tap_table, upsample

_FEW_RUNS = 16  # of layers with one grid: with more, NumPy's calls take longer than copies of all maps
TILE = (8, 32)  # height and width in pixels of a block's part of the result: one pixel per thread


def fuse_layers(
    maps: Any,
    grids: Sequence[tuple[int, int]],
    weights: Any,
    size: Sequence[int],
    interpolation: str = "bilinear",
    normalize: bool = False,
    *,
    stream: Stream = None,
) -> Any:
    """sum_l weight_l up(up(M_l -> the largest height and width of any layer) -> size).

    maps (B, sum h w) float32, finite, layers side by side; weights (B, L) float32 -> (B, *size) float32. normalize:
    rectify and min-max scale each layer first. ValueError for what does not fit; DeviceError.
    """
    with prepared("fuse_layers", stream, maps=maps, weights=weights) as (queue, (maps, weights)):
        expect_choice("fuse_layers", "interpolation", interpolation, INTERPOLATIONS)
        if len(grids) == 0:
            raise ValueError("fuse_layers: no layers")
        grids = [(h, w) for h, w in grids]
        for grid in grids:
            expect_sides("fuse_layers", grid=grid)
        expect_sides("fuse_layers", size=size)
        expect("fuse_layers", "maps", maps, ("B", sum(h * w for h, w in grids)))
        expect(
            "fuse_layers",
            "weights",
            weights,
            (maps.shape[0], len(grids)),
            ("float32",) if queue is not None else ("float32", "float64"),
        )
        if queue is None:
            return _by_numpy(maps, grids, weights, size, interpolation, normalize)
        images, layers, (height, width) = maps.shape[0], len(grids), size
        fused = queue.empty((images, height, width))
        if images == 0:
            return fused
        counts = int32s("fuse_layers", images=images, layers=layers, height=height, width=width)
        offsets = queue.constant(np.cumsum([0, *(h * w for h, w in grids)], dtype=np.int64))
        scales: Argument = NOTHING
        if normalize:
            scales = queue.empty((images, layers, 3))
            arguments: tuple[Argument, ...] = (maps, offsets, scales, *counts[:2])
            grid = blocks(images * layers, 1), 1
            queue.launch(Launch("fuse_layers", "layer_scales", grid, 1024, 0, arguments))
        described, taps, largest = _layer_tables(tuple(grids), interpolation)
        to_result = resize_tables(queue, largest, (height, width), interpolation)
        tables = queue.constant(described), queue.constant(taps), *to_result
        arguments = (maps, offsets, *tables, weights, scales, fused, *counts)
        tiles = images * -(-height // TILE[0]) * -(-width // TILE[1])
        queue.launch(Launch("fuse_layers", "fuse_layers", (blocks(tiles, 1), 1), THREADS, 0, arguments))
        return fused


def _by_numpy(
    maps: np.ndarray,
    grids: Sequence[tuple[int, int]],
    weights: np.ndarray,
    size: Sequence[int],
    interpolation: str,
    normalize: bool,
) -> np.ndarray:
    if normalize:
        maps = normalize_layers(maps, grids)
    weights = weights.astype(np.float32, copy=False)
    sums: dict[tuple[int, int], np.ndarray] = {}
    for grid, layers, block in _by_runs(maps, grids):
        part = np.einsum("bl,blp->bp", weights[:, layers], block)
        sums[grid] = sums[grid] + part if grid in sums else part
    largest = max(h for h, _ in sums), max(w for _, w in sums)
    total = np.zeros((len(maps), *largest), np.float32)
    for grid, summed in sums.items():
        total += upsample(summed.reshape(-1, *grid), largest, interpolation)
    return upsample(total, size, interpolation)


def normalize_layers(maps: np.ndarray, grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Rectified and min-max scaled per layer; a constant layer becomes zeros.

    maps (B, sum h w), layers side by side -> the same shape.
    """
    result = np.maximum(maps, 0)
    if len(_runs(tuple(grids))) > _FEW_RUNS:
        sizes = [h * w for h, w in grids]
        starts = np.cumsum([0, *sizes[:-1]])
        low, high = np.minimum.reduceat(result, starts, axis=1), np.maximum.reduceat(result, starts, axis=1)
        span = high - low
        if low.any():
            result -= np.repeat(low, sizes, axis=1)
        result /= np.repeat(np.where(span > 0, span, 1), sizes, axis=1)
        return result
    for _, _, block in _by_runs(result, grids):
        low = block.min(axis=2, keepdims=True)
        span = block.max(axis=2, keepdims=True) - low  # of numbers from 0: it does not overflow
        if low.any():
            block -= low
        span[span == 0] = 1
        block /= span
    return result


def _by_runs(maps: np.ndarray, grids: Sequence[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], slice, np.ndarray]]:
    """Of neighbouring layers with one grid: the grid, which layers, and their maps (B, layers, h w), a view."""
    for grid, layers, pixels in _runs(tuple(grids)):
        yield grid, layers, maps[:, pixels].reshape(len(maps), layers.stop - layers.start, grid[0] * grid[1])


@functools.lru_cache(maxsize=64)
def _runs(grids: tuple[tuple[int, int], ...]) -> list[tuple[tuple[int, int], slice, slice]]:
    """Neighbouring layers with one grid: the grid, the layers, and their pixels."""
    runs: list[tuple[tuple[int, int], slice, slice]] = []
    layer = pixel = 0
    for grid, same in itertools.groupby(grids):
        count = len(list(same))
        pixels = count * grid[0] * grid[1]
        runs.append((grid, slice(layer, layer + count), slice(pixel, pixel + pixels)))
        layer, pixel = layer + count, pixel + pixels
    return runs


@functools.lru_cache(maxsize=64)
def _layer_tables(
    grids: tuple[tuple[int, int], ...], interpolation: str
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """(per layer: width, first row tap, first column tap, (L, 3) int32; all taps; the largest height and width)."""
    largest = max(h for h, _ in grids), max(w for _, w in grids)
    begins: dict[tuple[int, int], int] = {}
    tables: list[np.ndarray] = []
    for grid in grids:
        for key in zip(grid, largest, strict=True):
            if key not in begins:
                begins[key] = sum(map(len, tables))
                tables.append(tap_table(*key, interpolation))
    rows = [(w, begins[h, largest[0]], begins[w, largest[1]]) for h, w in grids]
    return np.array(rows, np.int32), np.concatenate(tables), largest
