"""Finds a classifier's logits before final activations, casts and reshapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...runtime.errors import ExportError
from ..files.patterns import reduced_axes
from ..tape import attribute, constant_of, dims, initializer, made_by

_PASSED = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Clip", "QuantizeLinear")
_PASSED += ("DequantizeLinear", "Dropout")


# fmt: off
_OF_SINGLE_NUMBERS = (
    *_PASSED, "Add", "Sub", "Mul", "Div", "Neg", "Log", "Exp", "Pow", "Sqrt", "Max", "Min", "Slice", "Gather"
)
# fmt: on


class BatchElsewhere(ExportError):
    """An output whose first axis is not the batch, for example of a model for single images. Batch 1 may work."""


def find_logits(graph: ir.Graph) -> tuple[ir.Value, str | None]:
    """The logits (batch, classes) of the graph's only output, and the final activation after them: "Softmax",
    "Sigmoid", "LogSoftmax" or None.

    The activation is found if only changes of type or shape, quantisation or a Clip to [0, 1] follow it, also if it is
    written in basic operators. ExportError for an output that is not (batch, classes).
    """
    output = graph.outputs[0]
    if output.producer() is None:
        raise ExportError(f"output {output.name!r} is computed by nothing: it is the model's input, or a constant")
    activation = _activation(output)
    value, name = activation if activation is not None else (_same_numbers(output), None)
    classes = class_count(value, output)
    if not _is_rows(value):
        node = ir.node("Reshape", [value, initializer(graph, f"{value.name}_rows", np.array([-1, classes], np.int64))])
        producer = value.producer()
        assert producer is not None
        graph.insert_after(producer, [node])
        rows = node.outputs[0]
        first = value.shape[0] if value.shape is not None and len(value.shape) else 1
        rows.name, rows.type = f"{value.name}_logits", value.type
        rows.shape = ir.Shape([first if not isinstance(first, int) else 1, classes])
        node.name = rows.name
        value = rows
    return value, name


def class_count(logits: ir.Value, output: ir.Value | None = None) -> int:
    """Number of classes. ExportError unless the value holds one number for each image and class, on one axis."""
    output = output or logits
    sizes = dims(logits)
    output_sizes = [*dims(output)]
    free = not sizes or sizes[0] is None or sizes[0] == 1
    inner = list(sizes[1:] if free else sizes)
    if len(sizes) == 1 and sizes[0] is not None:  # no batch axis: one image's numbers
        inner = list(sizes)
    if None in inner or sum(d != 1 for d in inner) > 1:
        text = str(output.shape)
        if output_sizes.count(None) == 1 and output_sizes[0] is not None:
            raise BatchElsewhere(f"output {output.name!r}, {text}, has its batch on another axis than the first")
        held = (
            "; where its first axis is the batch that the file was traced with, write the file with a batch of 1"
            if len(output_sizes) == 2 and None not in output_sizes
            else ""
        )
        raise ExportError(
            f"output {output.name!r} has {len(output_sizes)} axes, {text}: camrt explains classifiers, whose output is "
            f"(batch, classes){held}"
        )
    first = logits.shape[0] if logits.shape is not None and len(logits.shape) else None
    if isinstance(first, ir.SymbolicDim) and str(first.value) != "batch":
        raise BatchElsewhere(
            f"output {output.name!r} has {first.value} rows: camrt explains classifiers, which give one row for each "
            "image"
        )
    if made_by(logits, "TopK") is not None:
        raise ExportError(
            f"output {output.name!r} holds the highest scores in order of rank (TopK), not one score per class: name "
            "the output that holds the logits, or export the model without its TopK"
        )
    if logits.dtype is not None and not logits.dtype.is_floating_point():
        raise ExportError(
            f"output {output.name!r} is {logits.dtype}, whole numbers: camrt needs the scores of all classes, not the "
            "class chosen"
        )
    return math.prod(d for d in inner if d is not None)


def made_of_probabilities(logits: ir.Value) -> str | None:
    """The operator ("Softmax", "LogSoftmax" or "Sigmoid") from which the scores are computed with element-by-element
    operators, reshapes and selections only; None if there is none.
    """
    value: ir.Value | None = logits
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in ("Softmax", "LogSoftmax", "Sigmoid"):
            return node.op_type
        computed = [x for x in node.inputs if x is not None and constant_of(x) is None]
        if node.op_type not in _OF_SINGLE_NUMBERS or len(computed) != 1:
            return None
        value = computed[0]
    return None


def is_product(logits: ir.Value) -> bool:
    """Whether a product of matrices or a convolution gives the logits, with or without a bias."""
    value: ir.Value | None = logits
    while (node := made_by(value, *_PASSED, "Add")) is not None:
        value = next((x for x in node.inputs if x is not None and constant_of(x) is None), None)
    return made_by(value, "Gemm", "MatMul", "Conv") is not None


def _is_rows(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 2 and not (dims(value)[0] not in (None, 1))


def _same_numbers(value: ir.Value) -> ir.Value:
    """The value before casts and before a quantisation of the scores, whose clipping would stop gradients."""
    node = value.producer()
    passed = ("Identity", "Cast", "QuantizeLinear", "DequantizeLinear")
    while node is not None and node.op_type in passed and node.inputs[0] is not None:
        if node.op_type == "Cast" and (node.inputs[0].dtype is None or not node.inputs[0].dtype.is_floating_point()):
            break
        value = node.inputs[0]
        node = value.producer()
    return value


def _activation(output: ir.Value) -> tuple[ir.Value, str] | None:
    value: ir.Value | None = output
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        activation = _match(node)
        if activation is not None:
            logits, _ = activation
            return activation if _along_classes(node, logits) else None
        if node.op_type not in _PASSED or not _keeps_order(node):
            return None
        value = node.inputs[0]
    return None


def _keeps_order(node: ir.Node) -> bool:
    x = node.inputs[0]
    if x is None or x.shape is None:
        return False
    if node.op_type == "Clip":
        low, high = ((constant_of(b) if b is not None else None) for b in [*node.inputs[1:], None, None][:2])
        return (low is None or float(low.reshape(-1)[0]) <= 1e-3) and (
            high is None or float(high.reshape(-1)[0]) >= 1 - 1e-3
        )
    if node.op_type == "Transpose":
        return sum(d != 1 for d in dims(x)) <= 2 and list(attribute(node, "perm", [])[:1]) == [0]
    if node.op_type == "Cast":
        return x.dtype is not None and x.dtype.is_floating_point()
    return True


def _along_classes(node: ir.Node, logits: ir.Value) -> bool:
    """Whether a Softmax runs over the axis of the classes."""
    while node.op_type in ("Exp", "Log") and (inner := node.inputs[0].producer()) is not None:  # type: ignore[union-attr]
        node = inner
    if logits.shape is None or node.op_type not in ("Softmax", "LogSoftmax"):
        return True
    sizes = dims(logits)
    if len(sizes) == 1:  # one image's
        return True
    axis = attribute(node, "axis", -1) % len(sizes)
    others = [d for i, d in enumerate(sizes) if i not in (axis, 0)]
    return axis != 0 and all(d == 1 for d in others)


def _match(node: ir.Node) -> tuple[ir.Value, str] | None:
    """(logits, activation) of a node that is, or writes out, a final activation."""
    x = node.inputs[0] if node.inputs else None
    if node.op_type in ("Softmax", "Sigmoid", "LogSoftmax") and x is not None:
        return x, node.op_type
    if node.op_type == "Exp":
        inner = _match(x.producer()) if x is not None and x.producer() is not None else None  # type: ignore[arg-type]
        return (inner[0], "Softmax") if inner is not None and inner[1] == "LogSoftmax" else None
    if node.op_type in ("Div", "Mul"):
        return _softmax_by_hand(node) or _sigmoid_by_hand(node)
    if node.op_type == "Reciprocal":
        return _sigmoid_by_hand(node)
    if node.op_type == "Log" and x is not None and x.producer() is not None:
        inner = _match(x.producer())  # type: ignore[arg-type]
        return (inner[0], "LogSoftmax") if inner is not None and inner[1] == "Softmax" else None
    if node.op_type == "Sub":
        return _other_of_two(node) or _log_softmax_by_hand(node)
    if node.op_type == "Concat":
        return _both_of_two(node)
    return None


def _other_of_two(node: ir.Node) -> tuple[ir.Value, str] | None:
    """1 - sigmoid(z), which is the sigmoid of -z."""
    z = _behind_sigmoid(node.inputs[1]) if _is(node.inputs[0], 1.0) else None
    return (_after(z, "Neg", [z]), "Sigmoid") if z is not None else None


def _both_of_two(node: ir.Node) -> tuple[ir.Value, str] | None:
    """1 - sigmoid(z) beside sigmoid(z), in either order, which is the softmax of 0 and z."""
    if len(node.inputs) != 2 or node.outputs[0].shape is None:
        return None
    axis = attribute(node, "axis", 0) % len(node.outputs[0].shape)
    if axis == 0 or any(d != 1 for d in dims(node.outputs[0])[1:axis]):
        return None
    for place in (0, 1):
        minus = made_by(node.inputs[1 - place], "Sub")
        if minus is None or not _is(minus.inputs[0], 1.0) or minus.inputs[1] is not node.inputs[place]:
            continue
        z = _behind_sigmoid(node.inputs[place])
        if z is None or z.shape is None or dims(z)[axis:] != (1,) * (len(z.shape) - axis):
            continue
        nothing = _after(z, "Sub", [z, z])
        both = _after(nothing, "Concat", [nothing, z] if place else [z, nothing], axis=axis)
        both.shape = node.outputs[0].shape
        return both, "Softmax"
    return None


def _behind_sigmoid(value: ir.Value | None) -> ir.Value | None:
    node = value.producer() if value is not None else None
    activation = _match(node) if node is not None else None
    return activation[0] if activation is not None and activation[1] == "Sigmoid" else None


def _after(last: ir.Value, op_type: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
    """The output of a new node, inserted after the node that computes `last`; it gets the shape and type of `last`."""
    producer = last.producer()
    assert producer is not None and producer.graph is not None
    node = ir.node(op_type, inputs, attributes)
    y = node.outputs[0]
    y.shape, y.type = last.shape, last.type
    node.name = y.name = f"{last.name}_{op_type.lower()}"
    producer.graph.insert_after(producer, node)
    return y


def _softmax_by_hand(node: ir.Node) -> tuple[ir.Value, str] | None:
    """exp(z) / sum exp(z), z with or without its maximum taken off."""
    numbers, total = node.inputs
    if node.op_type == "Mul":
        inverse = made_by(total, "Reciprocal")
        total = inverse.inputs[0] if inverse is not None else None
    exponential, summed = made_by(numbers, "Exp"), made_by(total, "ReduceSum")
    if exponential is None or summed is None or summed.inputs[0] is not numbers:
        return None
    if not _over_classes(summed):
        return None
    z = exponential.inputs[0]
    return (_behind_maximum(z), "Softmax") if z is not None else None


def _behind_maximum(z: ir.Value) -> ir.Value:
    minus = made_by(z, "Sub")
    if minus is not None:
        largest = made_by(minus.inputs[1], "ReduceMax")
        if largest is not None and largest.inputs[0] is minus.inputs[0] and minus.inputs[0] is not None:
            return minus.inputs[0]
    return z


def _over_classes(reduction: ir.Node) -> bool:
    x, axes = reduction.inputs[0], reduced_axes(reduction)
    if x is None or axes is None or 0 in axes or not attribute(reduction, "keepdims", 1):
        return False
    return all(d == 1 for i, d in enumerate(dims(x)) if i and i not in axes)


def _sigmoid_by_hand(node: ir.Node) -> tuple[ir.Value, str] | None:
    """1 / (1 + exp(-z))."""
    if node.op_type == "Reciprocal":
        below = node.inputs[0]
    elif node.op_type == "Div" and _is(node.inputs[0], 1.0):
        below = node.inputs[1]
    else:
        return None
    total = made_by(below, "Add")
    if total is None:
        return None
    for one, other in (tuple(total.inputs), tuple(total.inputs)[::-1]):
        exponential = made_by(other, "Exp")
        negative = made_by(exponential.inputs[0], "Neg") if exponential is not None else None
        if _is(one, 1.0) and negative is not None and negative.inputs[0] is not None:
            return negative.inputs[0], "Sigmoid"
    return None


def _log_softmax_by_hand(node: ir.Node) -> tuple[ir.Value, str] | None:
    """z - log sum exp(z)."""
    z, total = node.inputs
    if z is None:
        return None
    joint = made_by(total, "ReduceLogSumExp")
    if joint is None:
        logarithm = made_by(total, "Log")
        joint = made_by(logarithm.inputs[0], "ReduceSum") if logarithm is not None else None
        exponential = made_by(joint.inputs[0], "Exp") if joint is not None else None
        if joint is None or exponential is None or exponential.inputs[0] is not z:
            return None
        return (_behind_maximum(z), "LogSoftmax") if _over_classes(joint) else None
    return (z, "LogSoftmax") if joint.inputs[0] is z and _over_classes(joint) else None


def _is(value: ir.Value | None, number: float) -> bool:
    constant = constant_of(value)
    return constant is not None and constant.size == 1 and float(constant.reshape(-1)[0]) == number
