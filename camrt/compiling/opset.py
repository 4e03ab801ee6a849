"""Writes a graph in another opset of ONNX, where this changes nothing but the form."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from ..export.tape import attribute, constant_of, initializer
from ..runtime.errors import InputError

OLDEST = 17
# Operators whose versions between opset 17 and 21 differ in the types that they take, not in what they compute.
WIDENED = {
    "Cast", "Constant", "Equal", "Flatten", "Identity", "If", "IsInf", "IsNaN", "Loop", "Pad", "QuantizeLinear",
    "DequantizeLinear", "ReduceMax", "ReduceMin", "Reshape", "Scan", "ScatterElements", "ScatterND", "Shape", "Size",
    "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
REDUCTIONS = {
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
}


def convert(model: ir.Model, opset: int) -> None:
    """Rewrites the graph in place. InputError if an operator computes something else in that opset, or is not in it."""
    own = model.opset_imports[""]
    if opset == own:
        return
    if not OLDEST <= opset < own:
        raise InputError(f"opset {opset}: use {', '.join(map(str, range(OLDEST, own)))} or {own}, the bundle's own")
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        new = _since(node.op_type, opset)
        if _since(node.op_type, own) == new:
            continue
        if new is None or not _rewritten(model.graph, node, opset):
            raise InputError(f"opset {opset}: {node.op_type} ({node.name}) has no exact form in it: use opset {own}")
    model.opset_imports[""] = opset


def _since(op_type: str, opset: int) -> int | None:
    try:
        return onnx.defs.get_schema(op_type, opset).since_version
    except onnx.defs.SchemaError:
        return None


def _rewritten(graph: ir.Graph, node: ir.Node, opset: int) -> bool:
    """Gives a node the form of an older opset, if there is one that computes the same."""
    kind = node.op_type
    if kind in REDUCTIONS and opset < 18:
        return _axes_as_attribute(node)
    if kind == "Split" and opset < 18:
        return _with_sizes(graph, node)
    if kind == "Resize":
        for name in ("antialias", "axes", "keep_aspect_ratio_policy"):
            if attribute(node, name, None) not in (None, 0, "stretch"):
                return False
            node.attributes.pop(name, None)
        return attribute(node, "coordinate_transformation_mode", "half_pixel") != "half_pixel_symmetric"
    if kind == "Pad":
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            return False
        return attribute(node, "mode", "constant") != "wrap"
    if kind in ("ScatterElements", "ScatterND"):
        return attribute(node, "reduction", "none") in ("none", "add", "mul")
    if kind == "AveragePool":
        return all(d == 1 for d in node.attributes.pop("dilations").value) if "dilations" in node.attributes else True
    if kind == "Cast":
        node.attributes.pop("saturate", None)
    return kind in WIDENED


def _axes_as_attribute(node: ir.Node) -> bool:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is not None:
        numbers = constant_of(axes)
        if numbers is None:
            return False
        node.attributes["axes"] = ir.AttrInt64s("axes", [int(n) for n in numbers])
    elif attribute(node, "noop_with_empty_axes", 0):
        return False
    node.attributes.pop("noop_with_empty_axes", None)
    node.resize_inputs(1)
    return True


def _with_sizes(graph: ir.Graph, node: ir.Node) -> bool:
    """Before opset 18 a Split has sizes, or its parts are equal."""
    value = node.inputs[0]
    if len(node.inputs) < 2 or node.inputs[1] is None:
        size = None if value is None or value.shape is None else value.shape[attribute(node, "axis", 0)]
        if not isinstance(size, int):
            return False
        count = len(node.outputs)
        part = -(-size // count)
        sizes = np.minimum(part, size - part * np.arange(count))
        node.resize_inputs(2)
        node.replace_input_with(1, initializer(graph, f"{node.name}_sizes", sizes.astype(np.int64)))
    node.attributes.pop("num_outputs", None)
    return True
