"""Winsor-CAM's percentile winsorization: cuda/winsorize.cu."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..call import Stream, prepared
from ..checks import expect
from ..gpu.arrays import is_device_array
from ..gpu.queue import THREADS, Launch, blocks, int32s, is_wide

STATIC_SHARED = 9 * 1024  # bytes of shared memory for winsorize_short's histogram and other fixed data
SMALL_BLOCK = 4096  # entries of a row; with more, blocks of 256 threads leave a multiprocessor half empty
ENTRIES_PER_BLOCK = 16384  # of a long row; a multiple of 4 THREADS
ROW_STATE_BYTES = 8264


def winsorize(rows: Any, percentile: float, low: float = 0.1, high: float = 1.0, *, stream: Stream = None) -> Any:
    """Clamps each row's positive entries at their own percentile, then rescales them linearly to [low, high].

    rows (..., L) float (on a GPU float32) -> the same shape, float32. percentile: 0..100. Entries that are not positive
    become 0. If percentile is 0, or all positive entries are equal, every positive entry becomes `high`. The percentile
    interpolates linearly between order statistics (as torch.quantile, numpy.quantile). If the percentile is infinite,
    infinite entries become `high` and finite positive ones `low`. Source: Winsor-CAM, arXiv 2507.10846. ValueError for
    NaN, a percentile outside 0..100, or low > high. On a GPU a row with NaN becomes NaN, and `Stream.synchronize`
    raises the ValueError; DeviceError.
    """
    rows = rows if is_device_array(rows) else np.asarray(rows)
    with prepared("winsorize", stream, rows=rows) as (queue, (rows,)):
        if not 0 <= percentile <= 100:
            raise ValueError(f"winsorize: percentile {percentile} is outside 0..100")
        if not low <= high:
            raise ValueError(f"winsorize: low {low} is above high {high}")
        if not rows.shape:
            raise ValueError("winsorize: rows is a single number, needed (..., L)")
        if queue is None:
            return _by_numpy(rows, percentile, low, high)
        expect("winsorize", "rows", rows, ["..."] * (len(rows.shape) - 1) + ["L"])
        length = rows.shape[-1]
        count = math.prod(rows.shape[:-1])
        result = queue.empty(rows.shape)
        if count == 0 or length == 0:
            return result
        bounds = np.float64(percentile / 100), np.float32(low), np.float32(high)
        rows_, length_ = int32s("winsorize", rows=count, entries=length)
        if 4 * length + STATIC_SHARED <= queue.shared_limit:
            threads = THREADS if length <= SMALL_BLOCK else 1024
            arguments = (rows, result, queue.fault, rows_, length_, *bounds)
            grid = blocks(count, 1), 1
            queue.launch(Launch("winsorize", "winsorize_short", grid, threads, 4 * length, arguments))
            return result
        suffix, vector = ("_wide", 4) if is_wide(4, length, rows, result) else ("", 1)
        states = queue.empty((count, ROW_STATE_BYTES), np.uint8)
        reset = Launch("winsorize", "winsorize_reset", (blocks(count, 1), 1), THREADS, 0, (states, rows_))
        queue.launch(reset)
        grid = blocks(length, ENTRIES_PER_BLOCK), blocks(count, 1, 1)
        for digit in range(3):
            sizes = rows_, np.int64(length), np.int64(ENTRIES_PER_BLOCK), np.int32(digit)
            arguments = (rows, states, queue.fault, *sizes, *bounds)
            queue.launch(Launch("winsorize", f"winsorize_count{suffix}", grid, THREADS, 0, arguments))
        grid = blocks(length, 4 * THREADS * vector), blocks(count, 1, 1)
        arguments = (rows, result, states, rows_, np.int64(length), *bounds[1:])
        queue.launch(Launch("winsorize", f"winsorize_write{suffix}", grid, THREADS, 0, arguments))
        return result


def _by_numpy(rows: np.ndarray, percentile: float, low: float, high: float) -> np.ndarray:
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
    """As numpy.quantile, but infinity between two infinite values (numpy gives NaN)."""
    position = fraction * (len(values) - 1)
    below = int(position)
    above = min(below + 1, len(values) - 1)
    first, second = np.partition(values, (below, above))[[below, above]]
    return first if first == second or position == below else first + (second - first) * (position - below)
