"""Rules for convolutions. A data gradient is a Conv of the cotangent wherever that is possible: ConvTranspose is slow.

The kernels are rearranged by nodes on the weights themselves, which every runtime folds when it loads the program, so
that a bundle holds each weight once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..autodiff import vjp
from ..tape import Tape, attribute, static_dims, weight_dims
from .phases import interleaved, joined
from .shape import pad_zeros

_MOST_STRIDE = 2  # of a convolution whose data gradient is computed phase by phase: its phases are stride^2


@dataclass(frozen=True)
class Window:
    """Geometry of a sliding window over spatial axes, every field one number per axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def extent(self) -> tuple[int, ...]:
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True))


def window_of(node: ir.Node, kernel: Sequence[int]) -> Window:
    """Geometry of a Conv or pooling node, with `auto_pad` resolved against the sizes of its input and output.

    `after` may exceed the declared padding where ceil_mode lets the last window hang over.
    """
    rank = len(kernel)
    strides = tuple(attribute(node, "strides", [1] * rank))
    dilations = tuple(attribute(node, "dilations", [1] * rank))
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    x = node.inputs[0]
    assert x is not None
    size, out = static_dims(x)[1:], static_dims(node.outputs[0])[1:]
    needed = [(o - 1) * s + e - n for o, s, e, n in zip(out, strides, extent, size, strict=True)]
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode == "SAME_UPPER":
        before = [max(p, 0) // 2 for p in needed]
    elif mode == "SAME_LOWER":
        before = [(max(p, 0) + 1) // 2 for p in needed]
    elif mode == "VALID":
        before = [0] * rank
    else:
        before = list(attribute(node, "pads", [0] * 2 * rank))[:rank]
    after = [p - b for p, b in zip(needed, before, strict=True)]  # negative where the last input columns are unused
    return Window(tuple(kernel), strides, dilations, tuple(before), tuple(after))


def crop_or_pad(
    op: Tape, value: ir.Value, sizes: Sequence[int], before: Sequence[int], after: Sequence[int]
) -> ir.Value:
    """Pads the spatial axes (sizes known) with zeros; a negative amount crops."""
    rank = len(sizes)
    if any(p < 0 for p in (*before, *after)):
        starts = [max(-b, 0) for b in before]
        ends = [n - max(-a, 0) for n, a in zip(sizes, after, strict=True)]
        value = op.Slice(value, starts, ends, list(range(2, 2 + rank)))
    return pad_zeros(
        op, value, 2 + rank, {2 + i: (max(b, 0), max(a, 0)) for i, (b, a) in enumerate(zip(before, after, strict=True))}
    )


def data_gradient(
    op: Tape, g: ir.Value, weight: ir.Value, group: int, window: Window, size: Sequence[int], out: Sequence[int]
) -> ir.Value:
    """Cotangent (S, C, *size) of a convolution's input from that of its output, g (S, K, *out); weight (K, C/group,
    *kernel).
    """
    if all(s == 1 for s in window.strides):
        return _unit_stride(op, g, weight, group, window, out)
    if len(size) == 2 and all(d == 1 for d in window.dilations):
        exact = window.strides[0] == window.strides[1] <= min(min(window.kernel), _MOST_STRIDE)
        divides = all(k % s == 0 for k, s in zip(window.kernel, window.strides, strict=True))
        by = _phase_by_phase if exact and not divides else _sub_pixel
        return by(op, g, weight, group, window, size, out)
    return _conv_transpose(op, g, weight, group, window, size)


def _flipped(op: Tape, value: ir.Value, axes: Sequence[int], sizes: Sequence[int]) -> ir.Value:
    """Reverses the order along `axes`, whose sizes are given."""
    axes = [a for a, n in zip(axes, sizes, strict=True) if n != 1]
    return op.Slice(value, [-1] * len(axes), [-(2**31)] * len(axes), axes, [-1] * len(axes)) if axes else value


def _swapped(op, weight, group, filters, per_group, kernel):
    """The flipped kernel (K, C/group, *kernel), its input and output channels swapped within each group."""
    flipped = _flipped(op, weight, range(2, 2 + len(kernel)), kernel)
    if group == 1:
        return op.Transpose(flipped, perm=[1, 0, *range(2, 2 + len(kernel))])
    if per_group == 1 and filters == group:
        return flipped
    blocks = op.Reshape(flipped, [group, filters // group, per_group, *kernel])
    blocks = op.Transpose(blocks, perm=[0, 2, 1, *range(3, 3 + len(kernel))])
    return op.Reshape(blocks, [group * per_group, filters // group, *kernel])


def _unit_stride(op, g, weight, group, window, out):
    """Conv of g with the flipped kernel, its input and output channels swapped within each group."""
    filters, per_group, *kernel = weight_dims(weight)
    swapped = _swapped(op, weight, group, filters, per_group, kernel)
    before = [e - 1 - p for e, p in zip(window.extent, window.before, strict=True)]
    after = [e - 1 - p for e, p in zip(window.extent, window.after, strict=True)]
    if min(*before, *after) < 0:
        crop_before, crop_after = [min(p, 0) for p in before], [min(p, 0) for p in after]
        g = crop_or_pad(op, g, out, crop_before, crop_after)
        before, after = [max(p, 0) for p in before], [max(p, 0) for p in after]
    return op.Conv(
        g, swapped, group=group, kernel_shape=kernel, pads=[*before, *after], dilations=list(window.dilations)
    )


def _phase_by_phase(op, g, weight, group, window, size, out):
    """A unit-stride Conv for every phase of the output, with exactly the taps that the phase has; interleaved, they are
    the cotangent.

    For i = s j + e: i + before = s q + r with q = j + q0, so dx[i] = sum_m W[s m + r] g[j + q0 - m].
    """
    filters, per_group, *kernel = weight_dims(weight)
    stride = window.strides[0]
    count = [-(-n // stride) for n in size]

    def along(axis: int) -> list[tuple[int, int, int, int]]:
        """Of each phase: r, its number of taps, padding before and after."""
        phases = []
        for e in range(stride):
            q0, r = divmod(e + window.before[axis], stride)
            taps = -(-(kernel[axis] - r) // stride)
            before = taps - 1 - q0
            phases.append((r, taps, before, count[axis] + taps - 1 - before - out[axis]))
        return phases

    parts = []
    for r0, m0, *pads0 in along(0):
        for r1, m1, *pads1 in along(1):
            taps = op.Slice(weight, [r0, r1], kernel, [2, 3], [stride, stride])
            before, after = zip(pads0, pads1, strict=True)
            cut = g
            if min(*before, *after) < 0:
                cut = crop_or_pad(op, g, out, [min(p, 0) for p in before], [min(p, 0) for p in after])
            pads = [max(p, 0) for p in (*before, *after)]
            swapped = _swapped(op, taps, group, filters, per_group, [m0, m1])
            parts.append(op.Conv(cut, swapped, group=group, kernel_shape=[m0, m1], pads=pads))
    dx = joined(op, parts, group * per_group, count, window.strides)
    have = [n * stride for n in count]
    return crop_or_pad(op, dx, have, [0, 0], [n - h for n, h in zip(size, have, strict=True)])


def _sub_pixel(op, g, weight, group, window, size, out):
    """One unit-stride Conv computes every output phase as channels; interleaving the phases gives the cotangent.

    With u = i + before = s q + r: dx[u] = sum_m W[s m + r] g[q - m]. Phases r >= kernel are zero and not computed.
    """
    filters, per_group, *kernel = weight_dims(weight)
    channels = group * per_group
    strides, before = window.strides, window.before
    phases = [min(k, s) for k, s in zip(kernel, strides, strict=True)]
    taps = [-(-k // s) for k, s in zip(kernel, strides, strict=True)]
    weight = pad_zeros(op, weight, 4, {2 + i: (0, taps[i] * phases[i] - kernel[i]) for i in (0, 1)})
    blocks = op.Reshape(weight, [group, filters // group, per_group, taps[0], phases[0], taps[1], phases[1]])
    blocks = op.Transpose(blocks, perm=[0, 2, 4, 6, 1, 3, 5])
    kernels = op.Reshape(
        _flipped(op, blocks, (5, 6), taps), [channels * phases[0] * phases[1], filters // group, *taps]
    )

    first = [b // s for b, s in zip(before, strides, strict=True)]
    last = [-(-(n + b) // s) for n, b, s in zip(size, before, strides, strict=True)]
    count = [q1 - q0 for q0, q1 in zip(first, last, strict=True)]
    pad_before = [m - 1 - q0 for m, q0 in zip(taps, first, strict=True)]
    pad_after = [n - o - b + m - 1 for n, o, b, m in zip(count, out, pad_before, taps, strict=True)]
    if min(*pad_before, *pad_after) < 0:
        g = crop_or_pad(op, g, out, [min(p, 0) for p in pad_before], [min(p, 0) for p in pad_after])
        pad_before, pad_after = [max(p, 0) for p in pad_before], [max(p, 0) for p in pad_after]
    y = op.Conv(g, kernels, group=group, kernel_shape=taps, pads=[*pad_before, *pad_after])

    if phases == [1, 1]:
        dx = _zero_insert(op, y, channels, count, strides)
    elif phases == list(strides):
        dx = interleaved(op, y, channels, count, strides)
    else:
        y = op.Reshape(y, [-1, channels, *phases, *count])
        y = pad_zeros(op, y, 6, {2: (0, strides[0] - phases[0]), 3: (0, strides[1] - phases[1])})
        dx = interleaved(op, y, channels, count, strides)
    have = [n * s for n, s in zip(count, strides, strict=True)]
    crop = [b - q0 * s for b, q0, s in zip(before, first, strides, strict=True)]
    return crop_or_pad(op, dx, have, [-c for c in crop], [n + c - h for n, c, h in zip(size, crop, have, strict=True)])


def _zero_insert(op, value, channels, count, strides):
    """Spreads (S, C, *count) to every stride-th row and column: each row times a 0/1 matrix, several times faster than
    Pad.
    """
    width = count[1] * strides[1]
    spread = np.zeros((count[1], strides[0] * width))
    spread[np.arange(count[1]), np.arange(count[1]) * strides[1]] = 1
    rows = op.MatMul(op.Reshape(value, [-1, count[1]]), op.floats(spread))
    return op.Reshape(rows, [-1, channels, count[0] * strides[0], width])


def _conv_transpose(op, g, weight, group, window, size):
    """The general case: ConvTranspose, which is defined as the data gradient, cropped or padded to the input's size."""
    full = op.ConvTranspose(
        g,
        weight,
        group=group,
        kernel_shape=list(window.kernel),
        strides=list(window.strides),
        dilations=list(window.dilations),
    )
    have = [n + b + a for n, b, a in zip(size, window.before, window.after, strict=True)]
    return crop_or_pad(op, full, have, [-b for b in window.before], [-a for a in window.after])


@vjp("Conv")
def conv(op, node, g):
    """dx = the data gradient."""
    x, weight = node.inputs[:2]
    if op.wants(weight):
        return (None, None)
    window = window_of(node, list(weight_dims(weight)[2:]))
    size, out = static_dims(x)[1:], static_dims(node.outputs[0])[1:]
    return (data_gradient(op, g, weight, attribute(node, "group", 1), window, size, out), None, None)


@vjp("ConvTranspose")
def conv_transpose(op, node, g):
    """dx = Conv of g with the same kernel, strides, dilations and padding."""
    x, weight = node.inputs[:2]
    if (
        op.wants(weight)
        or attribute(node, "auto_pad", "NOTSET") != "NOTSET"
        or attribute(node, "output_shape") is not None
    ):
        return (None, None)
    kernel = list(weight_dims(weight)[2:])
    rank = len(kernel)
    strides = attribute(node, "strides", [1] * rank)
    dilations = attribute(node, "dilations", [1] * rank)
    size, out = static_dims(x)[1:], static_dims(node.outputs[0])[1:]
    full = [s * (n - 1) + d * (k - 1) + 1 for s, n, d, k in zip(strides, size, dilations, kernel, strict=True)]
    trimmed = [f - o for f, o in zip(full, out, strict=True)]
    before = list(attribute(node, "pads", [0] * 2 * rank))[:rank]
    after = [t - b for t, b in zip(trimmed, before, strict=True)]
    g = crop_or_pad(op, g, out, before, after)
    return (
        op.Conv(
            g, weight, group=attribute(node, "group", 1), kernel_shape=kernel, strides=strides, dilations=dilations
        ),
        None,
        None,
    )


def ones_kernel(op: Tape, channels: int, kernel: Sequence[int]) -> ir.Value:
    """Depthwise kernel of ones: the convolution that sums each window of each channel."""
    return op.floats(np.ones((channels, 1, *kernel)))
