"""The axes of every tensor of a graph, from the image on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import onnx_ir as ir

from ..tape import attribute, constant_of, dims
from .axes import (
    ELEMENTWISE,
    Axes,
    Axis,
    after_expand,
    after_gather,
    after_pad,
    after_reduce,
    after_reshape,
    after_slice,
    after_split,
    after_squeeze,
    agrees,
    channels_of,
    fresh_map,
    is_nchw,
)
from .borders import border_behind_resize, border_behind_window, joint_border

# fmt: off
_MAPS_TO_MAPS = {
    "AveragePool", "Conv", "ConvTranspose", "DepthToSpace", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool",
    "LpPool", "MaxPool", "Resize", "SpaceToDepth", "Upsample",
}
# fmt: on
_WINDOWED = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool")


def _transposed(node: ir.Node, before: Axes) -> Sequence[Axes]:
    perm = list(attribute(node, "perm", range(len(before.axes))[::-1]))
    token = perm.index(before.token_axis) if before.prefix else -1
    return [replace(before, axes=tuple(before.axes[i] for i in perm), token_axis=token)]


# operator -> the axes of its outputs, from its node and the axes of its first input
_AFTER: dict[str, Callable[[ir.Node, Axes], Sequence[Axes | None]]] = {
    "Expand": lambda node, before: [after_expand(before, node.outputs[0])],
    "Flatten": lambda node, before: [after_reshape(before, node.outputs[0])],
    "Gather": lambda node, before: [after_gather(node, before)],
    "Pad": lambda node, before: [after_pad(node, before)],
    "Reshape": lambda node, before: [after_reshape(before, node.outputs[0])],
    "Slice": lambda node, before: [after_slice(node, before, dims(node.inputs[0]))],  # type: ignore[arg-type]
    "Split": lambda node, before: after_split(node, before),
    "Squeeze": lambda node, before: [after_squeeze(before, node, True)],
    "Tile": lambda node, before: [after_expand(before, node.outputs[0])],
    "Transpose": _transposed,
    "Unsqueeze": lambda node, before: [after_squeeze(before, node, False)],
    **{
        f"Reduce{name}": lambda node, before: [after_reduce(node, before)]
        for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    },
}
FOLLOWED = {*ELEMENTWISE, *_MAPS_TO_MAPS, *_AFTER, "Concat", "Gemm", "MatMul"}


def follow(graph: ir.Graph) -> dict[ir.Value, Axes]:
    """The axes of every value of which something is known."""
    return _Follower(graph).found


class _Follower:
    def __init__(self, graph: ir.Graph) -> None:
        self.found: dict[ir.Value, Axes] = {}
        image = graph.inputs[0]
        fresh = fresh_map(image)
        if fresh is not None:
            self.found[image] = fresh
        for node in graph:
            for y, result in zip(node.outputs, self._results(node), strict=False):
                if result is not None and agrees(y, result):
                    self.found[y] = result

    def _results(self, node: ir.Node) -> Sequence[Axes | None]:
        x, y = (node.inputs[0] if node.inputs else None), node.outputs[0]
        kind = node.op_type
        if y.shape is None:
            return ()
        if kind in ELEMENTWISE:
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
        return _AFTER[kind](node, before) if kind in _AFTER else ()

    def _elementwise(self, node: ir.Node, y: ir.Value) -> Axes | None:
        """Per axis, what the operands know of it; rows and columns take precedence over channels. None if the operands
        contradict each other.
        """
        rank = len(y.shape or ())
        operand_axes = [self.found[v] for v in node.inputs if v is not None and v in self.found]
        if not operand_axes:
            return None
        first = max(
            operand_axes, key=lambda k: (sum(p.of in ("row", "column") for a in k.axes for p in a), len(k.axes))
        )
        axes = list(((),) * (rank - len(first.axes)) + first.axes)
        if len(axes) != rank:
            return None
        for other in operand_axes:
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
        return replace(first, axes=tuple(axes), token_axis=token, border=joint_border(operand_axes))

    def _product(self, node: ir.Node) -> Axes | None:
        """The rows of the left operand, the columns of the right one; the leading axes from either operand."""
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
        rows = left.axes[-2] if left is not None and len(left.axes) >= 2 else channels_of(size[-2])
        columns = right.axes[-1] if right is not None and node.op_type == "MatMul" else channels_of(size[-1])
        if any(not axis and n != 1 for axis, n in zip([*leading, rows, columns], size, strict=True)):
            return None
        prefix, token = 0, -1
        if left is not None and left.prefix and left.token_axis <= len(left.axes) - 2:
            prefix, token = left.prefix, rank - len(left.axes) + left.token_axis
        elif right is not None and right.prefix and right.token_axis == len(right.axes) - 1:
            prefix, token = right.prefix, rank - 1
        return Axes(
            (*leading, rows, columns),
            one.grid,
            prefix,
            token,
            joint_border([s for s in (left, right) if s is not None]),
        )

    def _map(self, node: ir.Node, before: Axes) -> Axes | None:
        """A map on a new grid; a plain 1 x 1 convolution keeps every axis except the channels."""
        y = node.outputs[0]
        weight = node.inputs[1] if node.op_type == "Conv" else None
        pointwise = (
            weight is not None
            and all(k == 1 for k in dims(weight)[2:])
            and not any(attribute(node, "pads", [0]))
            and all(s == 1 for s in attribute(node, "strides", [1]))
        )
        if pointwise and len(before.axes) > 1:
            return replace(before, axes=(before.axes[0], channels_of(dims(y)[1]), *before.axes[2:]))
        fresh = fresh_map(y)
        if not is_nchw(before) or fresh is None:
            return None
        if node.op_type == "Resize":
            border = border_behind_resize(node, before)
        elif node.op_type in _WINDOWED:
            border = border_behind_window(node, before, dims(node.inputs[0])[2:])  # type: ignore[arg-type]
        else:
            border = before.border
        return None if border is None else replace(fresh, border=border)

    def _concat(self, node: ir.Node) -> Axes | None:
        """Channels of maps with equal other axes, joined; or prefix tokens put in front of a grid's tokens."""
        inputs = [x for x in node.inputs if x is not None]
        input_axes = [self.found.get(x) for x in inputs]
        y = node.outputs[0]
        axis = attribute(node, "axis", 0) % len(y.shape or (1,))
        last = next((k for k in reversed(input_axes) if k is not None), None)
        if last is None or len(last.axes) != len(y.shape or ()):
            return None
        if any(p.of != "channel" for p in last.axes[axis]):
            return self._with_prefix(inputs, input_axes, axis)
        for x, k in zip(inputs, input_axes, strict=True):
            if k is None and constant_of(x) is None:
                return None
            if k is not None and [a for i, a in enumerate(k.axes) if i != axis] != [
                a for i, a in enumerate(last.axes) if i != axis
            ]:
                return None
        axes = list(last.axes)
        axes[axis] = channels_of(dims(y)[axis])
        return replace(last, axes=tuple(axes), border=joint_border([k for k in input_axes if k is not None]))

    def _with_prefix(self, inputs: Sequence[ir.Value], input_axes: Sequence[Axes | None], axis: int) -> Axes | None:
        last = input_axes[-1]
        if last is None or any(p.of == "batch" for p in last.axes[axis]):
            return None
        if last.prefix and last.token_axis != axis:
            return None
        counts = [dims(x)[axis] for x in inputs[:-1]]
        if None in counts or any(
            k is not None and any(p.of in ("row", "column") for p in k.axes[axis]) for k in input_axes[:-1]
        ):
            return None
        pieces = [p.of for p in last.axes[axis]]
        if pieces != ["row", "column"]:
            return None
        return replace(last, prefix=last.prefix + sum(n for n in counts if n), token_axis=axis)
