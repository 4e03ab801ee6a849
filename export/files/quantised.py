"""Integer arithmetic -> QuantizeLinear and DequantizeLinear around float operators.

QOperator: an operator that computes on integers with scales and zero points is, by its specification, the float
operator between a DequantizeLinear of each input and a QuantizeLinear of its output, up to the rounding of sums.
Dynamic quantisation: an integer product of (x - zero point) and (w - zero point) is the float product of both, exactly
while sums stay below 2^24.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from ...runtime.errors import ExportError
from ..tape import attribute, constant_of, initializer

Build = Callable[["_Rewriter", ir.Node], "ir.Value"]
_REWRITES: dict[str, Build] = {}


def _rewrite(*op_types: str) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        _REWRITES.update(dict.fromkeys(op_types, build))
        return build

    return register


def to_qdq(model: ir.Model) -> None:
    """Rewrites a model's integer operators, in place. ExportError for one that has no exact form."""
    if not any(n.op_type in _REWRITES or _is_integer_only(n) for n in model.graph):
        return
    model.opset_imports[""] = max(model.opset_imports.get("", 13), 13)
    rewriter = _Rewriter(model.graph)
    for node in list(model.graph):
        build = _REWRITES.get(node.op_type)
        if build is not None:
            rewriter.replace(node, build)
        elif _is_integer_only(node):
            raise ExportError(
                f"quantised: {node.op_type} (node {node.name!r}) has no exact form in QuantizeLinear and "
                "DequantizeLinear: quantise the model in the QDQ format, or export the float model"
            )


def _is_integer_only(node: ir.Node) -> bool:
    return node.domain == "com.microsoft" and (
        node.op_type.startswith(("QLinear", "QGemm")) or "Integer" in node.op_type or "Quantize" in node.op_type
    )


class _Rewriter:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._nodes: list[ir.Node] = []
        self._name = ""

    def replace(self, node: ir.Node, build: Build) -> None:
        self._nodes, self._name = [], str(node.outputs[0].name)
        result, y = build(self, node), node.outputs[0]
        self.graph.insert_before(node, self._nodes)
        y.replace_all_uses_with(result, replace_graph_outputs=True)
        name, kind = y.name, y.type
        self.graph.remove(node, safe=False)
        last = self._nodes[-1]
        last.name = node.name
        result.name, result.type = name, kind

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes)
        node.outputs[0].name = node.name = f"{self._name}_{op_type}{len(self._nodes)}"
        self._nodes.append(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        return initializer(self.graph, f"{self._name}_constant", array)

    def dequantized(self, x: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None, axis: int = 1) -> ir.Value:
        scale_array = constant_of(scale)
        along = {"axis": axis} if scale_array is not None and scale_array.ndim == 1 and scale_array.size > 1 else {}
        if scale_array is not None and scale_array.ndim == 1 and scale_array.size == 1:
            scale, zero = self._scalar(scale), self._scalar(zero)
        return self.op("DequantizeLinear", x, scale, zero, **along)

    def quantized(self, y: ir.Value, scale: ir.Value | None, zero: ir.Value | None) -> ir.Value:
        return self.op("QuantizeLinear", y, self._scalar(scale), self._scalar(zero))

    def _scalar(self, value: ir.Value | None) -> ir.Value | None:
        array = constant_of(value)
        return self.constant(array.reshape(())) if array is not None and array.ndim == 1 and array.size == 1 else value


def _plain(node: ir.Node, *names: str) -> dict[str, Any]:
    return {n: a.value for n, a in node.attributes.items() if not names or n in names}


@_rewrite("QLinearConv")
def _qlinear_conv(to: _Rewriter, node: ir.Node) -> ir.Value:
    x, xs, xz, w, ws, wz, ys, yz, *bias = node.inputs
    inputs = [to.dequantized(x, xs, xz), to.dequantized(w, ws, wz, axis=0)]
    if bias and bias[0] is not None:
        x_scale, w_scale = constant_of(xs), constant_of(ws)
        if x_scale is None or w_scale is None:
            raise ExportError(
                f"quantised: QLinearConv (node {node.name!r}) has a computed scale: quantise with constant scales"
            )
        inputs.append(to.dequantized(bias[0], to.constant((x_scale * w_scale).astype(np.float32)), None, axis=0))
    return to.quantized(to.op("Conv", *inputs, **_plain(node)), ys, yz)


@_rewrite("QLinearMatMul")
def _qlinear_matmul(to: _Rewriter, node: ir.Node) -> ir.Value:
    a, a_scale, a_zero, b, b_scale, b_zero, ys, yz = node.inputs
    rank = len(b.shape) if b is not None and b.shape is not None else 2
    product = to.op("MatMul", to.dequantized(a, a_scale, a_zero), to.dequantized(b, b_scale, b_zero, axis=rank - 1))
    return to.quantized(product, ys, yz)


@_rewrite("QGemm")
def _qgemm(to: _Rewriter, node: ir.Node) -> ir.Value:
    a, a_scale, a_zero, b, b_scale, b_zero, *rest = node.inputs
    rest += [None] * (3 - len(rest))
    axis = 0 if attribute(node, "transB", 0) else 1
    inputs = [to.dequantized(a, a_scale, a_zero), to.dequantized(b, b_scale, b_zero, axis=axis)]
    if rest[0] is not None:
        scales = constant_of(a_scale), constant_of(b_scale)
        if scales[0] is None or scales[1] is None:
            raise ExportError(
                f"quantised: QGemm (node {node.name!r}) has a computed scale: quantise with constant scales"
            )
        factor = np.float32(attribute(node, "alpha", 1.0)) * scales[0] * scales[1]
        inputs.append(to.dequantized(rest[0], to.constant(factor.astype(np.float32)), None, axis=0))
    y = to.op("Gemm", *inputs, **_plain(node, "alpha", "transA", "transB"))
    return y if rest[1] is None else to.quantized(y, rest[1], rest[2])


@_rewrite("QLinearAdd", "QLinearMul")
def _qlinear_binary(to: _Rewriter, node: ir.Node) -> ir.Value:
    a, a_scale, a_zero, b, b_scale, b_zero, ys, yz = node.inputs
    kind = node.op_type.removeprefix("QLinear")
    return to.quantized(to.op(kind, to.dequantized(a, a_scale, a_zero), to.dequantized(b, b_scale, b_zero)), ys, yz)


@_rewrite("QLinearSigmoid", "QLinearLeakyRelu", "QLinearGlobalAveragePool", "QLinearAveragePool")
def _qlinear_unary(to: _Rewriter, node: ir.Node) -> ir.Value:
    x, xs, xz, ys, yz = node.inputs
    if attribute(node, "channels_last", 0):
        raise ExportError(
            f"quantised: {node.op_type} (node {node.name!r}) is channels-last: quantise the model in the QDQ format"
        )
    attributes = {n: v for n, v in _plain(node).items() if n != "channels_last"}
    return to.quantized(to.op(node.op_type.removeprefix("QLinear"), to.dequantized(x, xs, xz), **attributes), ys, yz)


@_rewrite("QLinearSoftmax")
def _qlinear_softmax(to: _Rewriter, node: ir.Node) -> ir.Value:
    x, xs, xz, ys, yz = node.inputs
    return to.quantized(to.op("Softmax", to.dequantized(x, xs, xz), axis=attribute(node, "axis", -1)), ys, yz)


@_rewrite("QLinearConcat")
def _qlinear_concat(to: _Rewriter, node: ir.Node) -> ir.Value:
    ys, yz, *rest = node.inputs
    parts = [to.dequantized(*part) for part in zip(rest[::3], rest[1::3], rest[2::3], strict=True)]
    return to.quantized(to.op("Concat", *parts, axis=attribute(node, "axis")), ys, yz)


def _centred(to: _Rewriter, x: ir.Value | None, zero: ir.Value | None, axis: int) -> ir.Value:
    """x - zero point, as float32."""
    zero_array = constant_of(zero)
    size = zero_array.size if zero_array is not None else 1
    ones = np.ones(size, np.float32) if size > 1 else np.float32(1).reshape(())
    return to.dequantized(
        x, to.constant(np.asarray(ones)), zero if size > 1 or zero_array is None else to._scalar(zero), axis
    )


@_rewrite("ConvInteger")
def _conv_integer(to: _Rewriter, node: ir.Node) -> ir.Value:
    x, w, x_zero, w_zero = [*node.inputs, None, None][:4]
    return to.op("Conv", _centred(to, x, x_zero, 1), _centred(to, w, w_zero, 0), **_plain(node))


@_rewrite("MatMulInteger")
def _matmul_integer(to: _Rewriter, node: ir.Node) -> ir.Value:
    a, b, a_zero, b_zero = [*node.inputs, None, None][:4]
    rank = len(b.shape) if b is not None and b.shape is not None else 2
    return to.op("MatMul", _centred(to, a, a_zero, 0), _centred(to, b, b_zero, rank - 1))
