"""Mixed precision: a float32 program whose expensive part is in float16.

In a program that reads a seed, this part is the backward pass. The forward pass stays float32: if float16 moved a
ReLU's input across zero, the gradient would change by far more than a rounding error. The backward pass is linear, so
float16 adds only rounding errors. In a program without a seed, whose results are scores, the part is the whole program.

In this part convolutions and matrix products are in float16, but for the matrix product that gives the scores: rounded
to float16, scores that are close could change places. The operators that float16 harms most stay in float32:
softmax, norms, means, sums and exponentials, and the nodes after them up to the next convolution or product. A branch
that is multiplied by a small constant (layer scale at the start of training) also stays in float32 until it joins
another branch, because its values may be too small for float16. Weights stay float32 in the file, shared with the
float32 programs, and are cast where they are used; an engine folds the casts of constants.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .graph import batch_norm_affine, infer_types, tidy
from .tape import attribute, constant_of, initializer

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT

_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}  # always in float16
# in float16 unless something computed in float32 comes in
# fmt: off
_FOLLOWERS = {
    "Abs", "Add", "AveragePool", "Clip", "Concat", "DepthToSpace", "Equal", "Expand", "Flatten", "Gather",
    "GatherElements", "Greater", "GreaterOrEqual", "Identity", "LeakyRelu", "Less", "LessOrEqual", "Max", "MaxPool",
    "Min", "Mul", "Neg", "Pad", "PRelu", "Relu", "Reshape", "ScatterElements", "ScatterND", "Sign", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where",
}
# fmt: on
SMALL = 2.0**-8  # a factor with no larger entry makes values small


def to_half(model: ir.Model) -> ir.Model:
    """Makes a float32 program mixed, in place. Its inputs and outputs stay float32."""
    infer_types(model)
    inputs = list(model.graph.inputs)
    roots = [x for x in inputs if x.name == "seed"] or inputs
    if roots == inputs:
        _unfold_batch_norms(model)
    _Converter(model.graph, roots).run()
    return tidy(model)


def takes_half(model: ir.Model) -> ir.Model:
    """Makes the only input of a program float16, in place. What reads it in float16 already does so without a cast."""
    (entry,) = model.graph.inputs
    entry.type = ir.TensorType(HALF)
    readers = list(entry.consumers())
    casts = [node for node in readers if node.op_type == "Cast" and node.outputs[0].dtype == HALF]
    for cast in casts:
        cast.outputs[0].replace_all_uses_with(entry, replace_graph_outputs=True)
        model.graph.remove(cast, safe=True)
    others = [node for node in readers if node not in casts]
    if others:
        wide = ir.node("Cast", [entry], {"to": FLOAT})
        y = wide.outputs[0]
        y.name, y.shape, y.type = f"{entry.name}_float", entry.shape, ir.TensorType(FLOAT)
        model.graph.insert_before(model.graph[0], [wide])
        for node in others:
            for i, x in enumerate(node.inputs):
                if x is entry:
                    node.replace_input_with(i, y)
    return model


def _unfold_batch_norms(model: ir.Model) -> None:
    """Writes each batch norm as y = scale x + shift (Mul and Add), with scale and shift computed in float64: after a
    convolution it can then be in float16.
    """
    graph = model.graph
    for node in list(graph):
        affine = batch_norm_affine(node) if node.op_type == "BatchNormalization" else None
        if affine is None:
            continue
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None and x.shape is not None
        sides = (1, -1, *[1] * (len(x.shape) - 2))
        scale, shift = (
            initializer(graph, f"{y.name}_{part}", values.astype(np.float32).reshape(sides))
            for part, values in zip(("scale", "shift"), affine, strict=True)
        )
        product = ir.node("Mul", [x, scale])
        product.outputs[0].name, product.outputs[0].shape, product.outputs[0].type = f"{y.name}_scaled", y.shape, y.type
        total = ir.node("Add", [product.outputs[0], shift])
        name, shape, kind = y.name, y.shape, y.type
        graph.insert_after(node, [product, total])
        y.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=False)
        total.outputs[0].name, total.outputs[0].shape, total.outputs[0].type = name, shape, kind


def _follows(node: ir.Node) -> bool:
    """Scattered sums stay float32: ONNX Runtime's CPU has no float16 form of them."""
    return node.op_type in _FOLLOWERS and attribute(node, "reduction", "none") == "none"


def _last_products(graph: ir.Graph) -> set[ir.Node]:
    """The matrix products behind which there is no other product."""
    before: set[ir.Node] = set()  # another one
    last = set()
    for node in reversed(graph):
        behind = any(user in before or user.op_type in _PRODUCTS for y in node.outputs for user in y.consumers())
        if behind:
            before.add(node)
        elif node.op_type in ("Gemm", "MatMul"):
            last.add(node)
    return last


class _Converter:
    """Converts the nodes that depend on the roots: on the seed, or on all inputs of a program without a seed."""

    def __init__(self, graph: ir.Graph, roots: Sequence[ir.Value]) -> None:
        self._graph = graph
        self._outputs = set(graph.outputs)
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._dependent = set(roots)
        self._backward = all(x.name == "seed" for x in roots)
        self._small: set[ir.Value] = set()
        self._last = set() if self._backward else _last_products(graph)

    def run(self) -> None:
        for node in list(self._graph):
            if any(x in self._dependent for x in node.inputs):
                self._dependent.update(node.outputs)
                if self._backward and self._makes_small(node):
                    self._small.update(node.outputs)
                self._convert(node)

    def _convert(self, node: ir.Node) -> None:
        if node.op_type == "Cast":
            self._cast_of_condition(node)
            return
        small = any(y in self._small for y in node.outputs)
        product = node.op_type in _PRODUCTS and node not in self._last
        half = not small and (product or (_follows(node) and not self._wide(node)))
        kind = HALF if half else FLOAT
        for i, x in enumerate(node.inputs):
            if x is not None and x.dtype in (HALF, FLOAT) and not _stays_float(node, i):
                node.replace_input_with(i, self._as(x, kind, node))
        for y in node.outputs:
            if y.dtype == FLOAT and half:
                self._set_half(node, y)

    def _makes_small(self, node: ir.Node) -> bool:
        """Whether every input that depends on the roots is small, or the node multiplies it by a small constant."""
        computed = [x for x in node.inputs if x is not None and x in self._dependent]
        if node.op_type == "Mul" and len(computed) == 1:
            factors = [constant_of(x) for x in node.inputs if x is not computed[0]]
            if any(f is not None and 0 < np.abs(f).max(initial=0) <= SMALL for f in factors):
                return True
        return all(x in self._small for x in computed)

    def _wide(self, node: ir.Node) -> bool:
        """Whether an input that depends on the roots is float32, or no floating-point input depends on them."""
        floats = [
            x
            for i, x in enumerate(node.inputs)
            if x is not None and x.dtype in (HALF, FLOAT) and not _stays_float(node, i)
        ]
        computed = [x for x in floats if x in self._dependent]
        return not computed or any(x.dtype == FLOAT for x in computed)

    def _set_half(self, node: ir.Node, y: ir.Value) -> None:
        """y becomes float16; where it is an output of the program, a cast takes its place."""
        y.type = ir.TensorType(HALF)
        if y in self._outputs:
            cast = ir.node("Cast", [y], {"to": FLOAT})
            self._graph.insert_after(node, [cast])
            name, y.name = y.name, f"{y.name}_half"
            wide = cast.outputs[0]
            wide.name, wide.shape, wide.type = name, y.shape, ir.TensorType(FLOAT)
            self._graph.outputs[list(self._graph.outputs).index(y)] = wide
            self._dependent.add(wide)
            self._casts[y, FLOAT] = wide

    def _as(self, x: ir.Value, kind: ir.DataType, user: ir.Node) -> ir.Value:
        if x.dtype == kind:
            return x
        if (x, kind) not in self._casts:
            cast = ir.node("Cast", [x], {"to": kind})
            producer = x.producer()
            if producer is None:
                self._graph.insert_before(self._graph[0], [cast])
            else:
                self._graph.insert_after(producer, [cast])
            y = cast.outputs[0]
            y.name, y.shape, y.type = f"{x.name}_{kind.name.lower()}", x.shape, ir.TensorType(kind)
            self._casts[x, kind] = y
            if x in self._dependent:
                self._dependent.add(y)
        return self._casts[x, kind]

    def _cast_of_condition(self, node: ir.Node) -> None:
        """A Cast of booleans gives float16, where 0 and 1 are exact; a Cast of float16 reads its input as float32."""
        x, y = node.inputs[0], node.outputs[0]
        if x is not None and x.dtype == ir.DataType.BOOL and y.dtype == FLOAT and y not in self._outputs:
            node.attributes["to"] = ir.AttrInt64("to", HALF)
            y.type = ir.TensorType(HALF)
        elif x is not None and x.dtype == HALF:
            node.replace_input_with(0, self._as(x, FLOAT, node))


def _stays_float(node: ir.Node, index: int) -> bool:
    """Whether an input is float32 by the operator's definition."""
    return node.op_type == "Resize" and index in (1, 2)
