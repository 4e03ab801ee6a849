"""Finds the tensor that masks must multiply, if the graph normalises its own image: the normalised image.

A mask sets parts of the first layer's input to 0. If the graph subtracts a mean, multiplying a raw pixel by 0 makes it
black, and the first layer's input is then not 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping

import numpy as np
import onnx_ir as ir

from ..tape import attribute, constant_of
from .layouts import Layout

# operators that change each number by constants or move whole channels
_ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Neg", "Clip", "BatchNormalization", "Pow", "Max", "Min"}
_MOVES = {
    "Cast",
    "Identity",
    "Transpose",
    "Gather",
    "Slice",
    "Concat",
    "Tile",
    "Expand",
    "Split",
    "Squeeze",
    "Unsqueeze",
    "Reshape",
}
_SHIFTS = {"Add", "Sub", "Clip", "BatchNormalization", "Max", "Min", "Pow"}  # zero may not stay zero
# operators that also prepare a picture, but after which masks are not applied
_PREPARES = {"Resize", "AveragePool", "Pad", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "Sqrt", "Reciprocal"}


def normalized_image(graph: ir.Graph, known: Mapping[ir.Value, Layout], logits: ir.Value) -> str | None:
    """The name of the normalised image (batch, C', H, W), which the network's first layer reads; None where masks
    multiply the image itself.

    None if nothing that the graph does to the image shifts zero, or if the layers read the image at several tensors or
    on another grid. Warns if zero is shifted and masks still multiply the image.
    """
    image = graph.inputs[0]
    inside, shifted = _prepared(graph, logits, _ARITHMETIC | _MOVES)
    _, shifted_later = _prepared(graph, logits, _ARITHMETIC | _MOVES | _PREPARES)
    left = {x for node in graph if not set(node.outputs) <= inside for x in node.inputs if x in inside}
    value = next(iter(left)) if len(left) == 1 else None
    layout, size = known.get(value) if value is not None else None, known[image].grid if image in known else None
    usable = layout is not None and layout.kind == "NCHW" and layout.grid == size and value is not image
    name = str(value.name) if shifted and usable and value is not None else None
    beyond = [n for n in shifted_later if n not in shifted]
    unfollowed = beyond or (shifted if name is None else [])
    if unfollowed:
        warnings.warn(
            f"{unfollowed[0].op_type} (node {unfollowed[0].name!r}) changes the picture within the network, where "
            "masks cannot be applied: the masks of the Score-CAM family multiply raw pixel values, of which 0 may "
            "mean black and not zero input: prepare the picture outside the model",
            stacklevel=5,
        )
    return name


def _prepared(graph: ir.Graph, logits: ir.Value, operators: Container[str]) -> tuple[set[ir.Value], list[ir.Node]]:
    """(values that `operators` compute from the image and constants only, their nodes that may shift zero)."""
    inside, shifts = {graph.inputs[0]}, []
    for node in graph:
        computed = [x for x in node.inputs if x is not None and constant_of(x) is None]
        if not computed or not all(x in inside for x in computed):
            continue
        scales = _scales_channels(node)
        if (node.op_type in operators or scales) and logits not in node.outputs:
            inside.update(node.outputs)
            of_image_alone = node.op_type in ("Add", "Sub", "Max", "Min") and len(computed) == len(node.inputs)
            if (node.op_type in _SHIFTS and not of_image_alone) or (scales and len(node.inputs) > 2):
                shifts.append(node)
    return inside, shifts


def _scales_channels(node: ir.Node) -> bool:
    """Whether a node is a convolution that gives each channel a factor and a bias of its own, as a folded
    normalisation does.
    """
    weight = constant_of(node.inputs[1]) if node.op_type == "Conv" else None
    if weight is None or weight.shape[2:] != (1, 1) or any(n != 1 for n in attribute(node, "strides", (1, 1))):
        return False
    if any(attribute(node, "pads", ())):
        return False
    factors, groups = weight[:, :, 0, 0], attribute(node, "group", 1)
    if groups == len(factors):
        return factors.shape[1] == 1
    return groups == 1 and factors.shape[0] == factors.shape[1] and not (factors - np.diag(np.diag(factors))).any()
