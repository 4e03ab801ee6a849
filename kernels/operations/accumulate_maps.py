"""Sums of masks weighed by their scores: cuda/accumulate_maps.cu."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..call import Stream, prepared
from ..checks import expect, expect_choice, expect_sides
from ..gpu.queue import FULL, NOTHING, THREADS, Argument, Launch, blocks, int32s, is_wide, strips
from .gates import GATES, gate, gate_extremes, refuse_gates_on_gpu, within_range
from .resizing import INTERPOLATIONS, resize_tables, upsample

MAPS_PER_CHUNK = 32  # at most: short float32 sums are more accurate
PARTIAL_SUMS = 2**21  # the most partial sums in memory, if there is more than one chunk


def accumulate_maps(
    total: Any,
    scores: Any,
    activations: Any,
    kind: str = "tanh",
    interpolation: str = "bilinear",
    gates: Any = None,
    *,
    stream: Stream = None,
) -> None:
    """total[s] += sum_k scores[s, k] gate(up(activations[k])), in place. Every call sums in the same order.

    total (S, H, W), scores (S, K), activations (K, h, w), all float32 and finite. kind: a name in GATES. gates
    (K, H, W) float32: the gates that mask_batch computed, so that they are not computed again; NumPy only. ValueError
    for what does not fit; DeviceError.
    """
    refuse_gates_on_gpu("accumulate_maps", gates, total, scores, activations)
    with prepared("accumulate_maps", stream, "total", total=total, scores=scores, activations=activations) as (
        queue,
        (total, scores, activations),
    ):
        expect_choice("accumulate_maps", "gate", kind, GATES)
        expect_choice("accumulate_maps", "interpolation", interpolation, INTERPOLATIONS)
        expect("accumulate_maps", "total", total, ("S", "H", "W"))
        expect("accumulate_maps", "activations", activations, ("K", "h", "w"))
        expect("accumulate_maps", "scores", scores, (total.shape[0], activations.shape[0]))
        expect_sides("accumulate_maps", total=total.shape[1:], activations=activations.shape[1:])
        if gates is not None:
            expect("accumulate_maps", "gates", gates, (activations.shape[0], *total.shape[1:]))
        if queue is None:
            _by_numpy(total, scores, activations, kind, interpolation, gates)
            return
        (count, h, w), (rows, height, width) = activations.shape, total.shape
        if count == 0 or rows == 0:
            return
        sides = int32s("accumulate_maps", scores=rows, maps=count, height=height, width=width, h=h, w=w)
        int32s("accumulate_maps", pixels=height * width, pixels_of_a_map=h * w)
        # the chunks depend only on the shapes, so every GPU and every alignment gives the same bits
        entries = math.prod(total.shape)
        filling = -(-FULL // strips((height, width), 4))
        wanted = min(count, max(-(-count // MAPS_PER_CHUNK), filling))
        chunks = min(wanted, max(1, PARTIAL_SUMS // entries))
        per_chunk = -(-count // chunks)
        chunks = -(-count // per_chunk)
        vector = 4 if is_wide(4, width, total, activations) else 1
        tables = resize_tables(queue, (h, w), (height, width), interpolation)
        extremes = gate_extremes(queue, kind, activations, tables)
        partial = queue.empty((chunks, *total.shape)) if chunks > 1 else NOTHING
        kernel = "accumulate_maps_wide" if vector > 1 else "accumulate_maps"
        modes = np.int32(GATES.index(kind)), np.int32(per_chunk), np.int32(chunks)
        arguments: tuple[Argument, ...] = (scores, activations, *tables, extremes, total, partial, *sides, *modes)
        grid = strips((height, width), vector), blocks(chunks, 1, 1)
        queue.launch(Launch("accumulate_maps", kernel, grid, THREADS, 0, arguments))
        if chunks > 1:
            arguments = (total, partial, np.int64(entries), np.int32(chunks))
            queue.launch(
                Launch("accumulate_maps", "add_partials", (blocks(entries, THREADS), 1), THREADS, 0, arguments)
            )


def _by_numpy(
    total: np.ndarray,
    scores: np.ndarray,
    activations: np.ndarray,
    kind: str,
    interpolation: str,
    gates: np.ndarray | None,
) -> None:
    if kind == "identity":  # resizing is linear
        total += upsample(np.einsum("sk,khw->shw", scores, activations), total.shape[1:], interpolation)
        return
    if gates is None:
        gates = upsample(activations, total.shape[1:], interpolation)
        if kind == "minmax" and gates is not activations:
            within_range(gates, activations)
        gates = gate(gates, kind)
    total += np.einsum("sk,khw->shw", scores, gates)
