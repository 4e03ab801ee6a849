"""The arithmetic of maps as ONNX operators. Maps are (batch, h, w), or (batch, layers, h w) in stacks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..export.tape import Tape
from ..kernels import upsample

Size = tuple[int, int]


def split(tape: Tape, value: ir.Value, widths: Sequence[int]) -> list[ir.Value]:
    """The columns of (batch, sum of widths), layer by layer."""
    if len(widths) == 1:
        return [value]
    return list(tape.Split(value, list(widths), axis=1, outputs=len(widths)))


def minmax(tape: Tape, maps: ir.Value) -> ir.Value:
    """(x - min) / (max - min) over the last two axes; a constant map becomes zeros."""
    shifted = tape.Sub(maps, tape.ReduceMin(maps, [-2, -1], keepdims=1))
    span = tape.ReduceMax(shifted, [-2, -1], keepdims=1)
    return tape.Div(shifted, tape.Where(tape.Greater(span, tape.floats(0)), span, tape.floats(1)))


def scale(tape: Tape, maps: ir.Value) -> ir.Value:
    """(x - min) / (1e-7 + max(x - min)) over the last two axes, as the baselines scale."""
    shifted = tape.Sub(maps, tape.ReduceMin(maps, [-2, -1], keepdims=1))
    return tape.Div(shifted, tape.Add(tape.ReduceMax(shifted, [-2, -1], keepdims=1), tape.floats(1e-7)))


def resize(tape: Tape, maps: ir.Value, path: Sequence[Size]) -> ir.Value:
    """(..., h, w) -> (..., H, W), bilinearly through the sizes of `path`, as two products with constant matrices: any
    engine computes them alike, while engines' own Resize differ in what they accept.
    """
    rows, columns = (np.eye(path[0][axis], dtype=np.float32) for axis in (0, 1))
    for size in path[1:]:  # a matrix is resized as a map: its columns are those of the whole resizing
        rows = upsample(rows[None], (size[0], rows.shape[1]))[0]
        columns = upsample(columns[None], (size[1], columns.shape[1]))[0]
    if path[0][0] != path[-1][0]:
        maps = tape.MatMul(tape.floats(rows), maps)
    return maps if path[0][1] == path[-1][1] else tape.MatMul(maps, tape.floats(columns.T))


def within_range(tape: Tape, resized: ir.Value, maps: ir.Value) -> ir.Value:
    """Resized maps, clipped to the range of what they were: a constant map stays constant, where min-max would draw the
    rounding.
    """
    low, high = tape.ReduceMin(maps, [-2, -1], keepdims=1), tape.ReduceMax(maps, [-2, -1], keepdims=1)
    return tape.Min(tape.Max(resized, low), high)


def combined(tape: Tape, layers: Sequence[tuple[ir.Value, Size]], size: Size) -> ir.Value:
    """Maps (batch, h, w) of layers -> (batch, *size), rectified, scaled, resized, averaged and scaled again."""
    resized = [tape.Relu(resize(tape, scale(tape, tape.Relu(m)), [grid, size])) for m, grid in layers]
    total = resized[0]
    for other in resized[1:]:
        total = tape.Add(total, other)
    return scale(tape, total if len(resized) == 1 else tape.Mul(total, tape.floats(1 / len(resized))))


def sum_channels(tape: Tape, value: ir.Value) -> ir.Value:
    """(batch, K, h, w) -> (batch, h, w)."""
    return tape.ReduceSum(value, [1], keepdims=0)
