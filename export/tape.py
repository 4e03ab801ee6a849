"""Emit ONNX nodes by calling them: `op.Relu(x)` appends a Relu to the graph and returns its output."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Operand = "ir.Value | np.ndarray | int | float | list[int] | tuple[int, ...] | None"


def dims(value: ir.Value) -> tuple[int | None, ...]:
    """Sizes of a value, None for a symbolic one (the batch). ValueError if the value has no shape."""
    if value.shape is None:
        raise ValueError(f"value {value.name!r} has no inferred shape")
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def static_dims(value: ir.Value) -> tuple[int, ...]:
    """Sizes after the batch axis, all of which are static. ValueError if one is not."""
    sizes = dims(value)[1:]
    if None in sizes:
        raise ValueError(f"value {value.name!r} has a symbolic size besides its batch: {value.shape}")
    return tuple(d for d in sizes if d is not None)


def open_dims(value: ir.Value, batch: int) -> tuple[int, ...]:
    """Sizes with `batch` in the place of the symbolic one, which may be any axis (attention moves the batch about).

    ValueError if there are several.
    """
    sizes = dims(value)
    if sizes.count(None) > 1:
        raise ValueError(f"value {value.name!r} has several symbolic sizes: {value.shape}")
    return tuple(batch if d is None else d for d in sizes)


def weight_dims(value: ir.Value) -> tuple[int, ...]:
    """Sizes of a value that has no batch, such as a weight. ValueError if one is symbolic."""
    sizes = dims(value)
    if None in sizes:
        raise ValueError(f"value {value.name!r} has a symbolic size: {value.shape}")
    return tuple(d for d in sizes if d is not None)


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Python value of a node's attribute, or `default` where it is absent."""
    attr = node.attributes.get(name)
    return default if attr is None else attr.value


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The array behind an initializer; None for an absent or computed value."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def is_float(value: ir.Value) -> bool:
    """Whether a value is known to hold floating-point numbers."""
    return value.dtype is not None and value.dtype.is_floating_point()


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes a value, if its operator is one of those."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types else None


def initializer(graph: ir.Graph, name: str, data: np.ndarray) -> ir.Value:
    """A new constant of the graph, under a name that is not taken."""
    while name in graph.initializers:
        name += "_"
    value = ir.Value(
        name=name,
        shape=ir.Shape(data.shape),
        type=ir.TensorType(ir.DataType.from_numpy(data.dtype)),
        const_value=ir.tensor(data, name=name),
    )
    graph.register_initializer(value)
    return value


class Tape:
    """Appends nodes to one graph; arrays and numbers become initializers, equal ones a single initializer.

    `needed`: the values whose cotangents are needed, None for all; rules emit no nodes for others; sources: those that
    are asked for. outer: for the body
    of a loop, the tape of the graph around it, which keeps the constants.
    """

    def __init__(
        self,
        graph: ir.Graph,
        dtype: np.dtype | type = np.float32,
        needed: set[ir.Value] | None = None,
        outer: Tape | None = None,
    ):
        self.graph = graph
        self.outer = outer
        self.dtype = np.dtype(dtype)
        self.needed = needed
        self.sources: set[ir.Value] = set()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)

        def emit(*inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
            node = ir.node(op_type, [self.value(x) for x in inputs], attributes, num_outputs=outputs)
            self.graph.append(node)
            return node.outputs[0] if outputs == 1 else tuple(node.outputs)

        return emit

    def value(self, operand: Any) -> ir.Value | None:
        """Floats become scalars of the tape's dtype; ints and int sequences become int64."""
        if operand is None or isinstance(operand, ir.Value):
            return operand
        if isinstance(operand, np.ndarray):
            return self.constant(operand)
        if isinstance(operand, float):
            return self.constant(np.array(operand, self.dtype))
        return self.constant(np.array(operand, np.int64))

    def constant(self, array: np.ndarray) -> ir.Value:
        if self.outer is not None:
            return self.outer.constant(array)
        array = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes a scalar one-dimensional
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            self._constants[key] = initializer(self.graph, f"constant_{len(self._constants)}", array)
        return self._constants[key]

    def floats(self, values: Any) -> ir.Value:
        """A constant in the tape's floating type."""
        return self.constant(np.asarray(values, self.dtype))

    def wants(self, value: ir.Value | None) -> bool:
        return value is not None and (self.needed is None or value in self.needed)

    def mask(self, condition: ir.Value, g: ir.Value) -> ir.Value:
        """g where condition holds, else 0."""
        return self.Mul(g, self.Cast(condition, to=ir.DataType.from_numpy(self.dtype)))

    def unbroadcast(self, g: ir.Value, operand: ir.Value | None, result: ir.Value) -> ir.Value | None:
        """Sums g (shaped as `result`) over the axes along which `operand` was broadcast.

        None where the operand's cotangent is not needed, or where only one of `result` and `operand` has the batch on
        an axis.
        """
        if operand is None or not self.wants(operand):
            return None
        have, want = dims(result), dims(operand)
        leading = len(have) - len(want)
        wide = (1,) * leading + want
        if any((w is None) != (h is None) for w, h in zip(wide, have, strict=True)):
            return None
        axes = [i for i, (w, h) in enumerate(zip(wide, have, strict=True)) if w == 1 and h != 1]
        summed = self.ReduceSum(g, axes, keepdims=1) if axes else g
        return self.Squeeze(summed, list(range(leading))) if leading else summed

    def expand_like(self, g: ir.Value, value: ir.Value) -> ir.Value:
        """Broadcasts g to the sizes of `value`, keeping g's own batch."""
        return self.Expand(g, list(open_dims(value, 1)))

    def reshape_like(self, g: ir.Value, value: ir.Value) -> ir.Value:
        """g in the sizes of `value`, keeping g's own batch."""
        return self.Reshape(g, list(open_dims(value, -1)))


def output(
    tape: Tape, value: ir.Value, name: str, shape: Sequence[Any], kind: ir.DataType = ir.DataType.FLOAT
) -> ir.Value:
    """A float32 `value` under an output's name, type and shape."""
    named = tape.Identity(value) if kind == ir.DataType.FLOAT else tape.Cast(value, to=kind)
    named.name, named.shape, named.type = name, ir.Shape(shape), ir.TensorType(kind)
    return named
