"""Masked images of the Score-CAM family: cuda/mask_batch.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..call import Stream, prepared
from ..checks import expect, expect_choice, expect_sides
from ..gpu.queue import FULL, THREADS, Launch, blocks, int32s, is_wide, strips
from .gates import GATES, gate, gate_extremes, refuse_gates_on_gpu, within_range
from .resizing import INTERPOLATIONS, resize_tables, resized_bands, resized_columns

MAPS_PER_BLOCK = 16  # at most; the maps of a block share the image's pixels and the resize taps


def mask_batch(
    image: Any,
    activations: Any,
    kind: str = "tanh",
    interpolation: str = "bilinear",
    out: Any = None,
    gates: Any = None,
    *,
    stream: Stream = None,
) -> Any:
    """masked[k, c] = image[c] * gate(up(activations[k])).

    image (C, H, W) float32; activations (K, h, w) float32, finite -> masked (K, C, H, W): a new float32 array, or
    `out`, float32 or float16. gates (K, H, W) float32, if given, receives gate(up(activations)); NumPy only.
    ValueError for what does not fit; DeviceError.
    """
    refuse_gates_on_gpu("mask_batch", gates, image, activations, out)
    with prepared("mask_batch", stream, "out", image=image, activations=activations, out=out) as (
        queue,
        (image, activations, out),
    ):
        expect_choice("mask_batch", "gate", kind, GATES)
        expect_choice("mask_batch", "interpolation", interpolation, INTERPOLATIONS)
        expect("mask_batch", "image", image, ("C", "H", "W"))
        expect("mask_batch", "activations", activations, ("K", "h", "w"))
        expect_sides("mask_batch", image=image.shape[1:], activations=activations.shape[1:])
        if out is not None:
            expect("mask_batch", "out", out, (activations.shape[0], *image.shape), ("float32", "float16"))
        if gates is not None:
            expect("mask_batch", "gates", gates, (activations.shape[0], *image.shape[1:]))
        if queue is None:
            return _by_numpy(image, activations, kind, interpolation, out, gates)
        (count, h, w), (channels, height, width) = activations.shape, image.shape
        out = queue.empty((count, *image.shape)) if out is None else out
        if count == 0 or channels == 0:
            return out
        sides = int32s("mask_batch", maps=count, channels=channels, height=height, width=width, h=h, w=w)
        int32s("mask_batch", pixels=height * width, pixels_of_a_map=h * w)
        vector = 4 if is_wide(4, width, image, out) else 1
        tables = resize_tables(queue, (h, w), (height, width), interpolation)
        extremes = gate_extremes(queue, kind, activations, tables)
        kernel = f"mask_batch_{'f16' if out.dtype == np.float16 else 'f32'}{'_wide' if vector > 1 else ''}"
        across = strips((height, width), vector)
        per_block = max(1, min(MAPS_PER_BLOCK, count * across // FULL))
        modes = np.int32(GATES.index(kind)), np.int32(per_block)
        arguments = (image, activations, *tables, extremes, out, *sides, *modes)
        grid = across, blocks(count, per_block, 1)
        queue.launch(Launch("mask_batch", kernel, grid, THREADS, 0, arguments))
        return out


def _by_numpy(
    image: np.ndarray,
    activations: np.ndarray,
    kind: str,
    interpolation: str,
    out: np.ndarray | None,
    gates: np.ndarray | None,
) -> np.ndarray:
    count, (height, width) = len(activations), image.shape[1:]
    out = np.empty((count, *image.shape), np.float32) if out is None else out
    gates = np.empty((count, height, width), np.float32) if gates is None else gates
    local = kind != "minmax"  # minmax needs the whole resized map first
    for rows in resized_bands(resized_columns(activations, width, interpolation), gates, interpolation):
        if local:
            gate(gates[:, rows], kind, out=gates[:, rows])
            np.multiply(image[:, rows], gates[:, None, rows], out=out[:, :, rows])
    if local:
        return out
    if np.may_share_memory(image, out):
        image = image.copy()
    for k in range(count):  # map after map: one fits the cache
        own = within_range(gates[k : k + 1], activations[k : k + 1])
        np.multiply(image, gate(own, kind, out=own), out=out[k])
    return out
