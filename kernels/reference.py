"""NumPy specification of the kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np


@functools.lru_cache(maxsize=256)
def resize_taps(size: int, target: int, interpolation: str = "bilinear") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `target` positions along an axis of `size`: two source positions and the weight of the second.

    bilinear: half-pixel centres, no antialiasing; nearest: floor(i size / target). Both as PyTorch's interpolate.
    ValueError for another interpolation or sizes below 1.
    """
    if size < 1 or target < 1:
        raise ValueError(f"cannot resize from {size} to {target}")
    positions = np.arange(target)
    if interpolation == "nearest":
        low = positions * size // target
        return low, low, np.zeros(target, np.float32)
    if interpolation != "bilinear":
        raise ValueError(f"interpolation {interpolation!r}: use 'bilinear' or 'nearest'")
    source = np.maximum((positions + 0.5) * size / target - 0.5, 0)
    low = np.minimum(source.astype(np.int64), size - 1)
    return low, np.minimum(low + 1, size - 1), (source - low).astype(np.float32)


def upsample(maps: np.ndarray, size: Sequence[int], interpolation: str = "bilinear") -> np.ndarray:
    """Resize by `resize_taps` on both axes.

    maps (..., h, w) float32 -> (..., *size) float32. ValueError if size < (1, 1).
    """
    if maps.shape[-2:] == tuple(size):
        return maps
    low, high, weight = resize_taps(maps.shape[-2], size[0], interpolation)
    first = maps[..., low, :]
    rows = first + (maps[..., high, :] - first) * weight[:, None]
    low, high, weight = resize_taps(maps.shape[-1], size[1], interpolation)
    first = rows[..., low]
    return first + (rows[..., high] - first) * weight


def minmax(maps: np.ndarray, axes: tuple[int, ...] = (-2, -1)) -> np.ndarray:
    """(x - min) / (max - min) over `axes`; a constant map becomes zeros. Shape and dtype stay."""
    low = maps.min(axis=axes, keepdims=True)
    span = maps.max(axis=axes, keepdims=True) - low
    return (maps - low) / np.where(span > 0, span, 1)


def winsorize(rows: np.ndarray, percentile: float, low: float = 0.1, high: float = 1.0) -> np.ndarray:
    """Clamps each row's positive entries at their own percentile, then rescales them linearly to [low, high].

    rows (..., L) float -> same shape, float32. Entries that are not positive become 0. Percentile 0 gives `high` to every
    positive entry, as do positive entries that are all equal. The percentile interpolates linearly between order
    statistics (torch.quantile, numpy.quantile). Source: Winsor-CAM, arXiv 2507.10846. ValueError for NaN or a percentile
    outside 0..100.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile {percentile} is outside 0..100")
    rows = np.asarray(rows, np.float64)
    if np.isnan(rows).any():
        raise ValueError("winsorize: a row holds NaN")
    flat = rows.reshape(-1, rows.shape[-1])
    result = np.zeros(flat.shape, np.float32)
    for row, out in zip(flat, result, strict=True):
        positive = row > 0
        values = row[positive]
        if not values.size:
            continue
        if percentile > 0:
            values = np.minimum(values, np.quantile(values, percentile / 100))
        span = values.max() - values.min()
        equal = percentile == 0 or not span > 0
        out[positive] = high if equal else low + (values - values.min()) / span * (high - low)
    return result.reshape(rows.shape)


def _offsets(grids: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.cumsum([0, *(h * w for h, w in grids)])


def normalize_layers(maps: np.ndarray, grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Rectified and min-max scaled per layer; a constant layer becomes zeros.

    maps (B, sum h w), layers side by side -> the same shape.
    """
    ends = _offsets(grids)
    result = np.empty_like(maps)
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        result[:, start:end] = minmax(np.maximum(maps[:, start:end], 0), axes=(-1,))
    return result


def fuse_layers(
    maps: np.ndarray,
    grids: Sequence[tuple[int, int]],
    weights: np.ndarray,
    size: Sequence[int],
    interpolation: str = "bilinear",
) -> np.ndarray:
    """sum_l weight_l up(up(M_l -> the largest height and width of any layer) -> size).

    maps (B, sum h w), layers side by side, already normalised; weights (B, L) -> (B, *size) float32. Resizing is linear,
    so layers of one grid are summed before they are resized.
    """
    largest = max(h for h, _ in grids), max(w for _, w in grids)
    ends = _offsets(grids)
    sums = {grid: np.zeros((len(maps), grid[0] * grid[1]), np.float32) for grid in grids}
    for grid, start, end, weight in zip(grids, ends[:-1], ends[1:], weights.astype(np.float32).T, strict=True):
        sums[grid] += weight[:, None] * maps[:, start:end]
    total = np.zeros((len(maps), *largest), np.float32)
    for grid, summed in sums.items():
        total += upsample(summed.reshape(-1, *grid), largest, interpolation)
    return upsample(total, size, interpolation)
