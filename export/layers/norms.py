"""The norm behind a layer: where the layer's output is seen as the rest of the network reads it."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..tape import constant_of, made_by
from .layouts import Layout

_NORMS = (
    "BatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "LpNormalization",
    "RMSNormalization",
)
_REARRANGING = ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_AFFINE = ("Add", "Mul")


def behind_norm(value: ir.Value, layout_by_value: Mapping[ir.Value, Layout]) -> ir.Value | None:
    """The output of the norm (batch, layer, group, instance) that alone reads a feature map, its scale and shift
    included, perhaps in another layout; None if there is no such norm.

    layout_by_value: of the graph's values. A norm may be one operator, or a layer norm written out: the mean, the
    difference from it, and its quotient by the deviation.
    """
    layout, normed, behind = layout_by_value.get(value), False, None
    while layout is not None:
        consumers = _consumers(value)
        centred = _centred(consumers, value)
        if centred is not None and not normed:
            quotients = [n for n in _consumers(centred) if n.op_type == "Div" and n.inputs[0] is centred]
            if len(quotients) != 1:
                break
            value, normed = quotients[0].outputs[0], True
        elif len(consumers) == 1 and _may_follow(consumers[0], normed):
            value = consumers[0].outputs[0]
            normed = normed or consumers[0].op_type in _NORMS
        else:
            break
        after = layout_by_value.get(value)
        if normed and after is not None and after.grid == layout.grid:
            behind = value
    return behind


def _consumers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, without those that only make it an output of the graph."""
    return [n for n in value.consumers() if not (n.op_type == "Identity" and n.outputs[0].is_graph_output())]


def _centred(consumers: list[ir.Node], value: ir.Value) -> ir.Value | None:
    """value - mean(value), if nothing else reads the value."""
    if len(consumers) != 2:
        return None
    for difference in consumers:
        mean = made_by(difference.inputs[1], "ReduceMean") if difference.op_type == "Sub" else None
        if mean is not None and difference.inputs[0] is value and mean.inputs[0] is value and mean in consumers:
            return difference.outputs[0]
    return None


def _may_follow(node: ir.Node, normed: bool) -> bool:
    """Whether a node belongs to the norm: a rearrangement, the norm itself, or, behind it, its scale and shift."""
    if node.op_type in _REARRANGING or (not normed and node.op_type in _NORMS):
        return True
    return normed and node.op_type in _AFFINE and any(constant_of(x) is not None for x in node.inputs)
