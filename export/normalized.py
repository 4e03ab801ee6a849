"""Where a graph that normalises its own image has finished doing so: what masks must multiply.

A mask lets through part of the input that the network's first layer reads. Where the graph subtracts a mean, a raw pixel that is
multiplied by 0 is black, not nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from .layouts import Layout
from .tape import constant_of

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


def normalized_image(graph: ir.Graph, known: Mapping[ir.Value, Layout], logits: ir.Value) -> str | None:
    """The tensor (batch, C', H, W) that the network's first layer reads; None where masks may multiply the image itself.

    That is where the graph does nothing to the image that moves zero, or where it reads the image elsewhere as well.
    """
    image = graph.inputs[0]
    inside, shifted = {image}, False
    for node in graph:
        computed = [x for x in node.inputs if x is not None and constant_of(x) is None]
        if not computed or not all(x in inside for x in computed):
            continue
        if node.op_type in _ARITHMETIC | _MOVES and not any(y in (logits,) for y in node.outputs):
            inside.update(node.outputs)
            shifted = shifted or node.op_type in _SHIFTS
    if not shifted:
        return None
    left = {x for node in graph if not set(node.outputs) <= inside for x in node.inputs if x in inside}
    if len(left) != 1:
        return None
    (value,) = left
    layout, size = known.get(value), known[image].grid if image in known else None
    return (
        str(value.name)
        if layout is not None and layout.kind == "NCHW" and layout.grid == size and value is not image
        else None
    )
