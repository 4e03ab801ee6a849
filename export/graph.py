"""The forward graph that all programs start from: image in, logits out, tapped tensors named, all sizes static except
the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from ..runtime.bundle.manifest import Tap
from .tape import attribute, constant_of, initializer


@dataclass(frozen=True)
class Attempt:
    """What earlier attempts at an export showed. pinned: the batch must be 1; left_out: kinds of program that do not
    work; without_gradient: names of the token maps whose gradient on the grid was measured to be zero; None before that
    was measured.
    """

    pinned: bool = False
    left_out: frozenset[str] = frozenset()
    without_gradient: frozenset[str] | None = None


FIRST = Attempt()


@dataclass(frozen=True)
class TappedGraph:
    """A prepared model. Values are referred to by name, so that the graph can be cloned for each program.

    `model` has input `image` (batch, C, H, W) float32; `logits` (batch, classes); `taps` pairs each tap with its
    value. last: the layer that the role "last" belongs to, tapped or not. normalized: the value that the first layer
    reads, where the graph normalises the image itself. batch: "dynamic", or 1. whole_numbers: the source takes pixels
    as whole numbers; rounded: it computes in less than float32. precision: of the programs that are built from it.
    """

    model: ir.Model
    logits: str
    taps: tuple[tuple[Tap, str], ...]
    final_activation: str | None
    last: str | None = None
    normalized: str | None = None
    batch: str | int = "dynamic"
    whole_numbers: bool = False
    rounded: bool = False
    precision: str = "float32"

    def select(self, role: str) -> TappedGraph:
        return replace(self, taps=tuple(t for t in self.taps if role in t[0].roles))


def named_values(graph: ir.Graph) -> dict[str, ir.Value]:
    """Every value of a graph by its name."""
    values = {v.name: v for v in graph.inputs} | dict(graph.initializers)
    for node in graph:
        values.update({y.name: y for y in node.outputs})
    return values  # type: ignore[return-value]


def run_passes(model: ir.Model, *steps: object) -> None:
    """Runs onnx_ir passes in place, one after another."""
    for step in steps:
        step(model)  # type: ignore[operator]


def keeps_batch_apart(graph: ir.Graph, values: set[ir.Value]) -> bool:
    """True if every value has the image batch, alone, as its first axis."""
    return all(y.shape is not None and len(y.shape) > 0 and is_batch(graph, y.shape[0]) for y in values)


def is_batch(graph: ir.Graph, size: object) -> bool:
    """Whether a size is the image's batch: the same symbol, or in a graph for one image at a time 1."""
    shape = graph.inputs[0].shape
    assert shape is not None
    return size == shape[0]


def batch_norm_after(value: ir.Value) -> ir.Node | None:
    """The BatchNormalization that is the only consumer of a convolution's output, with constant statistics."""
    consumers = value.consumers()
    if len(consumers) != 1 or consumers[0].op_type != "BatchNormalization" or value.is_graph_output():
        return None
    node = consumers[0]
    return node if node.inputs[0] is value and batch_norm_affine(node) is not None else None


def batch_norm_affine(norm: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """(scale, shift), each (channels,) float64: a BatchNormalization as y = scale x + shift. None if one of its
    parameters or statistics is not a constant.
    """
    constants = [constant_of(x) for x in norm.inputs[1:5]]
    if any(c is None for c in constants):
        return None
    gamma, beta, mean, variance = (c.astype(np.float64) for c in constants)  # type: ignore[union-attr]
    scale = gamma / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    return scale, beta - scale * mean


def fold_batch_norm(model: ir.Model) -> dict[str, tuple[str, np.ndarray, np.ndarray]]:
    """Folds every BatchNormalization into the Conv before it, in place.

    Returns {name of the convolution's output A: (name of the norm's output y, scale, shift)}; y = scale A + shift with
    vectors (channels,) in float64. What is linear in A or in its gradient follows from these without a division.
    """
    graph = model.graph
    folded = {}
    for conv in list(graph):
        norm = batch_norm_after(conv.outputs[0]) if conv.op_type == "Conv" else None
        if norm is None:
            continue
        affine = batch_norm_affine(norm)
        assert affine is not None
        scale, shift = affine
        bias_value = conv.inputs[2] if len(conv.inputs) > 2 else None
        bias = constant_of(bias_value)
        if bias_value is not None and bias is None:
            continue  # a computed bias stays where it is
        weight, y = conv.inputs[1], norm.outputs[0]
        assert weight is not None
        column = initializer(
            graph, f"{y.name}_scale", scale.reshape(-1, *[1] * (len(weight.shape or ()) - 1)).astype(np.float32)
        )
        total = initializer(
            graph, f"{y.name}_bias", (shift if bias is None else shift + scale * bias).astype(np.float32)
        )
        scaled = ir.node("Mul", [weight, column])
        scaled.outputs[0].name = f"{y.name}_weight"
        scaled.outputs[0].shape, scaled.outputs[0].type = weight.shape, weight.type
        fused = ir.node("Conv", [conv.inputs[0], scaled.outputs[0], total], dict(conv.attributes), outputs=None)
        folded[conv.outputs[0].name] = (y.name, scale, shift)
        name, shape, kind = y.name, y.shape, y.type
        graph.insert_after(norm, [scaled, fused])
        y.replace_all_uses_with(fused.outputs[0], replace_graph_outputs=True)
        graph.remove([norm, conv], safe=False)
        fused.outputs[0].name, fused.outputs[0].shape, fused.outputs[0].type = name, shape, kind
    return folded


def finish(model: ir.Model, outputs: Sequence[ir.Value]) -> ir.Model:
    """Makes `outputs` the graph's outputs, turns StopGradient marks into Identity, and removes nodes that no output
    needs.
    """
    for node in model.graph:
        if node.op_type == "StopGradient":
            node.op_type = "Identity"
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs)
    return tidy(model)


def infer_types(model: ir.Model) -> None:
    """Gives every value its type and what can be known of its shape."""
    run_passes(model, passes.ShapeInferencePass())


def tidy(model: ir.Model) -> ir.Model:
    """Sorts the graph, drops what no output needs, gives every value a name of its own."""
    run_passes(model, passes.TopologicalSortPass(), passes.RemoveUnusedNodesPass(), passes.NameFixPass())
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    return model
