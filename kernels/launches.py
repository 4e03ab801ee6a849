"""How each kernel is launched: grids, arguments, workspaces. Knows no driver; a `Queue` has memory and launches."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .arrays import DeviceArray
from .reference import AGGREGATIONS, CANCELLED, GATES, PROBABILITIES, resize_spans, resize_taps

LARGEST = 2**31 - 1
MAX_GRID = (LARGEST, 65535)  # blocks along x and y; every kernel strides over what a grid does not cover
THREADS = 256
WARP = 32
MAPS_PER_BLOCK = 16  # of mask_batch: enough to share the pixels and the positions of the resize
MAPS_PER_CHUNK = 32  # of accumulate_maps: sums of float32 stay short, and many chunks fill the GPU
PARTIAL_SUMS = 2**21  # of accumulate_maps: in memory together, unless one chunk has more
STATIC_SHARED = 9 * 1024  # winsorize_short's histogram and the like
ENTRIES_PER_BLOCK = 16384  # of a long row; a multiple of 4 THREADS
ROW_STATE_BYTES = 8264
TILE = (8, 32)  # of fuse_layers: pixels of the result per block, one for each of the THREADS

Argument = DeviceArray | np.number


@dataclass(frozen=True)
class Launch:
    """One launch: blocks (x, y), threads per block, bytes of dynamic shared memory, the kernel's arguments in order."""

    module: str  # the .cu file's name
    kernel: str
    grid: tuple[int, int]
    threads: int
    shared: int
    arguments: tuple[Argument, ...]

    def __str__(self) -> str:
        arrays = [a for a in self.arguments if isinstance(a, DeviceArray) and a.dtype.names is None]  # no tables
        return f"{self.kernel}({', '.join(f'{a.dtype}{list(a.shape)}' for a in arrays)})"


@runtime_checkable
class Queue(Protocol):
    """A stream of one GPU."""

    @property
    def handle(self) -> int: ...

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that a block may have."""
        ...

    @property
    def fault(self) -> DeviceArray:
        """An int32 that a kernel sets where its input was refused."""
        ...

    def empty(self, shape: Sequence[int], dtype: Any = np.float32) -> DeviceArray: ...

    def constant(self, array: np.ndarray) -> DeviceArray:
        """A small array on the GPU, uploaded once."""
        ...

    def upload(self, array: np.ndarray) -> DeviceArray: ...

    def launch(self, launch: Launch) -> None: ...

    def wait_for(self, stream: int) -> None:
        """What is queued here from now on waits for what is queued there until now."""
        ...

    def lead(self, stream: int) -> None:
        """What is queued there from now on waits for what is queued here until now."""
        ...


_NOTHING = np.uint64(0)  # a null pointer


def _ints(kernel: str, **counts: int) -> tuple[np.int32, ...]:
    """ValueError for a count that does not fit."""
    for name, count in counts.items():
        if count > LARGEST:
            raise ValueError(f"{kernel}: {name} is {count}, at most {LARGEST}")
    return tuple(np.int32(count) for count in counts.values())


TAP = np.dtype([("low", np.int32), ("high", np.int32), ("weight", np.float32)])


@functools.lru_cache(maxsize=256)
def tap_table(size: int, target: int, interpolation: str) -> np.ndarray:
    """reference.resize_taps as the kernels read it, (target,)."""
    table = np.empty(target, TAP)
    table["low"], table["high"], table["weight"] = resize_taps(size, target, interpolation)
    return table


def _tables(
    queue: Queue, grid: Sequence[int], size: Sequence[int], interpolation: str
) -> tuple[DeviceArray, DeviceArray]:
    """Taps of the rows and of the columns."""
    rows, columns = (tap_table(s, t, interpolation) for s, t in zip(grid, size, strict=True))
    return queue.constant(rows), queue.constant(columns)


def _strips(size: Sequence[int], vector: int) -> int:
    """Blocks of warps that take a row of 32 vectors each."""
    height, width = size
    return _blocks(height * -(-width // (WARP * vector)), THREADS // WARP)


def _blocks(work: int, per_block: int, axis: int = 0) -> int:
    return max(1, min(-(-work // per_block), MAX_GRID[axis]))


def _wide(vector: int, width: int, *arrays: DeviceArray) -> bool:
    """Whether rows of `width` can be read and written 16 bytes at a time."""
    return width % vector == 0 and all(a.pointer % 16 == 0 for a in arrays)


def _extremes(queue: Queue, kind: str, maps: DeviceArray, tables: Sequence[DeviceArray]) -> Argument:
    """Lowest and highest value of each resized map, (K, 2), for the min-max gate; nothing for the others."""
    if kind != "minmax":
        return _NOTHING
    count, h, w = maps.shape
    extremes = queue.empty((count, 2))
    sides = _ints("mask_batch", maps=count, height=len(tables[0]), width=len(tables[1]), h=h, w=w)
    arguments = (maps, *tables, extremes, *sides)
    queue.launch(Launch("extremes", "resized_extremes", (_blocks(count, 1), 1), THREADS, 0, arguments))
    return extremes


def mask_batch(
    queue: Queue, image: DeviceArray, activations: DeviceArray, kind: str, interpolation: str, out: DeviceArray | None
) -> DeviceArray:
    (count, h, w), (channels, height, width) = activations.shape, image.shape
    out = queue.empty((count, *image.shape)) if out is None else out
    if count == 0 or channels == 0:
        return out
    sides = _ints("mask_batch", maps=count, channels=channels, height=height, width=width, h=h, w=w)
    half = out.dtype == np.float16
    vector = 8 if half else 4
    vector = vector if _wide(vector, width, image, out) else 1
    tables = _tables(queue, (h, w), (height, width), interpolation)
    extremes = _extremes(queue, kind, activations, tables)
    kernel = f"mask_batch_{'f16' if half else 'f32'}{'_wide' if vector > 1 else ''}"
    modes = np.int32(GATES.index(kind)), np.int32(MAPS_PER_BLOCK)
    arguments = (image, activations, *tables, extremes, out, *sides, *modes)
    grid = _strips((height, width), vector), _blocks(count, MAPS_PER_BLOCK, 1)
    queue.launch(Launch("mask_batch", kernel, grid, THREADS, 0, arguments))
    return out


def accumulate_maps(
    queue: Queue, total: DeviceArray, scores: DeviceArray, activations: DeviceArray, kind: str, interpolation: str
) -> None:
    (count, h, w), (rows, height, width) = activations.shape, total.shape
    if count == 0 or rows == 0:
        return
    sides = _ints("accumulate_maps", scores=rows, maps=count, height=height, width=width, h=h, w=w)
    # by the shapes alone, so that the same bits come out wherever the arrays lie and on every GPU
    entries = math.prod(total.shape)
    chunks = min(-(-count // MAPS_PER_CHUNK), max(1, PARTIAL_SUMS // entries))
    per_chunk = -(-count // chunks)
    chunks = -(-count // per_chunk)
    vector = 4 if _wide(4, width, total, activations) else 1
    tables = _tables(queue, (h, w), (height, width), interpolation)
    extremes = _extremes(queue, kind, activations, tables)
    partial = queue.empty((chunks, *total.shape)) if chunks > 1 else _NOTHING
    kernel = "accumulate_maps_wide" if vector > 1 else "accumulate_maps"
    modes = np.int32(GATES.index(kind)), np.int32(per_chunk), np.int32(chunks)
    arguments: tuple[Argument, ...] = (scores, activations, *tables, extremes, total, partial, *sides, *modes)
    grid = _strips((height, width), vector), _blocks(chunks, 1, 1)
    queue.launch(Launch("accumulate_maps", kernel, grid, THREADS, 0, arguments))
    if chunks > 1:
        arguments = (total, partial, np.int64(entries), np.int32(chunks))
        queue.launch(Launch("accumulate_maps", "add_partials", (_blocks(entries, THREADS), 1), THREADS, 0, arguments))


def winsorize(queue: Queue, rows: DeviceArray, percentile: float, low: float, high: float) -> DeviceArray:
    length = rows.shape[-1]
    count = math.prod(rows.shape[:-1])
    result = queue.empty(rows.shape)
    if count == 0 or length == 0:
        return result
    bounds = np.float64(percentile / 100), np.float32(low), np.float32(high)
    rows_, length_ = _ints("winsorize", rows=count, entries=length)
    if 4 * length + STATIC_SHARED <= queue.shared_limit:
        threads = THREADS if length <= 8192 else 1024
        arguments = (rows, result, queue.fault, rows_, length_, *bounds)
        grid = _blocks(count, 1), 1
        queue.launch(Launch("winsorize", "winsorize_short", grid, threads, 4 * length, arguments))
        return result
    suffix, vector = ("_wide", 4) if _wide(4, length, rows, result) else ("", 1)
    states = queue.empty((count, ROW_STATE_BYTES), np.uint8)
    reset = Launch("winsorize", "winsorize_reset", (_blocks(count, 1), 1), THREADS, 0, (states, rows_))
    queue.launch(reset)
    grid = _blocks(length, ENTRIES_PER_BLOCK), _blocks(count, 1, 1)
    for digit in range(3):
        sizes = rows_, np.int64(length), np.int64(ENTRIES_PER_BLOCK), np.int32(digit)
        arguments = (rows, states, queue.fault, *sizes, *bounds)
        queue.launch(Launch("winsorize", f"winsorize_count{suffix}", grid, THREADS, 0, arguments))
    grid = _blocks(length, 4 * THREADS * vector), _blocks(count, 1, 1)
    arguments = (rows, result, states, rows_, np.int64(length), *bounds[1:])
    queue.launch(Launch("winsorize", f"winsorize_write{suffix}", grid, THREADS, 0, arguments))
    return result


def fuse_layers(
    queue: Queue,
    maps: DeviceArray,
    grids: Sequence[tuple[int, int]],
    weights: DeviceArray,
    size: Sequence[int],
    interpolation: str,
    normalize: bool,
) -> DeviceArray:
    images, layers, (height, width) = maps.shape[0], len(grids), size
    fused = queue.empty((images, height, width))
    if images == 0:
        return fused
    counts = _ints("fuse_layers", images=images, layers=layers, height=height, width=width)
    offsets = queue.constant(np.cumsum([0, *(h * w for h, w in grids)], dtype=np.int64))
    scales: Argument = _NOTHING
    if normalize:
        scales = queue.empty((images, layers, 3))
        arguments: tuple[Argument, ...] = (maps, offsets, scales, *counts[:2])
        grid = _blocks(images * layers, 1), 1
        queue.launch(Launch("fuse_layers", "layer_scales", grid, 1024, 0, arguments))
    described, taps, largest = _layer_tables(tuple(grids), interpolation)
    to_result = _tables(queue, largest, (height, width), interpolation)
    tables = queue.constant(described), queue.constant(taps), *to_result
    arguments = (maps, offsets, *tables, weights, scales, fused, *counts)
    tiles = images * -(-height // TILE[0]) * -(-width // TILE[1])
    queue.launch(Launch("fuse_layers", "fuse_layers", (_blocks(tiles, 1), 1), THREADS, 0, arguments))
    return fused


@functools.lru_cache(maxsize=64)
def _layer_tables(
    grids: tuple[tuple[int, int], ...], interpolation: str
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Per layer its width and where its taps of rows and columns begin, (L, 3); all taps; the largest grid."""
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


def layer_importance(queue: Queue, alphas: DeviceArray, channels: Sequence[int], kind: str) -> DeviceArray:
    importance = queue.empty((alphas.shape[0], len(channels)))
    if alphas.shape[0] == 0:
        return importance
    images, layers, _ = _ints("layer_importance", images=alphas.shape[0], layers=len(channels), channels=sum(channels))
    offsets = queue.constant(np.cumsum([0, *channels], dtype=np.int32))
    settings = np.int32(AGGREGATIONS.index(kind)), np.float64(CANCELLED)
    arguments = (alphas, offsets, importance, images, layers, *settings)
    grid = _blocks(int(images) * int(layers), 1), 1
    queue.launch(Launch("layer_importance", "layer_importance", grid, THREADS, 0, arguments))
    return importance


def class_scores(
    queue: Queue,
    logits: DeviceArray,
    seeds: DeviceArray,
    kind: str,
    offset: DeviceArray | None,
    weights: DeviceArray | None,
) -> DeviceArray:
    (rows, classes), count = logits.shape, seeds.shape[0]
    scores = queue.empty((count, rows))
    if rows == 0 or count == 0:
        return scores
    sizes = _ints("class_scores", rows=rows, seeds=count, classes=classes)
    optional = (_NOTHING if offset is None else offset), (_NOTHING if weights is None else weights)
    arguments = (logits, seeds, *optional, scores, *sizes, np.int32(PROBABILITIES.index(kind)))
    queue.launch(Launch("class_scores", "class_scores", (_blocks(rows, 1), 1), THREADS, 0, arguments))
    return scores


def channel_extremes(queue: Queue, activations: DeviceArray) -> DeviceArray:
    count, h, w = activations.shape
    extremes = queue.empty((count, 2))
    if count == 0:
        return extremes
    arguments = (activations, extremes, *_ints("channel_extremes", channels=count), np.int64(h * w))
    queue.launch(Launch("channels", "channel_extremes", (_blocks(count, 1), 1), THREADS, 0, arguments))
    return extremes


def take_channels(queue: Queue, activations: DeviceArray, index: DeviceArray) -> DeviceArray:
    _, h, w = activations.shape
    taken = queue.empty((index.shape[0], h, w))
    entries = math.prod(taken.shape)
    if entries:
        arguments = (activations, index, taken, np.int64(entries), np.int64(h * w))
        queue.launch(Launch("channels", "take_channels", (_blocks(entries, THREADS), 1), THREADS, 0, arguments))
    return taken


NOT_FINITE = 2
FAULTS = {1: "winsorize: a row holds NaN", NOT_FINITE: "NaN or infinity"}  # what a kernel says in the queue's fault


def check_finite(queue: Queue, values: DeviceArray) -> None:
    count = math.prod(values.shape)
    if count:
        arguments = (values, queue.fault, np.int64(count), np.int32(NOT_FINITE))
        queue.launch(Launch("check_finite", "check_finite", (_blocks(count, 4 * THREADS), 1), THREADS, 0, arguments))


SPAN = np.dtype([("first", np.int32), ("count", np.int32), ("weights", np.int32)])


def resize_picture(
    queue: Queue,
    picture: DeviceArray,
    size: Sequence[int],
    crop: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    filter: str,
    rows_first: bool,
    out: DeviceArray | None,
) -> DeviceArray:
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
        sides = _ints("resize_picture", size=before, target=length, inner=inner)
        arguments = (pixels, queue.upload(spans), queue.upload(weights), resized, np.int64(entries), *sides)
        queue.launch(Launch("resize_picture", "resize_axis", (_blocks(entries, THREADS), 1), THREADS, 0, arguments))
        pixels = resized
    image = queue.empty((channels, height, width)) if out is None else out
    shades = queue.constant(np.array(mean, np.float32)), queue.constant(np.array(std, np.float32))
    arguments = (pixels, *shades, image, np.int64(height * width), *_ints("resize_picture", channels=channels))
    grid = _blocks(height * width * channels, THREADS), 1
    queue.launch(Launch("resize_picture", "normalize_picture", grid, THREADS, 0, arguments))
    return image


def _span_tables(size: int, target: int, filter: str, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The spans of `length` positions from `start` on, and their weights one after the other."""
    first, count, weights = (table[start : start + length] for table in resize_spans(size, target, filter))
    spans = np.empty(length, SPAN)
    spans["first"], spans["count"], spans["weights"] = first, count, np.arange(length) * weights.shape[1]
    return spans, weights.ravel()
