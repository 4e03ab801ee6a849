"""Runs a graph, node after node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...runtime.errors import ExportError
from .registry import OPERATORS


class Interpreter:
    """Runs a graph with all its floating-point numbers in `dtype`.

    rounding: every node output that the graph declares float16 is rounded to float16; sums inside a node are not, as on
    a GPU that adds in float32.
    """

    def __init__(self, model: ir.Model | str | Path, dtype: torch.dtype = torch.float64, rounding: bool = False):
        self.model = ir.load(model) if isinstance(model, str | Path) else model
        self.dtype = dtype
        self.rounding = rounding
        self._constants = {
            str(name): self._tensor(value.const_value.numpy())  # type: ignore[union-attr]
            for name, value in self.model.graph.initializers.items()
        }
        self._unread = _unread_after(self.model.graph)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(array))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def run(self, feeds: dict[str, torch.Tensor], fetches: Sequence[str]) -> dict[str, torch.Tensor]:
        """Runs the graph on `feeds` and returns the values named in `fetches`. ExportError for an unknown operator."""
        values: dict[str, Any] = dict(self._constants) | feeds
        for node, unread in zip(self.model.graph, self._unread, strict=True):
            function = OPERATORS.get(node.op_type)
            if function is None:
                raise ExportError(f"verification does not know the operator {node.op_type} (node {node.name!r})")
            attributes = {name: a.value for name, a in node.attributes.items()}
            inputs = [None if x is None else values[str(x.name)] for x in node.inputs]
            if node.op_type in ("Constant", "ConstantOfShape"):
                outputs = self._constant(node.op_type, attributes, inputs)
            elif node.op_type == "Cast":
                outputs = _cast(attributes, inputs[0], self.dtype)
            elif node.op_type == "Split":
                outputs = _split(attributes, *inputs, count=len(node.outputs))
            else:
                outputs = function(attributes, *inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for y, value in zip(node.outputs, outputs, strict=False):
                rounded = self.rounding and y.dtype == ir.DataType.FLOAT16
                values[str(y.name)] = value.half().to(self.dtype) if rounded else value
            for name in unread.difference(fetches):
                values.pop(name, None)
        return {name: values[name] for name in fetches}

    def biased(self) -> dict[str, torch.Tensor]:
        """{name of a value (B, K, h, w): the constant (K,) that its convolution or batch norm adds}."""
        biases = {}
        for node in self.model.graph:
            constants = [None if x is None else self._constants.get(str(x.name)) for x in node.inputs]
            y = node.outputs[0]
            if y.shape is None or len(y.shape) != 4:
                continue
            bias = None
            if node.op_type == "Conv" and len(constants) > 2:
                bias = constants[2]
            elif node.op_type == "BatchNormalization":
                gamma, beta, mean, variance = constants[1:5]
                if gamma is not None and beta is not None and mean is not None and variance is not None:
                    epsilon = node.attributes["epsilon"].value if "epsilon" in node.attributes else 1e-5
                    bias = beta - gamma * mean / (variance + epsilon).sqrt()
            if bias is not None:
                biases[str(y.name)] = bias
        return biases

    def _constant(self, op_type: str, attributes: dict[str, Any], inputs: list[Any]) -> torch.Tensor:
        value = attributes.get("value")
        array = value.numpy() if value is not None else np.zeros(1, np.float32)
        if op_type == "Constant":
            for key, kind in (("value_int", np.int64), ("value_ints", np.int64), ("value_float", np.float32)):
                if key in attributes:
                    array = np.array(attributes[key], kind)
            return self._tensor(array)
        return self._tensor(array).reshape(()).expand(tuple(inputs[0].tolist())).clone()


def _unread_after(graph: ir.Graph) -> list[set[str]]:
    """For each node the names of the values that no later node reads."""
    last = {str(y.name): i for i, node in enumerate(graph) for y in node.outputs}
    last |= {str(x.name): i for i, node in enumerate(graph) for x in node.inputs if x is not None}
    unread: list[set[str]] = [set() for _ in graph]
    for name, i in last.items():
        unread[i].add(name)
    return unread


def _cast(attributes: dict[str, Any], x: Any, working: torch.dtype) -> torch.Tensor:
    """Casts between floating types keep the working precision."""
    kind = ir.DataType(attributes["to"]).numpy()
    if np.issubdtype(kind, np.floating):
        return x.to(working)
    return x.to(torch.from_numpy(np.zeros(0, kind)).dtype)


def _split(attributes: dict[str, Any], x: Any, sizes: Any = None, *, count: int) -> Any:
    axis = attributes.get("axis", 0)
    if sizes is not None:
        return tuple(torch.split(x, sizes.tolist(), axis))
    length = -(-x.shape[axis] // count)
    return tuple(torch.split(x, length, axis))


for _name in ("Constant", "ConstantOfShape", "Cast", "Split"):
    OPERATORS[_name] = lambda *_: None  # handled by Interpreter.run, which knows the precision and the node's outputs
