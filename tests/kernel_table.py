"""The kernels against their NumPy specification on awkward shapes and contents: one table for the host and for a GPU.

Needs NumPy and camrt.kernels alone, so that benchmarks/gpu.py can run it where little else is installed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from camrt import kernels
from camrt.kernels.operations import winsorize as winsorize_module

Size = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """check(queue) raises AssertionError where a kernel differs from its specification."""

    name: str
    check: Callable[[Any], None]

    def __str__(self) -> str:
        return self.name


def filled(content: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    made = {
        "random": lambda: 3 * rng.standard_normal(shape),
        "constant": lambda: np.full(shape, 2.7),
        "zeros": lambda: np.zeros(shape),
        "ties": lambda: rng.integers(-1, 3, shape),
        "denormals": lambda: 1e-41 * rng.standard_normal(shape),
        "huge": lambda: rng.uniform(-3.4e38, 3.4e38, shape),
    }[content]()
    return np.asarray(made).astype(np.float32)


CONTENTS = ("random", "constant", "zeros", "ties", "denormals", "huge")
SIZES = [
    ((1, 1), (1, 1)),
    ((1, 1), (7, 33)),
    ((7, 7), (32, 32)),
    ((7, 31), (33, 111)),
    ((32, 33), (31, 32)),
    ((111, 7), (7, 111)),
    ((32, 32), (32, 32)),
    ((3, 5), (111, 1)),
    ((989, 31), (7, 989)),
    ((5, 7), (3, 400)),
]
PLACES = [  # of every size random values, of some every content
    *((g, s, "random") for g, s in SIZES),
    *((g, s, c) for g, s in [((7, 31), (33, 111)), ((32, 32), (32, 32))] for c in CONTENTS[1:]),
]
LENGTHS = (1, 7, 31, 32, 33, 111, 989, 8_193)
PERCENTILES = (0, 0.5, 37.5, 50, 90, 99.9, 100)
RESNET50 = [(112, 112)] + [(56, 56)] * 11 + [(28, 28)] * 13 + [(14, 14)] * 19 + [(7, 7)] * 9
GRIDS = {
    "one": [(5, 7)],
    "points": [(1, 1)] * 3,
    "ragged": [(12, 10), (6, 5), (6, 5), (3, 31), (1, 1)],
    "growing": [(7, 7), (33, 1), (1, 111)],
}


def interpolations(content: str) -> tuple[str, ...]:
    """All on random values; what is particular to other contents does not depend on it."""
    return kernels.INTERPOLATIONS if content == "random" else ("bilinear",)


def rounding(values: np.ndarray) -> float:
    """What a few operations in float32 may lose on values of this size."""
    return 4 * float(np.spacing(np.abs(values).max(initial=0)))


def gate_tolerance(activations: np.ndarray, opened: np.ndarray, kind: str) -> float:
    """Absolute, on gate(up(A)): how far rounding of the resized map carries."""
    lost = 2 * rounding(activations)
    if kind == "minmax":
        spans = activations.max(axis=(1, 2)).astype(np.float64) - activations.min(axis=(1, 2))
        lost = float(max((lost / s for s in spans if s > 0), default=0.0))
    elif kind != "identity":
        lost = min(lost, rounding(opened))
    return lost + rounding(opened)


def reference_gates(activations: np.ndarray, size: Size, kind: str, interpolation: str) -> np.ndarray:
    gates = np.empty((len(activations), *size), np.float32)
    kernels.mask_batch(np.ones((1, *size), np.float32), activations, kind, interpolation, gates=gates)
    return gates


@contextmanager
def path(name: str) -> Iterator[None]:
    """Which of winsorize's kernels runs, whatever the length: 'short' or 'long'."""
    before = winsorize_module.STATIC_SHARED, winsorize_module.ENTRIES_PER_BLOCK
    if name == "long":
        winsorize_module.STATIC_SHARED, winsorize_module.ENTRIES_PER_BLOCK = (
            1 << 40,
            1024,
        )  # several blocks for each row
    try:
        yield
    finally:
        winsorize_module.STATIC_SHARED, winsorize_module.ENTRIES_PER_BLOCK = before


# ---- mask_batch


def masks(grid: Size, size: Size, content: str, queue: Any) -> None:
    activations = filled(content, (3, *grid))
    image = np.random.default_rng(1).uniform(-1, 1, (2, *size)).astype(np.float32)
    for kind in kernels.GATES:
        for interpolation in interpolations(content):
            want = kernels.mask_batch(image, activations, kind, interpolation)
            opened = reference_gates(activations, size, kind, interpolation)
            atol = gate_tolerance(activations, opened, kind)
            on_gpu = queue.upload(image), queue.upload(activations)
            got = queue.download(kernels.mask_batch(*on_gpu, kind, interpolation, stream=queue))
            assert got.shape == want.shape and got.dtype == np.float32
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=atol, err_msg=f"{kind} {interpolation}")
            if content == "huge" and kind == "identity":
                continue  # beyond float16
            half = queue.empty(want.shape, np.float16)
            kernels.mask_batch(*on_gpu, kind, interpolation, out=half, stream=queue)
            got = queue.download(half).astype(np.float32)
            np.testing.assert_allclose(
                got, want, rtol=1e-3, atol=atol + 1e-7, err_msg=f"float16 {kind} {interpolation}"
            )


def masks_below_float16(queue: Any) -> None:
    """Subnormal numbers of float16 are rounded, not cut off."""
    image, activations = np.full((1, 4, 16), 1.37e-6, np.float32), filled("random", (3, 4, 16))
    half = queue.empty((3, 1, 4, 16), np.float16)
    kernels.mask_batch(queue.upload(image), queue.upload(activations), out=half, stream=queue)
    want = kernels.mask_batch(image, activations)
    np.testing.assert_allclose(queue.download(half).astype(np.float32), want, rtol=0, atol=3.1e-8)


def masks_of_many(channels: int, count: int, queue: Any) -> None:
    image, activations = filled("random", (channels, 9, 16)), filled("random", (count, 4, 3))
    got = queue.download(kernels.mask_batch(queue.upload(image), queue.upload(activations), stream=queue))
    np.testing.assert_allclose(got, kernels.mask_batch(image, activations), rtol=1e-5, atol=1e-5)


# ---- accumulate_maps


def sums(grid: Size, size: Size, content: str, queue: Any) -> None:
    activations = filled(content, (5, *grid))
    scores = np.random.default_rng(1).uniform(-0.2, 0.2, (2, 5)).astype(np.float32)
    on_gpu = queue.upload(scores), queue.upload(activations)
    for kind in kernels.GATES:
        for interpolation in interpolations(content):
            want = np.zeros((2, *size), np.float32)
            kernels.accumulate_maps(want, scores, activations, kind, interpolation)
            total = queue.upload(np.zeros((2, *size), np.float32))
            assert kernels.accumulate_maps(total, *on_gpu, kind, interpolation, stream=queue) is None
            opened = reference_gates(activations, size, kind, interpolation)
            atol = gate_tolerance(activations, opened, kind)
            np.testing.assert_allclose(queue.download(total), want, atol=atol, err_msg=f"{kind} {interpolation}")


def sums_of_many(rows: int, count: int, queue: Any) -> None:
    """Onto what the total holds already, in chunks, and to the same bits each time."""
    activations, scores, before = filled("random", (count, 3, 3)), filled("random", (rows, count)), np.float32(7)
    want = np.full((rows, 12, 8), before)
    kernels.accumulate_maps(want, scores, activations)
    found = []
    for _ in range(2):
        total = queue.upload(np.full((rows, 12, 8), before))
        kernels.accumulate_maps(total, queue.upload(scores), queue.upload(activations), stream=queue)
        found.append(queue.download(total))
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(found[0], want, rtol=1e-5, atol=2e-5 * np.sqrt(count))


# ---- winsorize


def rows_of(length: int, kernel: str, queue: Any) -> None:
    rows = np.stack([filled(content, (length,), seed=length) for content in CONTENTS])
    rows = np.concatenate([rows, -np.abs(rows[:1]), np.abs(rows[:1]), np.where(rows[:1] > 4, rows[:1], 0)])
    on_gpu = queue.upload(rows)
    for percentile in PERCENTILES if length < 1000 else (0.5, 90):
        with path(kernel):
            got = queue.download(kernels.winsorize(on_gpu, percentile, stream=queue))
        want = kernels.winsorize(rows, percentile)
        assert got.shape == want.shape and got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=1e-6, err_msg=str(percentile))


def infinities(kernel: str, queue: Any) -> None:
    inf = np.inf
    rows = np.array([[1, 2, inf, -inf], [inf, inf, inf, 0], [inf, 1, 1, 1], [-inf, -inf, 3, 4]], np.float32)
    got = rows
    for percentile in (0, 40, 50, 75, 100):
        with path(kernel):
            got = queue.download(kernels.winsorize(queue.upload(rows), percentile, stream=queue))
        np.testing.assert_allclose(got, kernels.winsorize(rows, percentile), atol=1e-6)
    np.testing.assert_allclose(got, [[0.1, 0.1, 1, 0], [1, 1, 1, 0], [1, 0.1, 0.1, 0.1], [0, 0, 0.1, 1]], atol=1e-6)


def bounds_and_axes(queue: Any) -> None:
    rows = filled("random", (2, 3, 5))
    got = queue.download(kernels.winsorize(queue.upload(rows), 60, 0.0, 2.5, stream=queue))
    np.testing.assert_allclose(got, kernels.winsorize(rows, 60, 0.0, 2.5), atol=3e-6)


def beyond_float32_counts(queue: Any) -> None:
    """2^24 + 3 entries: a count in float32 would lose the last."""
    row = np.random.default_rng(0).standard_normal((1, 2**24 + 3), np.float32)
    got = queue.download(kernels.winsorize(queue.upload(row), 37.5, stream=queue))
    np.testing.assert_allclose(got, kernels.winsorize(row, 37.5), atol=1e-6)


# ---- fuse_layers


def fusions(grids: str, size: Size, content: str, queue: Any) -> None:
    layers = GRIDS[grids]
    maps = filled(content, (2, sum(h * w for h, w in layers)))
    weights = np.random.default_rng(0).uniform(0, 0.2, (2, len(layers))).astype(np.float32)
    on_gpu = queue.upload(maps), layers, queue.upload(weights), size
    for interpolation in interpolations(content):
        for normalize in (False, True):
            want = kernels.fuse_layers(maps, layers, weights, size, interpolation, normalize)
            got = queue.download(kernels.fuse_layers(*on_gpu, interpolation, normalize, stream=queue))
            assert got.shape == want.shape and got.dtype == np.float32
            atol = 4 * rounding(want if normalize else maps)
            np.testing.assert_allclose(got, want, atol=atol, err_msg=f"{interpolation} {normalize}")


def resnet50(queue: Any) -> None:
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((1, sum(h * w for h, w in RESNET50))).astype(np.float32)
    weights = kernels.winsorize(rng.standard_normal((1, len(RESNET50))), 90)
    on_gpu = queue.upload(maps), RESNET50, queue.upload(weights), (224, 224)
    got = queue.download(kernels.fuse_layers(*on_gpu, normalize=True, stream=queue))
    want = kernels.fuse_layers(maps, RESNET50, weights, (224, 224), normalize=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# ---- what methods read of gradients, activations and logits


def importances(content: str, queue: Any) -> None:
    channels = [1, 7, 31, 32, 33, 600]
    alphas = filled(content, (3, sum(channels)))
    alphas[1, 8:39] -= alphas[1, 8:39].mean(dtype=np.float64)  # cancels but for rounding
    zero = [0, 1, 1e-6, 0, 2, 1e-3]
    for kind in kernels.AGGREGATIONS:
        with np.errstate(over="ignore"):
            wanted = kernels.layer_importance(alphas, channels, kind, zero)
        both = kernels.layer_importance(queue.upload(alphas), channels, kind, zero, stream=queue)
        for got, want in zip(map(queue.download, both), wanted, strict=True):
            assert got.shape == want.shape == (3, 6) and got.dtype == want.dtype == np.float32
            np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=kind)


def importance_of_nan(queue: Any) -> None:
    alphas = filled("random", (2, 40))
    alphas[1, 5] = np.nan
    for kind in kernels.AGGREGATIONS:
        both = kernels.layer_importance(queue.upload(alphas), [10, 30], kind, [2, 2], stream=queue)
        for got in map(queue.download, both):
            assert np.isnan(got).tolist() == [[False, False], [True, False]], kind


def scores(classes: int, content: str, queue: Any) -> None:
    logits, seeds = filled(content, (5, classes)), np.zeros((3, classes), np.float32)
    seeds[0, classes // 2] = 1
    seeds[1] = filled("random", (classes,), seed=1)
    seeds[2, [0, -1]] = 1, -1
    offset, weights = filled("random", (3,)), filled("random", (5,))
    on_gpu = queue.upload(logits), queue.upload(seeds)
    extras: list[dict[str, Any]] = [{}, {"offset": offset, "weights": weights}, {"offset": offset}]
    for kind in kernels.PROBABILITIES:
        if content == "huge" and kind == "logits":
            continue  # sums beyond float32
        for extra in extras:
            want = kernels.class_scores(logits, seeds, kind, **extra)
            sent = {name: queue.upload(array) for name, array in extra.items()}
            got = queue.download(kernels.class_scores(*on_gpu, kind, **sent, stream=queue))
            assert got.shape == want.shape == (3, 5) and got.dtype == want.dtype == np.float32
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=rounding(want), err_msg=f"{kind} {list(extra)}")


def channels(count: int, size: Size, content: str, queue: Any) -> None:
    activations = filled(content, (count, *size))
    on_gpu = queue.upload(activations)
    got = queue.download(kernels.channel_extremes(on_gpu, stream=queue))
    np.testing.assert_array_equal(got, kernels.channel_extremes(activations))
    index = np.random.default_rng(0).integers(0, count, 2 * count + 1).astype(np.int32)
    got = queue.download(kernels.take_channels(on_gpu, queue.upload(index), stream=queue))
    np.testing.assert_array_equal(got, activations[index])


# ---- from pictures to inputs


def pictures(size: Size, target: Size, queue: Any) -> None:
    """Bit by bit."""
    rng = np.random.default_rng(0)
    for channels, filter in itertools.product((1, 3), kernels.FILTERS):
        picture = rng.integers(0, 256, (*size, channels), dtype=np.uint8)
        shades = rng.uniform(0, 1, channels).tolist(), rng.uniform(0.1, 1, channels).tolist()
        for crop in ((0, 0, *target), (target[0] // 3, target[1] // 4, -(-target[0] // 2), -(-target[1] // 3))):
            for rows_first in (False, True):
                arguments = target, crop, *shades, filter, rows_first
                want = kernels.resize_picture(picture, *arguments)
                out = queue.empty(want.shape)
                kernels.resize_picture(queue.upload(picture), *arguments, out=out, stream=queue)
                np.testing.assert_array_equal(queue.download(out), want, err_msg=f"{channels} {filter} {crop}")


TABLE = [
    *(Row(f"mask_batch-{g}-{s}-{c}", partial(masks, g, s, c)) for g, s, c in PLACES),
    Row("mask_batch-below-float16", masks_below_float16),
    *(Row(f"mask_batch-{c}x{k}", partial(masks_of_many, c, k)) for c in (1, 3, 4, 5, 9) for k in (1, 4, 5, 33)),
    *(Row(f"accumulate_maps-{g}-{s}-{c}", partial(sums, g, s, c)) for g, s, c in PLACES),
    *(
        Row(f"accumulate_maps-{s}x{k}", partial(sums_of_many, s, k))
        for s, k in [(1, 1), (4, 31), (5, 33), (9, 111), (1, 989)]
    ),
    *(Row(f"winsorize-{n}-{p}", partial(rows_of, n, p)) for n in LENGTHS for p in ("short", "long")),
    *(Row(f"winsorize-infinity-{p}", partial(infinities, p)) for p in ("short", "long")),
    Row("winsorize-bounds", bounds_and_axes),
    Row("winsorize-2^24+3", beyond_float32_counts),
    *(
        Row(f"fuse_layers-{g}-{s}-{c}", partial(fusions, g, s, c))
        for g in GRIDS
        for s in [(1, 1), (7, 31), (32, 33), (111, 12)]
        for c in (CONTENTS if s == (7, 31) else ("random",))
    ),
    Row("fuse_layers-resnet50", resnet50),
    *(Row(f"layer_importance-{c}", partial(importances, c)) for c in CONTENTS),
    Row("layer_importance-nan", importance_of_nan),
    *(Row(f"class_scores-{n}-random", partial(scores, n, "random")) for n in (1, 2, 31, 1000)),
    *(Row(f"class_scores-33-{c}", partial(scores, 33, c)) for c in CONTENTS[1:]),
    *(
        Row(f"channels-{k}-{s}", partial(channels, k, s, "random"))
        for k, s in [(1, (1, 1)), (33, (7, 7)), (5, (31, 33))]
    ),
    *(Row(f"channels-3-{c}", partial(channels, 3, (4, 5), c)) for c in CONTENTS[1:]),
    *(
        Row(f"resize_picture-{s}-{t}", partial(pictures, s, t))
        for s, t in [
            ((1, 1), (1, 1)),
            ((7, 33), (31, 5)),
            ((40, 31), (40, 12)),
            ((3, 5), (32, 33)),
            ((99, 64), (9, 64)),
        ]
    ),
]


def winsorized_and_fused(queue: Any) -> list[np.ndarray]:
    """Results of the two kernels whose threads share most, on inputs that need several blocks, strides and chunks."""
    rng = np.random.default_rng(0)
    rows = queue.upload(filled("random", (5, 3001)))
    maps, weights = filled("random", (3, sum(h * w for h, w in GRIDS["ragged"]))), rng.random((3, 5), np.float32)
    found = []
    for kernel in ("short", "long"):
        with path(kernel):
            found.append(kernels.winsorize(rows, 70, stream=queue))
    layers = queue.upload(maps), GRIDS["ragged"], queue.upload(weights), (50, 70)
    found.append(kernels.fuse_layers(*layers, normalize=True, stream=queue))
    return [queue.download(a) for a in found]


def everything(queue: Any) -> list[np.ndarray]:
    """Results of every kernel, on such inputs."""
    rng = np.random.default_rng(0)
    image, activations = filled("random", (5, 45, 40)), filled("random", (40, 6, 7))
    scores, rows = filled("random", (5, 40)), filled("random", (5, 3001))
    found = [kernels.mask_batch(queue.upload(image), queue.upload(activations), "minmax", stream=queue)]
    total = queue.upload(np.zeros((5, 45, 40), np.float32))
    kernels.accumulate_maps(total, queue.upload(scores), queue.upload(activations), stream=queue)
    found.append(total)
    found += kernels.layer_importance(queue.upload(rows), [1, 2000, 1000], "l2", stream=queue)
    found.append(kernels.class_scores(queue.upload(rows), queue.upload(rows), stream=queue))
    found.append(kernels.channel_extremes(queue.upload(activations), stream=queue))
    index = queue.upload(np.arange(40, dtype=np.int32)[::-1].copy())
    found.append(kernels.take_channels(queue.upload(activations), index, stream=queue))
    kernels.check_finite(queue.upload(rows), stream=queue)
    picture = queue.upload(rng.integers(0, 256, (45, 40, 3), dtype=np.uint8))
    found.append(kernels.resize_picture(picture, (30, 60), (5, 8, 21, 33), [0.5] * 3, [0.2] * 3, stream=queue))
    return [queue.download(f) for f in found] + winsorized_and_fused(queue)
