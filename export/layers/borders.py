"""How far a grid reaches beyond the image, or is cropped, after operators that join maps, resize them or read windows
of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ..tape import attribute, constant_of, dims
from .axes import Axes, Border

_OTHER_PART = 0.1  # as a fraction of the image: a grid that is shifted by more shows another part of the picture
_SMALL_STRIDE = 3  # a larger stride cuts a picture into patches


def joint_border(known: Sequence[Axes]) -> Border:
    """The border of a result of several tensors: among those with rows or columns, the border of the tensor that lies
    over the image best. If one of them shows another part of the picture (a crop beside the whole), its border. A shift
    by one cell does not count as another part.
    """
    placed = [k for k in known if any(p.of in ("row", "column") for axis in k.axes for p in axis)] or known

    def elsewhere(axes: Axes) -> bool:
        limits = (max(_OTHER_PART, 1.5 / n) for n in axes.grid)
        return any(abs(b) > limit for pair, limit in zip(axes.border, limits, strict=True) for b in pair)

    other = next((k for k in placed if elsewhere(k)), None)
    if other is not None:
        return other.border
    return min((k.border for k in placed), key=lambda border: max(abs(b) for pair in border for b in pair))


def border_behind_window(node: ir.Node, before: Axes, sizes: Sequence[int | None]) -> Border:
    """The border after a convolution or pooling of a map of `sizes` (height, width).

    Padding above the usual amount widens the border; padding below it uses up a border that was padded before. Usual is
    half a window where windows overlap; where they do not, stride - 1 for strides up to 3, and 0 for larger ones. Rows
    or columns that a stride above 3 leaves unread are cropped.
    """
    kernel = attribute(node, "kernel_shape")
    if kernel is None and node.op_type in ("Conv", "ConvTranspose") and node.inputs[1] is not None:
        kernel = dims(node.inputs[1])[2:]
    window = [int(k) for k in kernel or () if k is not None]
    if len(window) != 2:
        return before.border
    pads, strides = attribute(node, "pads", [0] * 4), attribute(node, "strides", [1, 1])
    dilations, border = attribute(node, "dilations", [1, 1]), list(before.border)
    for which, (k, s, size) in enumerate(zip(window, strides, sizes, strict=True)):
        span, (start, end) = (k - 1) * dilations[which] + 1, before.border[which]
        padded = (pads[which], pads[which + 2])
        if size is None:
            continue
        cell = (1 + start + end) / size
        if node.op_type == "ConvTranspose":
            beyond = [max(0.0, (span - s) / 2 - p - 0.5) / s for p in padded]
            border[which] = (start + beyond[0] * cell, end + beyond[1] * cell)
            continue
        overlaps = span > s
        ordinary = span // 2 if overlaps else (s - 1 if s <= _SMALL_STRIDE else 0)
        taken_up = [max(ordinary - p, 0) if overlaps else 0 for p in padded]
        start, end = (
            b + (max(p - ordinary, 0) - min(t, max(b / cell, 0))) * cell
            for b, p, t in zip((start, end), padded, taken_up, strict=True)
        )
        left = (size + sum(padded) - span) % s - padded[1] if s > _SMALL_STRIDE else 0
        border[which] = (start, end - max(left, 0) * cell)
    return border[0], border[1]


def border_behind_resize(node: ir.Node, before: Axes) -> Border | None:
    """The border behind a Resize, which may crop to a region of interest; None where that is not known."""
    if attribute(node, "coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize":
        return before.border
    region = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if region is None:
        return None
    axes = [int(a) % len(before.axes) for a in attribute(node, "axes", range(len(before.axes)))]
    border = list(before.border)
    for place, axis in enumerate(axes):
        low, high = float(region[place]), float(region[place + len(axes)])
        if axis < 2:
            if (low, high) != (0.0, 1.0):
                return None
            continue
        start, end = before.border[axis - 2]
        whole = 1 + start + end
        border[axis - 2] = (start - low * whole, end - (1 - high) * whole)
    return border[0], border[1]
