"""What the axes of a tensor are made of, and what becomes of them.

Every axis is followed as the pieces that it is made of: the batch, channels, rows and columns of the image's grid. A
Reshape splits and joins pieces, a Transpose exchanges axes, padding and cropping shift the grid off the image. So a map
is recognised after windows, attention and channel shuffles, and no tensor is taken for a map because of its sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from ..files.patterns import reduced_axes
from ..tape import attribute, constant_of, dims


@dataclass(frozen=True)
class Piece:
    """Part of an axis. of: "batch" (whose size is not a number), "channel", "row" or "column"; step: how far apart in
    the grid neighbours are.
    """

    of: str
    size: int
    step: int = 1


Axis = tuple[Piece, ...]  # outermost first; () for a size of 1
Border = tuple[tuple[float, float], tuple[float, float]]
_WITHOUT: Border = ((0.0, 0.0), (0.0, 0.0))
_BORDER_LIMIT = 0.05  # of the image: a grid that is moved by more does not lie over the picture


@dataclass(frozen=True)
class Axes:
    """The axes of a tensor, of a grid (height, width). prefix: how many tokens come before the grid's on `token_axis`;
    border: how far the grid reaches beyond the image, ((above, below), (left, right)) in heights and widths of it,
    negative where it is cropped.
    """

    axes: tuple[Axis, ...]
    grid: tuple[int, int]
    prefix: int = 0
    token_axis: int = -1
    border: Border = _WITHOUT

    @property
    def lies_over_image(self) -> bool:
        return all(abs(b) <= _BORDER_LIMIT for pair in self.border for b in pair)


BATCH = Piece("batch", 1)

# fmt: off
ELEMENTWISE = {
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BatchNormalization", "Cast", "Ceil",
    "Celu", "Clip", "Cos", "Cosh", "CumSum", "DequantizeLinear", "Div", "Dropout", "DynamicQuantizeLinear", "Elu",
    "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "GroupNormalization", "HardSigmoid",
    "HardSwish", "Identity", "InstanceNormalization", "IsNaN", "LRN", "LayerNormalization", "LeakyRelu", "Less",
    "LessOrEqual", "Log", "LogSoftmax", "LpNormalization", "Max", "Mean", "MeanVarianceNormalization", "Min", "Mish",
    "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "QuantizeLinear", "RMSNormalization", "Reciprocal", "Relu",
    "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softmax", "Softplus", "Softsign", "Sqrt",
    "StopGradient", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Trilu", "Where", "Xor",
}
# fmt: on


def grid_of(axes: Axes, channel: int, row_axis: int, column_axis: int) -> tuple[int, int] | None:
    """(height, width) if these axes hold all rows and all columns, or every n-th with the finer pieces among the
    channels (after space-to-depth); else None.
    """
    height, width = axes.grid
    on_grid = axes.axes[row_axis] + axes.axes[column_axis] if row_axis != column_axis else axes.axes[row_axis]
    inner = axes.axes[channel]
    if any(p.of == "batch" for p in (*on_grid, *inner)) or any(p.of == "channel" for p in on_grid):
        return None
    sizes = []
    for of, size, axis in (("row", height, row_axis), ("column", width, column_axis)):
        pieces = [p for p in axes.axes[axis] if p.of == of]
        if len(pieces) > 1 or (row_axis != column_axis and any(p.of != of for p in axes.axes[axis])):
            return None
        piece = pieces[0] if pieces else Piece(of, 1, size)
        fine = [p for p in inner if p.of == of]
        if piece.size * piece.step != size or any(p.size * p.step > piece.step for p in fine):
            return None
        sizes.append(piece.size)
    if row_axis == column_axis and [p.of for p in axes.axes[row_axis]] not in (
        ["row", "column"],
        ["row"],
        ["column"],
        [],
    ):
        return None
    return sizes[0], sizes[1]


def is_nchw(axes: Axes) -> bool:
    """Whether a tensor is (batch, channels, rows, columns)."""
    return len(axes.axes) == 4 and not axes.prefix and axes.axes[0] == (BATCH,) and grid_of(axes, 1, 2, 3) is not None


def joined(axis: Sequence[Piece]) -> Axis:
    """Merges neighbouring pieces that continue each other; neighbouring channel pieces always merge."""
    result: list[Piece] = []
    for piece in axis:
        if piece.of != "batch" and piece.size == 1:
            continue
        last = result[-1] if result else None
        if last is not None and last.of == piece.of == "channel":
            result[-1] = Piece("channel", last.size * piece.size)
        elif last is not None and last.of == piece.of != "batch" and last.step == piece.step * piece.size:
            result[-1] = Piece(piece.of, last.size * piece.size, piece.step)
        else:
            result.append(piece)
    return tuple(result)


def channels_of(size: int | None) -> Axis:
    return () if size in (None, 1) else (Piece("channel", size),)  # type: ignore[arg-type]


def fresh_map(value: ir.Value) -> Axes | None:
    """The axes of an NCHW tensor whose height and width are the grid; None if it has other axes or symbolic sizes."""
    sizes = dims(value) if value.shape is not None else ()
    if len(sizes) != 4 or None in sizes[1:]:
        return None
    _, channels, height, width = sizes
    assert height is not None and width is not None
    rows, columns = joined([Piece("row", height)]), joined([Piece("column", width)])
    return Axes(((BATCH,), channels_of(channels), rows, columns), (height, width))


def agrees(value: ir.Value, axes: Axes) -> bool:
    """Whether the pieces make up the tensor's sizes."""
    sizes = dims(value) if value.shape is not None else ()
    if len(sizes) != len(axes.axes):
        return False
    for i, (axis, size) in enumerate(zip(axes.axes, sizes, strict=True)):
        count = math.prod(p.size for p in axis) + (axes.prefix if axes.prefix and i == axes.token_axis else 0)
        if size is not None and BATCH not in axis and size != count:
            return False
        if size is None and BATCH not in axis:
            return False
    return True


def _times(size: object) -> int:
    """The factor of the batch in a symbolic size: 3 for "3*batch", 1 for "batch"."""
    text = str(size.value if isinstance(size, ir.SymbolicDim) else size)
    return int(text.split("*")[0]) if "*" in text else 1


def after_reshape(before: Axes, y: ir.Value) -> Axes | None:
    """Distributes the pieces, in order, over the new sizes; None if they do not fit."""
    tokens = before.axes[before.token_axis] if before.prefix else None
    pieces: list[Piece | Axis] = []
    for i, axis in enumerate(before.axes):
        pieces += [axis] if tokens is not None and i == before.token_axis else list(axis)
    axes: list[Axis] = []
    token_axis = -1
    assert y.shape is not None
    fixed_batch = all(isinstance(n, int) for n in y.shape)
    for n in y.shape:
        taken: list[Piece] = []
        symbolic = not isinstance(n, int)
        left = _times(n) if symbolic else int(n)  # type: ignore[arg-type]
        want_batch = symbolic or (fixed_batch and pieces[:1] == [BATCH])
        while pieces and (left > 1 or (want_batch and BATCH not in taken)):
            piece = pieces.pop(0)
            if isinstance(piece, tuple):  # tokens behind a prefix stay together
                if taken or left != before.prefix + math.prod(p.size for p in piece):
                    return None
                taken, left, token_axis = list(piece), 1, len(axes)
                break
            if piece == BATCH:
                if not want_batch:
                    return None
                taken.append(piece)
                continue
            if left % piece.size == 0:
                taken.append(piece)
                left //= piece.size
            elif left > 1 and piece.size % left == 0:
                inner = piece.size // left
                taken.append(Piece(piece.of, left, piece.step * inner if piece.of != "channel" else 1))
                pieces.insert(0, Piece(piece.of, inner, piece.step))
                left = 1
            else:
                return None
        if left != 1:
            return None
        axes.append(joined(taken))
    if any(isinstance(p, tuple) or p.size != 1 for p in pieces):
        return None
    prefix = before.prefix if token_axis >= 0 else 0
    return replace(before, axes=tuple(axes), prefix=prefix, token_axis=token_axis)


def after_squeeze(before: Axes, node: ir.Node, squeeze: bool) -> Axes | None:
    axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
    if axes is None:
        return None
    new_axes = list(before.axes)
    token = before.token_axis
    rank = len(new_axes) + (0 if squeeze else len(axes))
    for a in sorted((int(a) % rank for a in axes), reverse=squeeze):
        if squeeze:
            if new_axes[a]:
                return None
            del new_axes[a]
        else:
            new_axes.insert(a, ())
        if before.prefix and a <= token:
            token += -1 if squeeze else 1
    return replace(before, axes=tuple(new_axes), token_axis=token)


def _whole(axis: Axis, of: str, size: int) -> bool:
    return axis == joined([Piece(of, size)])


def _of_grid(before: Axes, axis: int) -> int | None:
    """0 for the axis of all rows, 1 for that of all columns, else None."""
    if before.prefix:
        return None
    for which, of in enumerate(("row", "column")):
        if before.axes[axis] and _whole(before.axes[axis], of, before.grid[which]):
            return which
    return None


def _with_grid(before: Axes, axis: int, which: int, size: int, border: Border) -> Axes:
    axes, grid = list(before.axes), list(before.grid)
    axes[axis], grid[which] = joined([Piece(("row", "column")[which], size)]), size
    return replace(before, axes=tuple(axes), grid=(grid[0], grid[1]), border=border)


def wider(axes: Axes, which: int, before: float, behind: float) -> Border:
    """The border of a grid that grows by so many rows (which 0) or columns (1) on its two sides."""
    border = list(axes.border)
    start, end = border[which]
    cell = (1 + start + end) / axes.grid[which]
    border[which] = (start + before * cell, end + behind * cell)
    return border[0], border[1]


def after_slice(node: ir.Node, before: Axes, sizes: Sequence[int | None]) -> Axes | None:
    """A Slice that takes channels, takes every n-th position, crops a border or drops prefix tokens; else None."""
    starts, ends = constant_of(node.inputs[1]), constant_of(node.inputs[2])
    extra = [constant_of(node.inputs[i]) if len(node.inputs) > i else None for i in (3, 4)]
    if starts is None or ends is None:
        return None
    axes = extra[0] if extra[0] is not None else range(len(starts))
    steps = extra[1] if extra[1] is not None else [1] * len(starts)
    result = before
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis, step = int(axis) % len(before.axes), int(step)
        size = sizes[axis]
        if size is None:
            continue
        stop = None if step < 0 and end < -(2**31) + 2 else int(end)
        taken = range(*slice(int(start), stop, step).indices(size))
        if taken == range(size):
            continue
        which = _of_grid(result, axis)
        if all(p.of == "channel" for p in result.axes[axis]):
            new_axes = list(result.axes)
            new_axes[axis] = channels_of(len(taken))
            result = replace(result, axes=tuple(new_axes))
        elif result.prefix and axis == result.token_axis:
            if step != 1 or taken.stop != size or not 0 < taken.start <= result.prefix:
                return None
            result = replace(result, prefix=result.prefix - taken.start)
            result = result if result.prefix else replace(result, token_axis=-1)
        elif which is not None:
            strided = step > 1 and taken.start < step and len(taken) * step >= size - step
            if (not strided and step != 1) or not taken:
                return None
            cropped = result.border if strided else wider(result, which, -taken.start, taken.stop - size)
            result = _with_grid(result, axis, which, len(taken), cropped)
        else:
            return None
    return result


def after_pad(node: ir.Node, before: Axes) -> Axes | None:
    """A Pad of channels or around the grid; else None."""
    pads = constant_of(node.inputs[1])
    if pads is None:
        return None
    pad_axes = constant_of(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    axes = [int(a) % len(before.axes) for a in pad_axes] if pad_axes is not None else list(range(len(before.axes)))
    sizes, result = dims(node.outputs[0]), before
    for i, axis in enumerate(axes):
        if not pads[i] and not pads[i + len(axes)]:
            continue
        size = sizes[axis]
        which = _of_grid(result, axis)
        if size is None:
            return None
        if all(p.of == "channel" for p in result.axes[axis]):
            new_axes = list(result.axes)
            new_axes[axis] = channels_of(size)
            result = replace(result, axes=tuple(new_axes))
        elif which is not None:
            border = wider(result, which, pads[i], pads[i + len(axes)])
            result = _with_grid(result, axis, which, size, border)
        else:
            return None
    return result


def after_split(node: ir.Node, before: Axes) -> Sequence[Axes | None]:
    axis = attribute(node, "axis", 0) % len(before.axes)
    sizes = [dims(y)[axis] for y in node.outputs]
    results: list[Axes | None] = []
    for i, size in enumerate(sizes):
        new_axes = list(before.axes)
        if all(p.of == "channel" for p in before.axes[axis]):
            new_axes[axis] = channels_of(size)
            results.append(replace(before, axes=tuple(new_axes)))
        elif before.prefix and axis == before.token_axis and i == len(sizes) - 1 and None not in sizes:
            dropped = sum(n for n in sizes[:-1] if n)
            fits = dropped <= before.prefix
            left = before.prefix - dropped
            results.append(replace(before, prefix=left, token_axis=axis if left else -1) if fits else None)
        else:
            results.append(None)
    return results


def after_gather(node: ir.Node, before: Axes) -> Axes | None:
    """A Gather along channels: a vector of indices selects, a single index removes the axis; else None."""
    indices = node.inputs[1]
    axis = attribute(node, "axis", 0) % len(before.axes)
    if indices is None or indices.shape is None or any(p.of != "channel" for p in before.axes[axis]):
        return None
    rank = len(indices.shape)
    if rank > 1 or (before.prefix and axis == before.token_axis):
        return None
    new_axes = list(before.axes)
    new_axes[axis : axis + 1] = [channels_of(dims(node.outputs[0])[axis])] if rank else []
    token = before.token_axis - (1 if before.prefix and not rank and axis < before.token_axis else 0)
    return replace(before, axes=tuple(new_axes), token_axis=token)


def after_expand(before: Axes, y: ir.Value) -> Axes | None:
    """An axis of copies counts as channels."""
    sizes = dims(y)
    shift = len(sizes) - len(before.axes)
    axes = ((),) * shift + before.axes
    new = [
        channels_of(n) if all(p.of == "channel" for p in axis) else axis for axis, n in zip(axes, sizes, strict=True)
    ]
    return replace(before, axes=tuple(new), token_axis=before.token_axis + shift if before.prefix else -1)


def after_reduce(node: ir.Node, before: Axes) -> Axes | None:
    axes = reduced_axes(node)
    if axes is None or any(BATCH in before.axes[a] for a in axes):
        return None
    keepdims = bool(attribute(node, "keepdims", 1))
    new = [(() if i in axes else a) for i, a in enumerate(before.axes) if keepdims or i not in axes]
    if before.prefix and before.token_axis in axes:
        return replace(before, axes=tuple(new), prefix=0, token_axis=-1)
    token = before.token_axis - (0 if keepdims or not before.prefix else sum(a < before.token_axis for a in axes))
    return replace(before, axes=tuple(new), token_axis=token)
