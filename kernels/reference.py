"""NumPy specification of the kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

INTERPOLATIONS = ("bilinear", "align_corners", "nearest")


@functools.lru_cache(maxsize=256)
def resize_taps(size: int, target: int, interpolation: str = "bilinear") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `target` positions along an axis of `size`: two source positions and the weight of the second.

    bilinear: half-pixel centres, no antialiasing; align_corners: bilinear with the corner pixels' centres on each other;
    nearest: floor(i size / target). All as PyTorch's interpolate. ValueError for another interpolation or sizes below 1.
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


def _columns(maps: np.ndarray, width: int, interpolation: str) -> np.ndarray:
    """maps (..., h, w) -> (..., h, width)."""
    low, high, weight = resize_taps(maps.shape[-1], width, interpolation)
    return maps[..., low] * (1 - weight) + maps[..., high] * weight


_BAND = 16  # rows that are resized together: small enough for the cache, and for a matrix product on one thread


@functools.lru_cache(maxsize=64)
def _band_weights(size: int, target: int, interpolation: str) -> tuple[tuple[slice, slice, np.ndarray], ...]:
    """Per band of the resized axis: its rows, the source rows that they lie between, and the weights (band, source)."""
    low, high, weight = resize_taps(size, target, interpolation)
    bands = []
    for start in range(0, target, _BAND):
        rows = slice(start, min(start + _BAND, target))
        source = slice(int(low[rows][0]), int(high[rows][-1]) + 1)
        matrix = np.zeros((rows.stop - start, source.stop - source.start), np.float32)
        positions = np.arange(len(matrix))
        matrix[positions, low[rows] - source.start] = 1 - weight[rows]
        matrix[positions, high[rows] - source.start] += weight[rows]
        bands.append((rows, source, matrix))
    return tuple(bands)


def _bands(columns: np.ndarray, out: np.ndarray, interpolation: str) -> Iterator[slice]:
    """Resizes rows, columns (..., h, W) -> out (..., H, W), and yields bands of rows as they are done."""
    for rows, source, matrix in _band_weights(columns.shape[-2], out.shape[-2], interpolation):
        np.matmul(matrix, columns[..., source, :], out=out[..., rows, :])
        yield rows


def upsample(maps: np.ndarray, size: Sequence[int], interpolation: str = "bilinear") -> np.ndarray:
    """Resize by `resize_taps` on both axes.

    maps (..., h, w) float32 -> (..., *size) float32. ValueError if size < (1, 1).
    """
    if maps.shape[-2:] == tuple(size):
        return maps
    columns = _columns(maps, size[1], interpolation)
    result = np.empty((*maps.shape[:-2], *size), columns.dtype)
    for _ in _bands(columns, result, interpolation):
        pass
    return result


GATES = ("tanh", "sigmoid_relu", "minmax", "identity")


def gate(maps: np.ndarray, kind: str, out: np.ndarray | None = None) -> np.ndarray:
    """What of the image a map (K, H, W) lets through: tanh(x), sigmoid(ReLU(x / 2)), minmax over space, or x.

    The first two are ScoreCAM++'s (arXiv 2404.19341), the third Score-CAM's. `out` may be `maps`. ValueError for another kind.
    """
    out = np.empty_like(maps) if out is None else out
    if kind == "tanh":
        np.tanh(maps, out=out)
    elif kind == "sigmoid_relu":
        np.exp(np.minimum(maps / -2, 0, out=out), out=out)
        np.reciprocal(np.add(out, 1, out=out), out=out)
    elif kind == "minmax":
        out[:] = minmax(maps)
    elif kind == "identity":
        out[:] = maps
    else:
        raise ValueError(f"gate {kind!r}: use {', '.join(GATES)}")
    return out


def mask_batch(
    image: np.ndarray,
    activations: np.ndarray,
    kind: str = "tanh",
    interpolation: str = "bilinear",
    out: np.ndarray | None = None,
    gates: np.ndarray | None = None,
) -> np.ndarray:
    """masked[k, c] = image[c] * gate(up(activations[k])).

    image (C, H, W) float32; activations (K, h, w) float32, finite -> masked (K, C, H, W) float32, in `out` where it is given.
    gates (K, H, W) float32, where given, receives gate(up(A)). ValueError for an unknown kind or interpolation.
    """
    count, (height, width) = len(activations), image.shape[1:]
    out = np.empty((count, *image.shape), np.float32) if out is None else out
    gates = np.empty((count, height, width), np.float32) if gates is None else gates
    local = kind != "minmax"  # its extremes are those of the whole resized map
    for rows in _bands(_columns(activations, width, interpolation), gates, interpolation):
        if local:
            gate(gates[:, rows], kind, out=gates[:, rows])
            np.multiply(image[:, rows], gates[:, None, rows], out=out[:, :, rows])
    if not local:
        np.multiply(image, gate(_within_range(gates, activations), kind, out=gates)[:, None], out=out)
    return out


def _within_range(resized: np.ndarray, activations: np.ndarray) -> np.ndarray:
    """In place: no rounding beyond the range of the map, or min-max scaling would make a map of a constant's rounding."""
    low, high = activations.min(axis=(1, 2), keepdims=True), activations.max(axis=(1, 2), keepdims=True)
    return np.clip(resized, low, high, out=resized)


def accumulate_maps(
    total: np.ndarray,
    scores: np.ndarray,
    activations: np.ndarray,
    kind: str = "tanh",
    interpolation: str = "bilinear",
    gates: np.ndarray | None = None,
) -> None:
    """total[s] += sum_k scores[s, k] gate(up(activations[k])), in place.

    total (S, H, W), scores (S, K), activations (K, h, w), all float32 and finite. gates: what mask_batch kept, to spare making them again.
    """
    if kind == "identity":  # resizing is linear
        total += upsample(np.einsum("sk,khw->shw", scores, activations), total.shape[1:], interpolation)
        return
    if gates is None:
        gates = upsample(activations, total.shape[1:], interpolation)
        if kind == "minmax" and gates is not activations:
            _within_range(gates, activations)
        gates = gate(gates, kind)
    total += np.einsum("sk,khw->shw", scores, gates)


def minmax(maps: np.ndarray, axes: tuple[int, ...] = (-2, -1)) -> np.ndarray:
    """(x - min) / (max - min) over `axes`; a constant map becomes zeros. Shape and dtype stay."""
    low, high = maps.min(axis=axes, keepdims=True), maps.max(axis=axes, keepdims=True)
    with np.errstate(over="ignore"):
        span = high - low
    if maps.dtype != np.float64 and np.isinf(span).any():  # the difference is beyond the dtype
        return minmax(maps.astype(np.float64), axes).astype(maps.dtype)
    return (maps - low) / np.where(span > 0, span, 1)


def winsorize(rows: np.ndarray, percentile: float, low: float = 0.1, high: float = 1.0) -> np.ndarray:
    """Clamps each row's positive entries at their own percentile, then rescales them linearly to [low, high].

    rows (..., L) float -> same shape, float32. Entries that are not positive become 0. Percentile 0 gives `high` to every
    positive entry, as do positive entries that are all equal. The percentile interpolates linearly between order
    statistics (torch.quantile, numpy.quantile). Infinity is a value: seen from it, finite entries are all at `low`.
    Source: Winsor-CAM, arXiv 2507.10846. ValueError for NaN or a percentile outside 0..100.
    """
    rows = np.asarray(rows, np.float64)
    if np.isnan(rows).any():
        raise ValueError("winsorize: a row holds NaN")
    flat = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
    result = np.zeros(flat.shape, np.float32)
    for row, out in zip(flat, result, strict=True):
        positive = row > 0
        values = row[positive]
        if not values.size:
            continue
        limit = _quantile(values, percentile / 100)
        least = values.min()
        if percentile == 0 or not limit > least:
            out[positive] = high
        elif np.isinf(limit):
            out[positive] = np.where(np.isinf(values), high, low)
        else:
            out[positive] = low + (np.minimum(values, limit) - least) / (limit - least) * (high - low)
    return result.reshape(rows.shape)


def _quantile(values: np.ndarray, fraction: float) -> float:
    """numpy.quantile, but between infinity and infinity there is infinity."""
    position = fraction * (len(values) - 1)
    below = int(position)
    above = min(below + 1, len(values) - 1)
    first, second = np.partition(values, (below, above))[[below, above]]
    return first if first == second or position == below else first + (second - first) * (position - below)


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
    normalize: bool = False,
) -> np.ndarray:
    """sum_l weight_l up(up(M_l -> the largest height and width of any layer) -> size).

    maps (B, sum h w), layers side by side, finite; weights (B, L) -> (B, *size) float32. normalize: by `normalize_layers` first.
    Resizing is linear, so layers of one grid are summed before they are resized.
    """
    if normalize:
        maps = normalize_layers(maps, grids)
    largest = max(h for h, _ in grids), max(w for _, w in grids)
    ends = _offsets(grids)
    sums = {grid: np.zeros((len(maps), grid[0] * grid[1]), np.float32) for grid in grids}
    for grid, start, end, weight in zip(grids, ends[:-1], ends[1:], weights.astype(np.float32).T, strict=True):
        sums[grid] += weight[:, None] * maps[:, start:end]
    total = np.zeros((len(maps), *largest), np.float32)
    for grid, summed in sums.items():
        total += upsample(summed.reshape(-1, *grid), largest, interpolation)
    return upsample(total, size, interpolation)


# ---- what methods read of gradients, activations and logits

AGGREGATIONS = ("mean", "max", "min", "absmean", "absmax", "l2")
CANCELLED = 1e-6  # a mean below this part of the mean magnitude is rounding noise: float32 leaves about 1e-8


def layer_importance(alphas: np.ndarray, channels: Sequence[int], kind: str = "mean") -> np.ndarray:
    """ReLU(aggregate_k alpha_k) of each layer: alphas (B, sum K), layers side by side -> (B, L) float32.

    The mean is exactly 0 where the channels cancel. They do behind a layer norm (ConvNeXt): it makes gradients sum to zero
    over channels, so that the mean's sign, and with it the layers that Winsor-CAM keeps, would be decided by rounding.
    """
    parts = np.split(alphas.astype(np.float64), np.cumsum(channels)[:-1], axis=1)
    return np.maximum(np.stack([_aggregated(part, kind) for part in parts], axis=1), 0).astype(np.float32)


def _aggregated(alphas: np.ndarray, kind: str) -> np.ndarray:
    if kind == "mean":
        mean = alphas.mean(axis=1)
        return np.where(np.abs(mean) <= CANCELLED * np.abs(alphas).mean(axis=1), 0, mean)
    if kind in ("max", "min"):
        return getattr(alphas, kind)(axis=1)
    if kind in ("absmean", "absmax"):
        return getattr(np.abs(alphas), kind.removeprefix("abs"))(axis=1)
    return np.sqrt((alphas * alphas).sum(axis=1))


PROBABILITIES = ("softmax", "sigmoid", "logits")


def class_probabilities(logits: np.ndarray, kind: str) -> np.ndarray:
    """(N, classes) -> the same, float64: the softmax over classes, each one's sigmoid, or the logits as they are."""
    z = logits.astype(np.float64)
    if kind == "logits":
        return z
    if kind == "sigmoid":
        return 0.5 * (1 + np.tanh(z / 2))  # without overflow
    shifted = np.exp(z - z.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def class_scores(
    logits: np.ndarray,
    seeds: np.ndarray,
    kind: str = "softmax",
    offset: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """weights_n (sum_c seeds[s, c] p(logits)[n, c] - offset_s): logits (N, classes), seeds (S, classes) -> (S, N) float32."""
    scores = seeds.astype(np.float64) @ class_probabilities(logits, kind).T
    if offset is not None:
        scores -= offset[:, None]
    return (scores if weights is None else scores * weights).astype(np.float32)


def channel_extremes(activations: np.ndarray) -> np.ndarray:
    """Lowest and highest value of each channel: (K, h, w) -> (K, 2) float32."""
    return np.stack([activations.min(axis=(1, 2)), activations.max(axis=(1, 2))], axis=1)


# ---- from pictures to inputs

FRACTION_BITS = 22  # of Pillow's weights
FILTERS = {"bilinear": 1, "bicubic": 2, "lanczos": 3}  # their reach


@functools.lru_cache(maxsize=64)
def resize_spans(size: int, target: int, filter: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `target` positions: its first source position, how many there are, and their weights in fixed point.

    (target,) int32, (target,) int32, (target, most) int32. As Pillow resizes with antialiasing: the filter is stretched by
    size / target where that is above 1. Where the sizes are equal nothing is filtered.
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
    """Triangle; Keys' cubic with a = -1/2; sinc windowed by its own third."""
    x = np.abs(x)
    if name == "bilinear":
        return np.maximum(1 - x, 0)
    if name == "bicubic":
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0))
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)


def resize_picture(
    picture: np.ndarray,
    size: Sequence[int],
    crop: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    filter: str = "bilinear",
    rows_first: bool = False,
) -> np.ndarray:
    """(pixel / 255 - mean) / std of the resized and cropped picture.

    picture (H, W, C) uint8; size: (height, width) to resize to; crop: (top, left, height, width) of that -> (C, height, width)
    float32. Resized as Pillow does, bit by bit: one axis, then the other, each rounded to 8 bits.
    """
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
