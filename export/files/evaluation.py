"""One node as ONNX's specification has it: its contents by the reference evaluator, its sizes by shape inference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import infer_node_outputs

from ...runtime.errors import ExportError, first_line
from .facts import Shape, label

_AS_INPUT = {"GroupNormalization", "MeanVarianceNormalization", "Celu", "ThresholdedRelu", "LpNormalization"}
_MOST_GIVEN = 4096  # an input with more numbers is passed to shape inference without its contents


def evaluate_node(node: ir.Node, names: Sequence[str], feeds: dict, opset: int, ir_version: int) -> list[np.ndarray]:
    """The outputs of one node, by ONNX's reference evaluator. names: of its inputs, "" for an absent one; feeds:
    {name: array}; opset, ir_version: of the model. ExportError if they cannot be computed.
    """
    proto = ir.serde.serialize_node(node)
    del proto.input[:]
    proto.input.extend(names)
    outputs = [f"y{i}" for i in range(len(node.outputs))]
    del proto.output[:]
    proto.output.extend(outputs)
    make = onnx.helper.make_tensor_value_info
    inputs = [make(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), None) for n, a in feeds.items()]
    graph = onnx.helper.make_graph([proto], "node", inputs, [make(n, 0, None) for n in outputs])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=ir_version)
    try:
        return [np.asarray(a) for a in ReferenceEvaluator(model).run(outputs, feeds)]  # type: ignore[arg-type]
    except Exception as error:
        raise ExportError(f"{label(node)} cannot be computed from its constants ({first_line(error)[:160]})") from None


class NodeInference:
    """ONNX's shape inference for one node. ExportError for an operator that ONNX does not know."""

    def __init__(self, node: ir.Node, opset: int, ir_version: int) -> None:
        try:
            self._schema = onnx.defs.get_schema(node.op_type, opset, "" if node.domain == "ai.onnx" else node.domain)
        except Exception:
            raise ExportError(unknown_operator(node)) from None
        self._proto = ir.serde.serialize_node(node)
        del self._proto.output[:]
        self._proto.output.extend(f"y{i}" if y.name else "" for i, y in enumerate(node.outputs))
        del self._proto.input[:]
        self._proto.input.extend("" if x is None else f"x{i}" for i, x in enumerate(node.inputs))
        self._node = node
        self._imports = [onnx.helper.make_opsetid("", opset)]
        self._ir_version = ir_version

    def __call__(
        self, shapes: Sequence[Shape | None], contents: Sequence[np.ndarray | None]
    ) -> list[tuple[int, Shape | None] | None]:
        """Per output (ONNX element type, shape), the shape None if it is not determined; None for an output that ONNX
        says nothing about. shapes, contents: of the inputs; None for an absent input, or for unknown contents. Raises
        ONNX's own errors if the sizes do not fit.
        """
        types, data = {}, {}
        for k, (x, shape, array) in enumerate(zip(self._node.inputs, shapes, contents, strict=True)):
            if x is None:
                continue
            assert x.dtype is not None, x.name
            types[f"x{k}"] = onnx.helper.make_tensor_type_proto(int(x.dtype), shape)
            if array is not None and array.size <= _MOST_GIVEN:
                data[f"x{k}"] = onnx.numpy_helper.from_array(array, f"x{k}")
        result = infer_node_outputs(self._schema, self._proto, types, data, {}, self._imports, self._ir_version)
        outputs: dict[str, tuple[int, Shape | None]] = {}
        for name, kind in result.items():
            tensor = kind.tensor_type
            sizes = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
            determined = tensor.HasField("shape") and None not in sizes
            outputs[name] = (tensor.elem_type, tuple(sizes) if determined else None)  # type: ignore[arg-type]
        first = next((k for k, x in enumerate(self._node.inputs) if x is not None), None)
        if self._node.op_type in _AS_INPUT and first is not None and outputs.get("y0", (0, None))[1] is None:
            outputs["y0"] = (int(self._node.inputs[first].dtype), shapes[first])  # type: ignore[union-attr, arg-type]
        return [outputs.get(f"y{k}") for k in range(len(self._node.outputs))]


def unknown_operator(node: ir.Node) -> str:
    """Says which operator is not known, and what to do."""
    where = (
        f"the operator {node.domain + '.' if node.domain not in ('', 'ai.onnx') else ''}{node.op_type} ({label(node)})"
    )
    if node.domain in ("com.microsoft", "com.microsoft.nchwc", "com.microsoft.experimental"):
        return (
            f"{where} is ONNX Runtime's own, written by its optimiser: export the file that the optimiser was given, "
            "or one without fusions"
        )
    if node.domain not in ("", "ai.onnx"):
        return f"{where} is a custom one: camrt differentiates ONNX's own operators; export the model with those"
    return (
        f"{where} is not an ONNX operator at this opset in the installed onnx {onnx.__version__}: a converter left it "
        "unconverted; use a newer converter, or write the operator with standard ones"
    )


def has_subgraph(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
