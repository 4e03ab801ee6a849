"""Resizes maps with two taps per axis, as PyTorch's interpolate; shared by the kernels that resize maps."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from ..gpu.arrays import DeviceArray
from ..gpu.queue import Queue

INTERPOLATIONS = ("bilinear", "align_corners", "nearest")


@functools.lru_cache(maxsize=256)
def resize_taps(size: int, target: int, interpolation: str = "bilinear") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `target` positions along an axis of `size`: two source positions and the weight of the second.

    Three arrays (target,). bilinear: half-pixel centres, no antialiasing; align_corners: bilinear, and the first and
    last pixels of source and result have the same centres; nearest: floor(i size / target). All as PyTorch's
    interpolate. ValueError for another interpolation or sizes below 1.
    """
    if size < 1 or target < 1:
        raise ValueError(f"cannot resize from {size} to {target}")
    positions = np.arange(target)
    if interpolation == "nearest":
        low = positions * size // target
        return low, low, np.zeros(target, np.float32)
    if interpolation == "bilinear":
        source = np.maximum((positions + 0.5) * size / target - 0.5, 0)
    elif interpolation == "align_corners":
        source = positions * ((size - 1) / max(target - 1, 1))
    else:
        raise ValueError(f"interpolation {interpolation!r}: use 'bilinear', 'align_corners' or 'nearest'")
    low = np.minimum(source.astype(np.int64), size - 1)
    return low, np.minimum(low + 1, size - 1), (source - low).astype(np.float32)


_SINGLE_THREADED = 2**18  # multiplications of a matrix product: OpenBLAS takes several threads for more
_BAND = 16  # rows resized together, few enough for the cache


def resized_columns(maps: np.ndarray, width: int, interpolation: str) -> np.ndarray:
    """maps (..., h, w) -> (..., h, width)."""
    if maps.shape[-2] * maps.shape[-1] * width <= _SINGLE_THREADED:
        return maps @ _column_weights(maps.shape[-1], width, interpolation)
    low, high, weight = resize_taps(maps.shape[-1], width, interpolation)
    return maps[..., low] * (1 - weight) + maps[..., high] * weight


@functools.lru_cache(maxsize=64)
def _column_weights(size: int, target: int, interpolation: str) -> np.ndarray:
    """(size, target) float32: the weight of each source column in each column."""
    low, high, weight = resize_taps(size, target, interpolation)
    matrix, positions = np.zeros((size, target), np.float32), np.arange(target)
    matrix[low, positions] = 1 - weight
    matrix[high, positions] += weight
    return matrix


@functools.lru_cache(maxsize=64)
def _band_weights(size: int, target: int, band: int, interpolation: str) -> tuple[tuple[slice, slice, np.ndarray], ...]:
    """Per band of the resized axis: its rows, the source rows that it reads, and the weights (rows, source rows)."""
    weights = _column_weights(size, target, interpolation).T
    low, high, _ = resize_taps(size, target, interpolation)
    bands = []
    for start in range(0, target, band):
        rows = slice(start, min(start + band, target))
        source = slice(int(low[rows][0]), int(high[rows][-1]) + 1)
        bands.append((rows, source, np.ascontiguousarray(weights[rows, source])))
    return tuple(bands)


def resized_bands(columns: np.ndarray, out: np.ndarray, interpolation: str, band: int = _BAND) -> Iterator[slice]:
    """Resizes the rows of columns (..., h, W) into out (..., H, W); yields the slice of each band when it is done."""
    for rows, source, matrix in _band_weights(columns.shape[-2], out.shape[-2], band, interpolation):
        np.matmul(matrix, columns[..., source, :], out=out[..., rows, :])
        yield rows


def upsample(maps: np.ndarray, size: Sequence[int], interpolation: str = "bilinear") -> np.ndarray:
    """Resizes maps to size (H, W) with `resize_taps` on both axes.

    maps (..., h, w) float32 -> (..., H, W) float32; maps itself if it has that size. ValueError if a side is below 1.
    """
    if maps.shape[-2:] == tuple(size):
        return maps
    columns = resized_columns(maps, size[1], interpolation)
    result = np.empty((*maps.shape[:-2], *size), columns.dtype)
    band = _largest_band(maps.shape[-2], size)
    for _ in resized_bands(columns, result, interpolation, band):
        pass
    return result


def _largest_band(rows: int, size: Sequence[int]) -> int:
    """The most rows of the result, by doubling, that one thread computes at once."""
    height, width = size
    band = _BAND
    while band < height and 2 * band * (2 * band * rows / height + 2) * width <= _SINGLE_THREADED:
        band *= 2
    return band


# ---- on a GPU

TAP = np.dtype([("low", np.int32), ("high", np.int32), ("weight", np.float32)])


@functools.lru_cache(maxsize=256)
def tap_table(size: int, target: int, interpolation: str) -> np.ndarray:
    """resize_taps as one array (target,) of TAP, which the kernels read."""
    table = np.empty(target, TAP)
    table["low"], table["high"], table["weight"] = resize_taps(size, target, interpolation)
    return table


def resize_tables(
    queue: Queue, grid: Sequence[int], size: Sequence[int], interpolation: str
) -> tuple[DeviceArray, DeviceArray]:
    """Tap tables on the GPU, to resize from grid to size: (rows (H,), columns (W,))."""
    rows, columns = (tap_table(s, t, interpolation) for s, t in zip(grid, size, strict=True))
    return queue.constant(rows), queue.constant(columns)
