"""The phases of a map at a stride, x[s q + r] for each r: put together and taken apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import onnx_ir as ir

from ..tape import Tape


def joined(
    op: Tape, phases: Sequence[ir.Value], channels: int, count: Sequence[int], strides: Sequence[int]
) -> ir.Value:
    """Phases (S, C, *count), those of the first row first -> (S, C, *(count * strides)).

    Columns of one number beside each other, then rows below each other. In ONNX Runtime DepthToSpace takes three times
    as long; a transposition does, too, on several threads, which then write into the same cache lines.
    """
    (height, width), (down, across) = count, strides
    columns = [op.Reshape(phase, [-1, 1]) for phase in phases]
    rows = [op.Concat(*columns[i * across : (i + 1) * across], axis=1) for i in range(down)]
    rows = [op.Reshape(row, [-1, 1, width * across]) for row in rows]
    return op.Reshape(op.Concat(*rows, axis=1), [-1, channels, height * down, width * across])


def taken_apart(
    op: Tape, value: ir.Value, channels: int, count: Sequence[int], strides: Sequence[int]
) -> dict[tuple[int, ...], ir.Value]:
    """The inverse of `joined`: (S, C, *(count * strides)) -> each phase (row, column), (S, C, *count)."""
    (height, width), (down, across) = count, strides
    rows = op.Reshape(value, [-1, channels, height, down, width * across])
    rows = op.Reshape(op.Transpose(rows, perm=[0, 3, 1, 2, 4]), [-1, down * channels * height * width, across])
    columns = op.Reshape(op.Transpose(rows, perm=[0, 2, 1]), [-1, across * down * channels, height, width])
    parts = op.Split(columns, [channels] * (across * down), outputs=across * down, axis=1)
    order = itertools.product(range(across), range(down))
    return {(r0, r1): part for (r1, r0), part in zip(order, parts, strict=True)}


def interleaved(op: Tape, phases: ir.Value, channels: int, count: Sequence[int], strides: Sequence[int]) -> ir.Value:
    """(S, C, *strides, *count), channels and phases possibly one axis -> (S, C, *(count * strides)): x[s q + r] =
    phases[r, q].
    """
    rank = len(count)
    if rank == 2 and strides[0] == strides[1]:
        merged = op.Reshape(phases, [-1, channels * strides[0] * strides[1], *count])
        return op.DepthToSpace(merged, blocksize=strides[0], mode="CRD")
    split = op.Reshape(phases, [-1, channels, *strides, *count])
    woven = op.Transpose(split, perm=[0, 1, *(axis for i in range(rank) for axis in (2 + rank + i, 2 + i))])
    return op.Reshape(woven, [-1, channels, *(n * s for n, s in zip(count, strides, strict=True))])
