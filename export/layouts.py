"""Which tensors of a graph hold a feature map, in which layout, and how one leaves the graph as NCHW.

Every axis of a tensor is followed as the pieces that it is made of: the batch, channels, rows and columns of the image's grid. A
Reshape splits and joins pieces, a Transpose exchanges axes, a product of matrices takes its rows from one side and its columns from
the other. So a map is known again behind windows, attention and channel shuffles, and never taken for one because of its sizes.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from ..runtime.errors import ExportError
from ..runtime.manifest import Tap
from .patterns import reduced_axes
from .tape import Tape, attribute, constant_of, dims


@dataclass(frozen=True)
class Layout:
    """How a tensor holds a feature map of a grid (height, width), one row of the batch for each image.

    kind: NCHW; NHWC; tokens: (batch, prefix + height * width, channels), the prefix being class and register tokens; or LND, tokens
    with the batch on the second axis, as PyTorch's transformers hold them unless told otherwise.
    """

    kind: str
    grid: tuple[int, int]
    prefix: int = 0

    @property
    def channel_axis(self) -> int:
        return {"NCHW": 1, "NHWC": 3, "tokens": 2, "LND": 2}[self.kind]

    @property
    def batch_axis(self) -> int:
        return 1 if self.kind == "LND" else 0

    @property
    def token_axis(self) -> int | None:
        """The axis of the tokens; None for maps with rows and columns of their own."""
        return {"tokens": 1, "LND": 0}.get(self.kind)

    @property
    def rank(self) -> int:
        return 4 if self.token_axis is None else 3


TAPPABLE = ("NCHW", "NHWC", "tokens", "LND")


@dataclass(frozen=True)
class Piece:
    """Part of an axis. of: "batch" (whose size is not a number), "channel", "row" or "column"; step: how far apart in the grid
    neighbours are.
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
    """The axes of a tensor, of a grid (height, width). prefix: how many tokens come before the grid's on `token_axis`; border: how
    far the grid reaches beyond the image, ((above, below), (left, right)) in heights and widths of it, negative where it is cropped.
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
_ELEMENTWISE = {
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BatchNormalization", "Cast", "Ceil",
    "Celu", "Clip", "Cos", "Cosh", "CumSum", "DequantizeLinear", "Div", "Dropout", "DynamicQuantizeLinear", "Elu",
    "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "GroupNormalization", "HardSigmoid",
    "HardSwish", "Identity", "InstanceNormalization", "IsNaN", "LRN", "LayerNormalization", "LeakyRelu", "Less",
    "LessOrEqual", "Log", "LogSoftmax", "LpNormalization", "Max", "Mean", "MeanVarianceNormalization", "Min", "Mish",
    "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "QuantizeLinear", "RMSNormalization", "Reciprocal", "Relu",
    "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softmax", "Softplus", "Softsign", "Sqrt",
    "StopGradient", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Trilu", "Where", "Xor",
}
_MAPS_TO_MAPS = {
    "AveragePool", "Conv", "ConvTranspose", "DepthToSpace", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool",
    "LpPool", "MaxPool", "Resize", "SpaceToDepth", "Upsample",
}
# fmt: on


def layouts(graph: ir.Graph) -> dict[ir.Value, Layout]:
    """The values that are known to hold feature maps, not merely shaped as if they did.

    What mixes or exchanges positions (rolling, products over positions) loses them, until a sum with a known map of the same shape,
    a residual connection, says what they are again.
    """
    return named_layouts(follow(graph))


def follow(graph: ir.Graph) -> dict[ir.Value, Axes]:
    """The axes of every value of which something is known."""
    return _Follower(graph).found


def named_layouts(found: Mapping[ir.Value, Axes]) -> dict[ir.Value, Layout]:
    """The values whose axes make one of the layouts, on a grid that lies over the image."""
    named = {value: _layout(axes) for value, axes in found.items() if axes.lies_over_image}
    return {value: layout for value, layout in named.items() if layout is not None}


def _layout(axes: Axes) -> Layout | None:
    """The layout that a tensor's axes make; None for none of the three."""
    kinds = {4: (("NCHW", 0, 1, 2, 3), ("NHWC", 0, 3, 1, 2)), 3: (("tokens", 0, 2, 1, 1), ("LND", 1, 2, 0, 0))}
    for kind, batch, channel, rows, columns in kinds.get(len(axes.axes), ()):
        if axes.axes[batch] != (BATCH,) or (axes.prefix and (rows != columns or axes.token_axis != rows)):
            continue
        grid = _grid_of(axes, channel, rows, columns)
        if grid is not None:
            return Layout(kind, grid, axes.prefix)
    return None


def _grid_of(axes: Axes, channel: int, row_axis: int, column_axis: int) -> tuple[int, int] | None:
    """(height, width) where those axes are whole rows and columns, coarser ones where finer pieces lie among the channels."""
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


def _joined(axis: Sequence[Piece]) -> Axis:
    """Neighbouring pieces that belong together as one; channels in any order."""
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


def _channels(size: int | None) -> Axis:
    return () if size in (None, 1) else (Piece("channel", size),)  # type: ignore[arg-type]


class _Follower:
    def __init__(self, graph: ir.Graph) -> None:
        self.found: dict[ir.Value, Axes] = {}
        image = graph.inputs[0]
        fresh = _fresh(image)
        if fresh is not None:
            self.found[image] = fresh
        for node in graph:
            for y, result in zip(node.outputs, self._results(node), strict=False):
                if result is not None and _agrees(y, result):
                    self.found[y] = result

    def _results(self, node: ir.Node) -> Sequence[Axes | None]:
        x, y = (node.inputs[0] if node.inputs else None), node.outputs[0]
        kind = node.op_type
        if y.shape is None:
            return ()
        if kind in _ELEMENTWISE:
            return [self._elementwise(node, out) for out in node.outputs if out.shape is not None]
        if kind in ("MatMul", "Gemm"):
            return [self._product(node)]
        if kind == "Concat":
            return [self._concat(node)]
        before = self.found.get(x) if x is not None else None
        if before is None or x is None or x.shape is None:
            return ()
        if kind in _MAPS_TO_MAPS:
            return [self._map(node, before)]
        if kind in ("Reshape", "Flatten"):
            return [_reshaped(before, y)]
        if kind in ("Squeeze", "Unsqueeze"):
            return [_resized(before, node, kind == "Squeeze")]
        if kind == "Transpose":
            perm = list(attribute(node, "perm", range(len(before.axes))[::-1]))
            token = perm.index(before.token_axis) if before.prefix else -1
            return [replace(before, axes=tuple(before.axes[i] for i in perm), token_axis=token)]
        if kind == "Slice":
            return [_sliced(node, before, dims(x))]
        if kind == "Pad":
            return [_padded(node, before)]
        if kind == "Split":
            return _split(node, before)
        if kind == "Gather":
            return [_gathered(node, before)]
        if kind in ("Expand", "Tile"):
            return [_expanded(before, y)]
        if kind.startswith("Reduce"):
            return [_reduced(node, before)]
        return ()

    def _elementwise(self, node: ir.Node, y: ir.Value) -> Axes | None:
        """Of every axis what the operands say of it; positions say more than channels."""
        rank = len(y.shape or ())
        known = [self.found[v] for v in node.inputs if v is not None and v in self.found]
        if not known:
            return None
        first = max(known, key=lambda k: (sum(p.of in ("row", "column") for a in k.axes for p in a), len(k.axes)))
        axes = list(((),) * (rank - len(first.axes)) + first.axes)
        if len(axes) != rank:
            return None
        for other in known:
            for i, axis in enumerate(((),) * (rank - len(other.axes)) + other.axes):
                if not axes[i]:
                    axes[i] = axis
                elif axis and axis != axes[i] and any(p.of in ("row", "column") for p in axis):
                    if any(p.of in ("row", "column") for p in axes[i]) or other.grid != first.grid:
                        return None
                    axes[i] = axis
        if any(not axis and n != 1 for axis, n in zip(axes, dims(y), strict=True)):
            return None
        token = first.token_axis + rank - len(first.axes) if first.prefix else -1
        return replace(first, axes=tuple(axes), token_axis=token, border=_least(known))

    def _product(self, node: ir.Node) -> Axes | None:
        """Rows of the left side, columns of the right, and what both say of the axes before."""
        a, b = node.inputs[:2]
        y = node.outputs[0]
        left, right = (self.found.get(v) if v is not None else None for v in (a, b))
        if left is None and right is None:
            return None
        rank = len(y.shape or ())
        transposed = node.op_type == "Gemm" and attribute(node, "transA", 0)
        if transposed or rank < 2:
            return None
        size = dims(y)
        one = left if left is not None else right
        assert one is not None
        leading: list[Axis] = [()] * (rank - 2)
        for side in (left, right):
            if side is None:
                continue
            axes = side.axes[:-2] if len(side.axes) >= 2 else ()
            for i, axis in enumerate(((),) * (rank - 2 - len(axes)) + axes):
                leading[i] = leading[i] or axis
        rows = left.axes[-2] if left is not None and len(left.axes) >= 2 else _channels(size[-2])
        columns = right.axes[-1] if right is not None and node.op_type == "MatMul" else _channels(size[-1])
        if any(not axis and n != 1 for axis, n in zip([*leading, rows, columns], size, strict=True)):
            return None
        prefix, token = 0, -1
        if left is not None and left.prefix and left.token_axis <= len(left.axes) - 2:
            prefix, token = left.prefix, rank - len(left.axes) + left.token_axis
        elif right is not None and right.prefix and right.token_axis == len(right.axes) - 1:
            prefix, token = right.prefix, rank - 1
        return Axes(
            (*leading, rows, columns), one.grid, prefix, token, _least([s for s in (left, right) if s is not None])
        )

    def _map(self, node: ir.Node, before: Axes) -> Axes | None:
        """A map of another grid; a 1 x 1 convolution keeps whatever its positions are."""
        y = node.outputs[0]
        weight = node.inputs[1] if node.op_type == "Conv" else None
        pointwise = (
            weight is not None
            and all(k == 1 for k in dims(weight)[2:])
            and not any(attribute(node, "pads", [0]))
            and all(s == 1 for s in attribute(node, "strides", [1]))
        )
        if pointwise and len(before.axes) > 1:
            return replace(before, axes=(before.axes[0], _channels(dims(y)[1]), *before.axes[2:]))
        layout, fresh = _layout(before), _fresh(y)
        if layout is None or layout.kind != "NCHW" or fresh is None:
            return None
        beyond = [max(0, n) for n in _beyond_window(node, attribute(node, "pads", [0] * 4))]
        wider = replace(before, border=_wider(before, 0, beyond[0], beyond[2])) if any(beyond) else before
        return replace(fresh, border=_wider(wider, 1, beyond[1], beyond[3]) if any(beyond) else before.border)

    def _concat(self, node: ir.Node) -> Axes | None:
        """Joined channels of maps alike; or tokens with others in front of them."""
        inputs = [x for x in node.inputs if x is not None]
        known = [self.found.get(x) for x in inputs]
        y = node.outputs[0]
        axis = attribute(node, "axis", 0) % len(y.shape or (1,))
        last = next((k for k in reversed(known) if k is not None), None)
        if last is None or len(last.axes) != len(y.shape or ()):
            return None
        if any(p.of != "channel" for p in last.axes[axis]):
            return self._with_prefix(inputs, known, axis)
        for x, k in zip(inputs, known, strict=True):
            if k is None and constant_of(x) is None:
                return None
            if k is not None and [a for i, a in enumerate(k.axes) if i != axis] != [
                a for i, a in enumerate(last.axes) if i != axis
            ]:
                return None
        axes = list(last.axes)
        axes[axis] = _channels(dims(y)[axis])
        return replace(last, axes=tuple(axes), border=_least([k for k in known if k is not None]))

    def _with_prefix(self, inputs: Sequence[ir.Value], known: Sequence[Axes | None], axis: int) -> Axes | None:
        last = known[-1]
        if last is None or any(p.of == "batch" for p in last.axes[axis]):
            return None
        if last.prefix and last.token_axis != axis:
            return None
        counts = [dims(x)[axis] for x in inputs[:-1]]
        if None in counts or any(
            k is not None and any(p.of in ("row", "column") for p in k.axes[axis]) for k in known[:-1]
        ):
            return None
        pieces = [p.of for p in last.axes[axis]]
        if pieces != ["row", "column"]:
            return None
        return replace(last, prefix=last.prefix + sum(n for n in counts if n), token_axis=axis)


def _fresh(value: ir.Value) -> Axes | None:
    """A map in NCHW, on a grid of its own."""
    sizes = dims(value) if value.shape is not None else ()
    if len(sizes) != 4 or None in sizes[1:]:
        return None
    _, channels, height, width = sizes
    assert height is not None and width is not None
    rows, columns = _joined([Piece("row", height)]), _joined([Piece("column", width)])
    return Axes(((BATCH,), _channels(channels), rows, columns), (height, width))


def _agrees(value: ir.Value, axes: Axes) -> bool:
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
    """How often the batch a symbolic size is."""
    text = str(size.value if isinstance(size, ir.SymbolicDim) else size)
    return int(text.split("*")[0]) if "*" in text else 1


def _reshaped(before: Axes, y: ir.Value) -> Axes | None:
    """The pieces, in their order, dealt out to the new sizes."""
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
        axes.append(_joined(taken))
    if any(isinstance(p, tuple) or p.size != 1 for p in pieces):
        return None
    return Axes(tuple(axes), before.grid, before.prefix if token_axis >= 0 else 0, token_axis)


def _resized(before: Axes, node: ir.Node, squeeze: bool) -> Axes | None:
    axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
    if axes is None:
        return None
    kept = list(before.axes)
    token = before.token_axis
    rank = len(kept) + (0 if squeeze else len(axes))
    for a in sorted((int(a) % rank for a in axes), reverse=squeeze):
        if squeeze:
            if kept[a]:
                return None
            del kept[a]
        else:
            kept.insert(a, ())
        if before.prefix and a <= token:
            token += -1 if squeeze else 1
    return replace(before, axes=tuple(kept), token_axis=token)


def _whole(axis: Axis, of: str, size: int) -> bool:
    return axis == _joined([Piece(of, size)])


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
    axes[axis], grid[which] = _joined([Piece(("row", "column")[which], size)]), size
    return replace(before, axes=tuple(axes), grid=(grid[0], grid[1]), border=border)


def _wider(axes: Axes, which: int, before: float, behind: float) -> Border:
    """The border of a grid that grows by so many rows (which 0) or columns (1) on its two sides."""
    border = list(axes.border)
    start, end = border[which]
    cell = (1 + start + end) / axes.grid[which]
    border[which] = (start + before * cell, end + behind * cell)
    return border[0], border[1]


def _least(known: Sequence[Axes]) -> Border:
    """Of tensors that are joined, the border of the one that lies over the image best."""
    return min((k.border for k in known), key=lambda border: max(abs(b) for pair in border for b in pair))


def _beyond_window(node: ir.Node, pads: Sequence[int]) -> list[int]:
    """How much of a padding (above, left, below, right) a convolution's or pooling's window could do without and still meet the map."""
    kernel = attribute(node, "kernel_shape")
    if kernel is None:
        kernel = dims(node.inputs[1])[2:] if node.op_type == "Conv" and node.inputs[1] is not None else None
    sizes = [int(k) for k in kernel or () if k is not None]
    if len(sizes) != 2 or len(pads) != 4:
        return [0] * 4
    dilations = attribute(node, "dilations", [1, 1])
    return [int(p - (sizes[i % 2] - 1) * dilations[i % 2]) for i, p in enumerate(pads)]


def _pads_windows(node: ir.Node, pads: Sequence[int]) -> bool:
    """Whether a Pad (above, left, below, right) is the padding of the convolutions or poolings that read it, written apart."""
    readers = node.outputs[0].consumers()
    if min(pads) < 0:
        return False
    for reader in readers:
        if (
            reader.op_type in _ELEMENTWISE
            and len([x for x in reader.inputs if x is not None and x.const_value is None]) == 1
        ):
            if not _pads_windows(reader, pads):
                return False
        elif reader.op_type not in ("Conv", "MaxPool", "AveragePool", "LpPool") or any(
            n > 0 for n in _beyond_window(reader, pads)
        ):
            return False
    return bool(readers)


def _sliced(node: ir.Node, before: Axes, sizes: Sequence[int | None]) -> Axes | None:
    """Channels taken, positions taken at a stride, a border cropped, or prefix tokens dropped."""
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
            kept = list(result.axes)
            kept[axis] = _channels(len(taken))
            result = replace(result, axes=tuple(kept))
        elif result.prefix and axis == result.token_axis:
            if step != 1 or taken.stop != size or not 0 < taken.start <= result.prefix:
                return None
            result = replace(result, prefix=result.prefix - taken.start)
            result = result if result.prefix else replace(result, token_axis=-1)
        elif which is not None:
            strided = step > 1 and taken.start < step and len(taken) * step >= size - step
            if (not strided and step != 1) or not taken:
                return None
            cropped = result.border if strided else _wider(result, which, -taken.start, taken.stop - size)
            result = _with_grid(result, axis, which, len(taken), cropped)
        else:
            return None
    return result


def _padded(node: ir.Node, before: Axes) -> Axes | None:
    """Channels padded, or a border around the grid."""
    pads = constant_of(node.inputs[1])
    if pads is None:
        return None
    given = constant_of(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    axes = [int(a) % len(before.axes) for a in given] if given is not None else list(range(len(before.axes)))
    sizes, result = dims(node.outputs[0]), before
    for i, axis in enumerate(axes):
        if not pads[i] and not pads[i + len(axes)]:
            continue
        size = sizes[axis]
        which = _of_grid(result, axis)
        if size is None:
            return None
        if all(p.of == "channel" for p in result.axes[axis]):
            kept = list(result.axes)
            kept[axis] = _channels(size)
            result = replace(result, axes=tuple(kept))
        elif which is not None:
            around = [0] * 4
            around[which], around[which + 2] = int(pads[i]), int(pads[i + len(axes)])
            border = (
                result.border if _pads_windows(node, around) else _wider(result, which, pads[i], pads[i + len(axes)])
            )
            result = _with_grid(result, axis, which, size, border)
        else:
            return None
    return result


def _split(node: ir.Node, before: Axes) -> Sequence[Axes | None]:
    axis = attribute(node, "axis", 0) % len(before.axes)
    sizes = [dims(y)[axis] for y in node.outputs]
    results: list[Axes | None] = []
    for i, size in enumerate(sizes):
        kept = list(before.axes)
        if all(p.of == "channel" for p in before.axes[axis]):
            kept[axis] = _channels(size)
            results.append(replace(before, axes=tuple(kept)))
        elif before.prefix and axis == before.token_axis and i == len(sizes) - 1 and None not in sizes:
            dropped = sum(n for n in sizes[:-1] if n)
            fits = dropped <= before.prefix
            left = before.prefix - dropped
            results.append(replace(before, prefix=left, token_axis=axis if left else -1) if fits else None)
        else:
            results.append(None)
    return results


def _gathered(node: ir.Node, before: Axes) -> Axes | None:
    """Channels picked, or an axis without positions taken away."""
    indices = node.inputs[1]
    axis = attribute(node, "axis", 0) % len(before.axes)
    if indices is None or indices.shape is None or any(p.of != "channel" for p in before.axes[axis]):
        return None
    rank = len(indices.shape)
    if rank > 1 or (before.prefix and axis == before.token_axis):
        return None
    kept = list(before.axes)
    kept[axis : axis + 1] = [_channels(dims(node.outputs[0])[axis])] if rank else []
    token = before.token_axis - (1 if before.prefix and not rank and axis < before.token_axis else 0)
    return replace(before, axes=tuple(kept), token_axis=token)


def _expanded(before: Axes, y: ir.Value) -> Axes | None:
    """Copies along an axis are as channels."""
    sizes = dims(y)
    shift = len(sizes) - len(before.axes)
    axes = ((),) * shift + before.axes
    new = [_channels(n) if all(p.of == "channel" for p in axis) else axis for axis, n in zip(axes, sizes, strict=True)]
    return replace(before, axes=tuple(new), token_axis=before.token_axis + shift if before.prefix else -1)


def _reduced(node: ir.Node, before: Axes) -> Axes | None:
    axes = reduced_axes(node)
    if axes is None or any(BATCH in before.axes[a] for a in axes):
        return None
    kept = bool(attribute(node, "keepdims", 1))
    new = [(() if i in axes else a) for i, a in enumerate(before.axes) if kept or i not in axes]
    if before.prefix and before.token_axis in axes:
        return replace(before, axes=tuple(new), prefix=0, token_axis=-1)
    token = before.token_axis - (0 if kept or not before.prefix else sum(a < before.token_axis for a in axes))
    return replace(before, axes=tuple(new), token_axis=token)


# ---- what the logits read of a map


def read_by_prefix_only(graph: ir.Graph, found: Mapping[ir.Value, Layout], target: ir.Value) -> set[ir.Value]:
    """Maps of whose tokens `target` reads the prefix alone: after a vision transformer's last attention, the class token.

    Its gradient at their grid is zero, so they cannot explain it.
    """
    whole = _reads(graph, found, target)
    return {v for v in found if not whole.get(v, False)}


def carries_all(
    graph: ir.Graph, found: Mapping[ir.Value, Layout], unread: Container[ir.Value], target: ir.Value, value: ir.Value
) -> bool:
    """Whether all that `target` reads of the image's grid passes through `value`: else it lies on one branch of several, and its
    gradient is a part of the whole. What a class token took from earlier layers does not count. unread: of `read_by_prefix_only`.
    """
    whole = _reads(graph, found, target, value, unread)
    return not any(whole.get(x, False) for x in graph.inputs)


def _reads(
    graph: ir.Graph,
    found: Mapping[ir.Value, Layout],
    target: ir.Value,
    barrier: ir.Value | None = None,
    unread: Container[ir.Value] = (),
) -> dict[ir.Value, bool]:
    """What `target` reads, past a barrier or not: value -> whether its grid is read, or its prefix alone."""
    whole = {target: True}
    for node in reversed(graph):
        scaled = node.op_type == "DynamicQuantizeLinear"  # its scales have no gradient
        outputs = node.outputs[:1] if scaled else node.outputs
        reads = [whole[y] for y in outputs if y in whole and y is not barrier]
        if not reads:
            continue
        if barrier is not None:
            if node.op_type in ("Shape", "Size", "StopGradient"):
                continue
            if not any(reads) and not any(y in unread for y in outputs):
                continue  # the class token of an earlier layer
        behind = set() if any(reads) else _behind_prefix(node, found)
        for place, x in enumerate(node.inputs):
            if x is None or place in behind:
                continue
            layout = found.get(x)
            grid = any(reads)
            if layout is not None and layout.prefix and _takes_prefix(node, layout):
                grid = False
            elif not grid:
                grid = not _keeps_tokens_apart(node, layout, found.get(node.outputs[0]))
            whole[x] = whole.get(x, False) or grid
    return whole


def refuse_unread(name: str, value: ir.Value, unread: set[ir.Value]) -> None:
    """ExportError for a layer that `read_by_prefix_only` found."""
    if value in unread:
        raise ExportError(
            f"layer {name!r}: the logits read none of its grid, only its class token, so its gradient there is zero: "
            "name a layer before the last attention"
        )


def _behind_prefix(node: ir.Node, found: Mapping[ir.Value, Layout]) -> set[int]:
    """Which inputs of a Concat of tokens lie behind its prefix."""
    layout = found.get(node.outputs[0])
    if node.op_type != "Concat" or layout is None or layout.token_axis is None:
        return set()
    if attribute(node, "axis", 0) % layout.rank != layout.token_axis:
        return set()
    behind, start = set(), 0
    for place, x in enumerate(node.inputs):
        if start >= layout.prefix:
            behind.add(place)
        size = dims(x)[layout.token_axis] if x is not None and len(dims(x)) == layout.rank else None
        if size is None:
            return behind
        start += size
    return behind


def _keeps_tokens_apart(node: ir.Node, before: Layout | None, after: Layout | None) -> bool:
    """Whether each token that a node computes is of the same token before it."""
    if before is None or after is None or before.token_axis is None:
        return False
    if node.op_type == "Transpose":
        return after.token_axis is not None and after.prefix == before.prefix
    apart = node.op_type in _ELEMENTWISE - {"Softmax", "LogSoftmax", "CumSum"} or node.op_type == "MatMul"
    return apart and before == after


def _takes_prefix(node: ir.Node, layout: Layout) -> bool:
    """Whether a Gather or Slice of tokens takes none but prefix tokens."""
    if node.op_type == "Gather":
        indices = constant_of(node.inputs[1])
        axis = attribute(node, "axis", 0) % layout.rank
        return (
            axis == layout.token_axis
            and indices is not None
            and bool(((indices >= 0) & (indices < layout.prefix)).all())
        )
    if node.op_type != "Slice":
        return False
    starts, ends, axes = (constant_of(x) for x in node.inputs[1:4]) if len(node.inputs) > 3 else (None, None, None)
    if starts is None or ends is None or axes is None:
        return False
    return any(
        int(a) % layout.rank == layout.token_axis and int(s) >= 0 and 0 <= int(e) <= layout.prefix
        for s, e, a in zip(starts, ends, axes, strict=True)
    )


def tap_at(name: str, roles: tuple[str, ...], value: ir.Value, layout: Layout, batch_norm: str) -> Tap:
    """The manifest's entry for a tapped value."""
    channels = dims(value)[layout.channel_axis]
    assert channels is not None
    return Tap(name, roles, channels, layout.grid, batch_norm, layout.kind, layout.prefix)


def to_maps(tape: Tape, value: ir.Value, tap: Tap) -> ir.Value:
    """A tapped value, or its cotangent, as (batch, channels, height, width)."""
    if tap.layout == "NCHW":
        return value
    if tap.layout == "NHWC":
        return tape.Transpose(value, perm=[0, 3, 1, 2])
    value = _batch_first(tape, value, tap)
    if tap.prefix:
        value = tape.Slice(value, [tap.prefix], [2**31], [1])
    return tape.Reshape(tape.Transpose(value, perm=[0, 2, 1]), [-1, tap.channels, *tap.grid])


def from_maps(tape: Tape, maps: ir.Value, tap: Tap, prefix: ir.Value | None) -> ir.Value:
    """The inverse of `to_maps`; prefix (batch, prefix, channels), for tokens that have one."""
    if tap.layout == "NCHW":
        return maps
    if tap.layout == "NHWC":
        return tape.Transpose(maps, perm=[0, 2, 3, 1])
    tokens = tape.Transpose(tape.Reshape(maps, [-1, tap.channels, math.prod(tap.grid)]), perm=[0, 2, 1])
    return _batch_first(tape, tokens if prefix is None else tape.Concat(prefix, tokens, axis=1), tap)


def prefix_of(tape: Tape, value: ir.Value, tap: Tap) -> ir.Value:
    """The tokens (batch, prefix, channels) before the grid's."""
    return tape.Slice(_batch_first(tape, value, tap), [0], [tap.prefix], [1])


def _batch_first(tape: Tape, value: ir.Value, tap: Tap) -> ir.Value:
    """LND as tokens, and tokens as LND."""
    return tape.Transpose(value, perm=[1, 0, 2]) if tap.layout == "LND" else value
