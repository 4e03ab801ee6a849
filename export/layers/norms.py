"""The norm behind a layer: where the layer's output is seen as the rest of the network reads it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ..tape import constant_of, dims
from .layouts import Layout

# fmt: off
_NORMS = {
    "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization",
    "RMSNormalization", "MeanVarianceNormalization",
}
_REARRANGING = {"Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_AFFINE = {"Add", "Div", "Mul", "Sub"}
# of norms that are written out: statistics of the layer, and what is computed from them
_STATISTICS = {"GlobalAveragePool", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare"}
_WRITTEN_OUT = _STATISTICS | _AFFINE | _REARRANGING | {"Abs", "Cast", "Clip", "Max", "Neg", "Pow", "Reciprocal", "Sqrt"}
# fmt: on
_LONGEST = 24  # operators of a norm that is written out


def behind_norm(value: ir.Value, layout_by_value: Mapping[ir.Value, Layout]) -> ir.Value | None:
    """The output of the norm (batch, layer, group, instance, root mean square) that alone reads a feature map, its
    scale and shift included, perhaps in another layout; None if there is no such norm.

    layout_by_value: of the graph's values. A norm is one operator; or a scale or shift by constants, one number for
    each channel, which is what a batch norm is; or written out, of statistics of the feature map and quotients.
    """
    layout, normed, behind = layout_by_value.get(value), False, None
    channels = None if layout is None else dims(value)[layout.channel_axis]
    while layout is not None:
        after = _after(value, channels)
        if after is None:
            break
        value, is_norm = after
        normed = normed or is_norm
        of_value = layout_by_value.get(value)
        if normed and of_value is not None and of_value.grid == layout.grid:
            behind = value
    return behind


def _after(value: ir.Value, channels: int | None) -> tuple[ir.Value, bool] | None:
    """(the next value that everything behind `value` goes through, whether a norm or a part of one lies between), as
    long as nothing but a norm lies between; None otherwise.
    """
    readers = _readers(value)
    if len(readers) == 1:
        node = readers[0]
        if node.op_type in _REARRANGING or node.op_type in _NORMS:
            return node.outputs[0], node.op_type in _NORMS
        if node.op_type in _AFFINE and node.inputs[0] is not node.inputs[1]:
            return (node.outputs[0], True) if _is_per_channel(node, channels) else None
    return _written_out(value)


def _readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, without those that only make it an output of the graph."""
    return [n for n in value.consumers() if not (n.op_type == "Identity" and n.outputs[0].is_graph_output())]


def _is_per_channel(node: ir.Node, channels: int | None) -> bool:
    """Whether the node scales or shifts by a constant with one number, or one for each channel."""
    operands = node.inputs[1:] if node.op_type == "Div" else node.inputs
    constants = [c for x in operands if (c := constant_of(x)) is not None]
    return any(np.size(c) in (1, channels) and max(np.shape(c), default=1) == np.size(c) for c in constants)


def _written_out(value: ir.Value) -> tuple[ir.Value, bool] | None:
    """As `_after`, for a norm of several operators: everything that reads the value meets again in one value, and on
    the way there are statistics of it.
    """
    region: set[ir.Node] = set()
    open_values, computed, statistics = [value], {value}, False
    while open_values and len(region) <= _LONGEST:
        nodes = [n for v in open_values for n in _readers(v) if n not in region]
        node = next((n for n in nodes if all(x in computed or _is_constant(x) for x in n.inputs)), None)
        if node is None or node.op_type not in _WRITTEN_OUT:
            return None
        region.add(node)
        statistics = statistics or node.op_type in _STATISTICS
        open_values.append(node.outputs[0])
        computed.add(node.outputs[0])
        open_values = [v for v in open_values if any(n not in region for n in _readers(v)) or v is node.outputs[0]]
        if statistics and open_values == [node.outputs[0]]:
            return node.outputs[0], True
    return None


def _is_constant(value: ir.Value | None) -> bool:
    """Of sizes that are computed, too: they are whole numbers."""
    return value is None or constant_of(value) is not None or value.dtype == ir.DataType.INT64
