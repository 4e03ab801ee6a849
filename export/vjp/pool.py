"""Rules for pooling windows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx_ir as ir

from ..autodiff import vjp
from ..tape import attribute, static_dims
from .conv import crop_or_pad, data_gradient, ones_kernel, window_of
from .phases import interleaved, joined, taken_apart
from .shape import pad_zeros


def window_counts(window, size, out, include_pad, declared_after):
    """The divisor of each average pooling window, the number of elements that it counts: (*out) float64.

    ONNX and PyTorch count the declared padding if `include_pad`, but never the positions after it that ceil_mode adds.
    """
    per_axis = []
    for i, n in enumerate(size):
        starts = np.arange(out[i])[:, None] * window.strides[i] - window.before[i]
        positions = starts + np.arange(window.kernel[i])[None, :] * window.dilations[i]
        low, high = (-window.before[i], n + declared_after[i]) if include_pad else (0, n)
        per_axis.append(((positions >= low) & (positions < high)).sum(axis=1).astype(np.float64))
    counts = per_axis[0]
    for c in per_axis[1:]:
        counts = counts[..., None] * c
    return counts


@vjp("AveragePool")
def average_pool(op, node, g):
    """dx = g / count, spread over each window."""
    x = node.inputs[0]
    window = window_of(node, attribute(node, "kernel_shape"))
    channels, *size = static_dims(x)
    out = static_dims(node.outputs[0])[1:]
    if attribute(node, "auto_pad", "NOTSET") == "NOTSET":
        declared_after = list(attribute(node, "pads", [0] * 2 * len(size)))[len(size) :]
    else:
        declared_after = [max(a, 0) for a in window.after]
    counts = window_counts(window, size, out, attribute(node, "count_include_pad", 0), declared_after)
    shared = op.Mul(g, op.floats(1 / counts[None, None]))
    unit = all(d == 1 for d in window.dilations)
    if unit and window.kernel == window.strides and not any(window.before) and max(window.after) <= 0:
        return (_repeated(op, shared, channels, window, size, out),)
    kernel = ones_kernel(op, channels, window.kernel)
    return (data_gradient(op, shared, kernel, channels, window, size, out),)


def _repeated(op, value, channels, window, size, out):
    """Each element fills its own window; windows tile the input."""
    have = [o * k for o, k in zip(out, window.kernel, strict=True)]
    if len(size) == 2:  # fifty times as fast as Expand in ONNX Runtime
        scales = op.constant(np.array([1, 1, *window.kernel], np.float32))
        modes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        value = op.Resize(value, None, scales, **modes)
    else:
        split = [d for o in out for d in (o, 1)]
        filled = [d for o, k in zip(out, window.kernel, strict=True) for d in (o, k)]
        value = op.Expand(op.Reshape(value, [-1, channels, *split]), [1, channels, *filled])
        value = op.Reshape(value, [-1, channels, *have])
    return crop_or_pad(op, value, have, [0] * len(size), [n - h for n, h in zip(size, have, strict=True)])


@vjp("MaxPool")
def max_pool(op, node, g):
    """dx = g at the first maximum of each window in row-major order, as PyTorch does."""
    if isinstance(g, tuple):
        if any(part is not None for part in g[1:]):
            return (None,)
        g = g[0]
    x, y = node.inputs[0], node.outputs[0]
    window = window_of(node, attribute(node, "kernel_shape"))
    channels, *size = static_dims(x)
    out = static_dims(y)[1:]
    if not x.dtype.is_floating_point():  # quantised numbers
        x, y = (op.Cast(v, to=ir.DataType.from_numpy(op.dtype)) for v in (x, y))
    candidates = _candidates(op, x, channels, window, size, out)
    pieces, free = {}, None
    for position, (offset, candidate) in enumerate(candidates.items()):
        hit = op.Equal(candidate, y)
        first = hit if free is None else op.And(hit, free)
        if position < len(candidates) - 1:
            free = op.Not(hit) if free is None else op.And(free, op.Not(hit))
        pieces[offset] = op.mask(first, g)
    return (_overlay(op, pieces, channels, window, size, out),)


def _candidates(op, x, channels, window, size, out):
    """For each offset in a window, in row-major order, the elements (S, C, *out) that lie there in every window."""
    rank, strides = len(size), window.strides
    by_phases = rank == 2 and max(strides) > 1
    reach = [s * (o - 1) + e for s, o, e in zip(strides, out, window.extent, strict=True)]
    count = [-(-n // s) for n, s in zip(reach, strides, strict=True)]
    have = [n * s for n, s in zip(count, strides, strict=True)] if by_phases else reach
    after = [h - n - b for h, n, b in zip(have, size, window.before, strict=True)]
    padded = _pad_lowest(op, x, size, window.before, after)
    phases = taken_apart(op, padded, channels, count, strides) if by_phases else {(0,) * rank: padded}
    steps = [1] * rank if by_phases else list(strides)

    def at(offset):
        r = tuple(o % s for o, s in zip(offset, strides, strict=True)) if by_phases else (0,) * rank
        starts = [o // s for o, s in zip(offset, strides, strict=True)] if by_phases else list(offset)
        ends = [o + s * (n - 1) + 1 for o, s, n in zip(starts, steps, out, strict=True)]
        if by_phases and starts == [0, 0] and list(out) == count:
            return phases[r]
        return op.Slice(phases[r], starts, ends, list(range(2, 2 + rank)), steps)

    offsets = itertools.product(*(range(0, e, d) for e, d in zip(window.extent, window.dilations, strict=True)))
    return {offset: at(offset) for offset in offsets}


def _pad_lowest(op, x, size, before, after):
    """x padded with the lowest number, so that padding is never the maximum; a negative amount crops."""
    if any(a < 0 for a in after):
        x = crop_or_pad(op, x, size, [0] * len(size), [min(a, 0) for a in after])
    before, after = list(before), [max(a, 0) for a in after]
    if not any(before + after):
        return x
    return op.Pad(x, [0, 0, *before, 0, 0, *after], op.floats(np.finfo(op.dtype).min))


def _overlay(op, pieces, channels, window, size, out):
    """Sums pieces (S, C, *out), each at its window offset, into (S, C, *size).

    Offset = stride m + r on each axis: pieces of equal r are shifted by m and added, then the phases r put together.
    """
    rank, strides = len(size), window.strides
    taps = [(e - 1) // s for e, s in zip(window.extent, strides, strict=True)]
    phases = {}
    for offset, piece in pieces.items():
        m = [o // s for o, s in zip(offset, strides, strict=True)]
        r = tuple(o % s for o, s in zip(offset, strides, strict=True))
        shifted = pad_zeros(op, piece, 2 + rank, {2 + i: (m[i], taps[i] - m[i]) for i in range(rank)})
        phases[r] = op.Add(phases[r], shifted) if r in phases else shifted
    count = [o + t for o, t in zip(out, taps, strict=True)]
    dx = phases[(0,) * rank] if max(strides) == 1 else _put_together(op, phases, channels, count, strides)
    have = [n * s for n, s in zip(count, strides, strict=True)]
    after = [n + b - h for n, b, h in zip(size, window.before, have, strict=True)]
    return crop_or_pad(op, dx, have, [-b for b in window.before], after)


def _put_together(op, phases, channels, count, strides):
    """phases: by r, (S, C, *count); those that are absent are zero."""
    missing = math.prod(strides) > len(phases)
    empty = op.Mul(next(iter(phases.values())), op.floats(0)) if missing else None
    parts = [phases.get(r, empty) for r in itertools.product(*(range(s) for s in strides))]
    if len(count) == 2:
        return joined(op, parts, channels, count, strides)
    stacked = op.Concat(*(op.Unsqueeze(part, [2]) for part in parts), axis=2)
    return interleaved(op, stacked, channels, count, strides)


@vjp("LpPool")
def lp_pool(op, node, g):
    """y = (sum_window |x|^p)^(1/p): dx = sign(x) |x|^(p-1) times the sum of g / y^(p-1) over the windows; 0 where y is
    0.
    """
    x, y, p = node.inputs[0], node.outputs[0], attribute(node, "p", 2)
    window = window_of(node, attribute(node, "kernel_shape"))
    channels, *size = static_dims(x)
    if p == 1:
        return (op.Mul(op.Sign(x), _spread(op, g, channels, window, size, static_dims(y)[1:])),)
    power = op.Pow(op.Max(y, op.floats(1e-30)), op.floats(p - 1))
    spread = _spread(op, op.Div(g, power), channels, window, size, static_dims(y)[1:])
    slope = x if p == 2 else op.Mul(op.Sign(x), op.Pow(op.Abs(x), op.floats(p - 1)))
    return (op.Mul(slope, spread),)


def _spread(op, value, channels, window, size, out):
    """(S, C, *size): the sum of value over the windows that hold each element."""
    return data_gradient(op, value, ones_kernel(op, channels, window.kernel), channels, window, size, out)


@vjp("GlobalLpPool")
def global_lp_pool(op, node, g):
    """y = (sum |x|^p)^(1/p) of each channel: dx = g sign(x) |x|^(p-1) / y^(p-1); 0 where y is 0."""
    x, y, p = node.inputs[0], node.outputs[0], attribute(node, "p", 2)
    power = op.Pow(op.Max(y, op.floats(1e-30)), op.floats(p - 1))
    slope = x if p == 2 else op.Mul(op.Sign(x), op.Pow(op.Abs(x), op.floats(p - 1)))
    return (op.Mul(slope, op.Div(g, power)),)
