"""The forward graph that all programs start from: one image in, logits out, static sizes, the tapped tensors named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import optimizer

from ..runtime.errors import ExportError, first_line
from ..runtime.manifest import LARGEST_SIDE, MOST_ELEMENTS, Tap
from .tape import attribute, constant_of, dims

OPSET = 18  # the oldest opset whose forms the gradient rules read; older models are converted to it


@dataclass(frozen=True)
class TappedGraph:
    """A prepared model. Values are referred to by name, so that the graph can be cloned for each program.

    precision: of the programs that are built from it. `model` has input `image` (batch, C, H, W) float32; `logits` (batch, classes); `taps` pairs each tap with its value.
    """

    model: ir.Model
    logits: str
    taps: tuple[tuple[Tap, str], ...]
    final_activation: str | None
    precision: str = "float32"

    def select(self, role: str) -> TappedGraph:
        return replace(self, taps=tuple(t for t in self.taps if role in t[0].roles))


def named_values(graph: ir.Graph) -> dict[str, ir.Value]:
    """Every value of a graph by its name."""
    values = {v.name: v for v in graph.inputs} | dict(graph.initializers)
    for node in graph:
        values.update({y.name: y for y in node.outputs})
    return values  # type: ignore[return-value]


def modernise(model: ir.Model) -> ir.Model:
    """The same model in opset 18 or later, without local functions, Constant nodes or initializers among the inputs."""
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    if version < OPSET:
        proto = ir.to_proto(model)
        if proto.ir_version < 4:
            proto.ir_version = 4
        try:
            model = ir.from_proto(onnx.version_converter.convert_version(proto, OPSET))
        except Exception as error:
            raise ExportError(
                f"opset {version} could not be converted to {OPSET}: {first_line(error)}; export the model with opset {OPSET}"
            ) from error
    _run(
        model,
        passes.ClearMetadataAndDocStringPass(),
        passes.InlinePass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.RemoveInitializersFromInputsPass(),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.NameFixPass(),
    )
    return model


def _run(model: ir.Model, *steps: object) -> None:
    for step in steps:
        step(model)  # type: ignore[operator]


def single_image_input(model: ir.Model) -> ir.Value:
    """The model's image input. ExportError if there is not exactly one float32 input of rank 4."""
    inputs = model.graph.inputs
    if len(inputs) != 1:
        names = ", ".join(str(v.name) for v in inputs) or "none"
        raise ExportError(f"the model has {len(inputs)} inputs ({names}): camrt explains models with one image input")
    image = inputs[0]
    if image.dtype != ir.DataType.FLOAT:
        raise ExportError(
            f"input {image.name!r} is {image.dtype}: camrt takes float32 images; export the model in float32"
        )
    if image.shape is None or len(image.shape) != 4:
        raise ExportError(
            f"input {image.name!r} has shape {image.shape}: camrt takes images (batch, channels, height, width)"
        )
    return image


def fix_sizes(model: ir.Model, input_shape: Sequence[int] | None) -> None:
    """Gives the image static sizes and a symbolic batch, and infers every other shape.

    ExportError where a spatial size stays symbolic.
    """
    image = single_image_input(model)
    assert image.shape is not None
    sizes = list(dims(image)[1:]) if input_shape is None else [int(n) for n in input_shape]
    for have, want in zip(dims(image)[1:], sizes, strict=False):
        if have is not None and have != want:
            raise ExportError(f"input_shape={tuple(sizes)} does not fit the model's input {image.shape}")
    if len(sizes) != 3 or None in sizes:
        raise ExportError(
            f"input {image.name!r} has dynamic sizes {image.shape}: pass input_shape=(channels, height, width), "
            "on the command line --input-shape 3 224 224"
        )
    image.shape = ir.Shape(["batch", *sizes])
    _free_batch(model.graph)
    _forget_shapes(model.graph)
    optimizer.fold_constants(model)
    _run(
        model,
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ShapeInferencePass(),
    )
    while _complete_reshapes(model.graph):
        _run(model, passes.ShapeInferencePass())
    _settle_reshapes(model.graph)
    _pool_globally(model.graph)
    _run(model, passes.RemoveUnusedNodesPass())


def _forget_shapes(graph: ir.Graph) -> None:
    """Drops recorded shapes, which may state the batch the model was traced with."""
    for node in graph:
        for y in node.outputs:
            y.shape = None


def _free_batch(graph: ir.Graph) -> None:
    """Reshapes of what depends on the image keep whatever batch comes where their constant target pins a leading 1."""
    dependent = set(graph.inputs)
    for node in list(graph):
        if not any(x in dependent for x in node.inputs):
            continue
        dependent.update(node.outputs)
        target = constant_of(node.inputs[1]) if node.op_type == "Reshape" else None
        if target is None or target.ndim != 1 or len(target) < 2 or target[0] != 1:
            continue
        name = f"{node.outputs[0].name}_shape"
        copied = -1 in target[1:]  # only one size may be -1: the batch is then copied, which a 0 says
        if copied and attribute(node, "allowzero", 0):
            if 0 in target[1:]:
                continue
            del node.attributes["allowzero"]
        freed = np.array([0 if copied else -1, *target[1:]], np.int64)
        value = initializer(graph, name, freed)
        node.replace_input_with(1, value)


def _complete_reshapes(graph: ir.Graph) -> bool:
    """Settles one size of a Reshape's output that inference left open, from the number of elements. True if it found one.

    A size that is found names every other occurrence of its symbol.
    """
    found: dict[object, int | str] = {}
    for node in graph:
        if node.op_type == "Reshape":
            found.update(_open_size(node.inputs[0], node.outputs[0]))
        for y in node.outputs:
            if y.shape is not None and any(isinstance(d, ir.SymbolicDim) and d.value in found for d in y.shape):
                sizes = [found.get(d.value, d) if isinstance(d, ir.SymbolicDim) else d for d in y.shape]
                y.shape = ir.Shape(sizes)
    return bool(found)


def _pool_globally(graph: ir.Graph) -> None:
    """Writes a mean over the last two axes as GlobalAveragePool: it stays in the blocked layout of the convolutions before it."""
    for node in list(graph):
        x, y = (node.inputs[0] if node.inputs else None), node.outputs[0]
        if node.op_type != "ReduceMean" or x is None or x.shape is None or len(x.shape) != 4 or y.shape is None:
            continue
        axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
        if axes is None or {int(a) % 4 for a in axes} != {2, 3}:
            continue
        pooled = ir.node("GlobalAveragePool", [x])
        nodes, result = [pooled], pooled.outputs[0]
        if not attribute(node, "keepdims", 1):
            pooled.outputs[0].shape, pooled.outputs[0].type = ir.Shape([*y.shape, 1, 1]), y.type
            sizes = initializer(graph, f"{y.name}_sizes", np.array([-1, *dims(y)[1:]], np.int64))
            nodes.append(ir.node("Reshape", [result, sizes]))
            result = nodes[-1].outputs[0]
        name, shape, kind = y.name, y.shape, y.type
        graph.insert_after(node, nodes)
        y.replace_all_uses_with(result, replace_graph_outputs=True)
        graph.remove(node, safe=False)
        result.name, result.shape, result.type = name, shape, kind


def _settle_reshapes(graph: ir.Graph) -> None:
    """Gives every Reshape whose sizes are computed, and known but for the batch, a constant target."""
    for node in graph:
        if node.op_type != "Reshape" or constant_of(node.inputs[1]) is not None:
            continue
        y = node.outputs[0]
        if y.shape is not None and dims(y).count(None) <= 1:
            target = np.array([-1 if d is None else d for d in dims(y)], np.int64)
            node.replace_input_with(1, initializer(graph, f"{y.name}_shape", target))


def _open_size(x: ir.Value | None, y: ir.Value) -> dict[object, int | str]:
    """The symbol that is y's only open size besides the batch, and what it must be."""
    if x is None or x.shape is None or y.shape is None or not len(x.shape) or not is_batch(x.shape[0]):
        return {}
    before = dims(x)[1:]
    open_sizes = [d for d in y.shape if isinstance(d, ir.SymbolicDim) and not is_batch(d)]
    if None in before or len(open_sizes) != 1 or open_sizes[0].value is None:
        return {}
    elements = math.prod(before)  # type: ignore[arg-type]
    known = math.prod(d for d in y.shape if isinstance(d, int))
    if any(is_batch(d) for d in y.shape):
        return {open_sizes[0].value: elements // known} if known and elements % known == 0 else {}
    return {open_sizes[0].value: "batch"} if known == elements else {}


def strip_final_activation(output: ir.Value) -> tuple[ir.Value, str | None]:
    """The logits behind a final Softmax or Sigmoid (through reshapes), and that operator's name; else the value itself."""
    value: ir.Value | None = output
    while True:
        node = value.producer() if value is not None else None
        if node is None or node.op_type not in ("Softmax", "Sigmoid", "Identity", "Flatten", "Reshape", "Squeeze"):
            return output, None
        value = node.inputs[0]
        if node.op_type in ("Softmax", "Sigmoid"):
            if value is None or value.shape is None or len(value.shape) != 2:
                return output, None
            return value, node.op_type


def check_logits(logits: ir.Value) -> int:
    """Number of classes. ExportError unless the value is (batch, classes) in floating point."""
    shape = dims(logits) if logits.shape is not None else ()
    if len(shape) != 2 or shape[1] is None:
        raise ExportError(
            f"output {logits.name!r} has shape {logits.shape}: camrt explains classifiers, whose output is (batch, classes)"
        )
    return shape[1]


def channels_first(model: ir.Model) -> None:
    """Makes a channels-last image input (batch, H, W, C) an NCHW one, by a Transpose behind it."""
    image = single_image_input(model)
    sizes = dims(image)
    if sizes[3] not in (1, 3, 4) or sizes[1] in (1, 3, 4):
        return
    assert image.shape is not None
    n, h, w, c = image.shape
    first = ir.Value(name=f"{image.name}_nchw", shape=ir.Shape([n, c, h, w]), type=image.type)
    transpose = ir.node("Transpose", [first], {"perm": [0, 2, 3, 1]})
    last = transpose.outputs[0]
    last.name, last.type = f"{image.name}_nhwc", image.type
    image.replace_all_uses_with(last)
    model.graph.inputs[0] = first
    model.graph.insert_before(model.graph[0], transpose)


def check_static(graph: ir.Graph) -> None:
    """ExportError naming the first value of whose sizes more than one, the batch's, could not be inferred, or which no machine
    holds.
    """
    for y in (*graph.inputs, *(y for node in graph for y in node.outputs)):
        if not y.name or y.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE, None):
            continue
        node = y.producer()
        where = f"{y.name!r}" + ("" if node is None else f" ({node.op_type}, node {node.name!r})")
        if y.shape is None or dims(y).count(None) > 1:
            raise ExportError(
                f"the sizes of {where} are not static ({y.shape}): export the model with fixed height and width"
            )
        known = [d for d in dims(y) if d is not None]
        if min(known, default=1) < 1 or math.prod(known) > MOST_ELEMENTS:
            raise ExportError(f"the sizes of {where} are none that a network has: {y.shape}")


def check_windows(graph: ir.Graph) -> None:
    """ExportError naming the first convolution or pooling whose window is none that a network has, or does not fit."""
    for node in graph:
        if node.op_type not in ("Conv", "MaxPool", "AveragePool", "LpPool"):
            continue
        x = node.inputs[0] if node.inputs else None
        rank = len(x.shape) - 2 if x is not None and x.shape is not None else 0
        weight = node.inputs[1] if node.op_type == "Conv" and len(node.inputs) > 1 else None
        kernel = attribute(node, "kernel_shape") if weight is None else dims(weight)[2:]
        numbers = [kernel, *(attribute(node, name, [1] * rank) for name in ("strides", "dilations"))]
        pads = attribute(node, "pads", [0] * 2 * rank)
        fit = all(n is not None and len(n) == rank and all(m and 0 < m <= LARGEST_SIDE for m in n) for n in numbers)
        if rank < 1 or not fit or len(pads) != 2 * rank or not all(0 <= p <= LARGEST_SIDE for p in pads):
            raise ExportError(
                f"the window of {node.op_type} {node.name!r} is none that a network has: kernel {kernel}, strides and "
                f"dilations {numbers[1:]}, pads {pads}"
            )


def keeps_batch_apart(values: set[ir.Value]) -> bool:
    """True if every value has the image batch, alone, as its first axis."""
    return all(y.shape is not None and len(y.shape) > 0 and is_batch(y.shape[0]) for y in values)


def is_batch(size: object) -> bool:
    return str(size.value) == "batch" if isinstance(size, ir.SymbolicDim) else size == 1


def batch_norm_after(value: ir.Value) -> ir.Node | None:
    """The BatchNormalization that is the only consumer of a convolution's output, with constant statistics."""
    consumers = value.consumers()
    if len(consumers) != 1 or consumers[0].op_type != "BatchNormalization" or value.is_graph_output():
        return None
    node = consumers[0]
    return node if node.inputs[0] is value and batch_norm_affine(node) is not None else None


def batch_norm_affine(norm: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Per channel, float64: y = scale x + shift, of a BatchNormalization with constant statistics; None for another."""
    constants = [constant_of(x) for x in norm.inputs[1:5]]
    if any(c is None for c in constants):
        return None
    gamma, beta, mean, variance = (c.astype(np.float64) for c in constants)  # type: ignore[union-attr]
    scale = gamma / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    return scale, beta - scale * mean


def fold_batch_norm(model: ir.Model) -> dict[str, tuple[str, np.ndarray, np.ndarray]]:
    """Folds every BatchNormalization into the Conv before it, in place.

    Returns for each folded convolution's output A its successor y and the channel vectors of y = scale A + shift, float64,
    from which everything linear in A and its gradient is recovered without a division.
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
        given = conv.inputs[2] if len(conv.inputs) > 2 else None
        bias = constant_of(given)
        if given is not None and bias is None:
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


def initializer(graph: ir.Graph, name: str, data: np.ndarray) -> ir.Value:
    value = ir.Value(
        name=name,
        shape=ir.Shape(data.shape),
        type=ir.TensorType(ir.DataType.from_numpy(data.dtype)),
        const_value=ir.tensor(data, name=name),
    )
    graph.register_initializer(value)
    return value


def finish(model: ir.Model, outputs: Sequence[ir.Value]) -> ir.Model:
    """Makes `outputs` the graph's outputs and drops what none of them needs."""
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs)
    return tidy(model)


def infer_types(model: ir.Model) -> None:
    """Gives every value its type and what can be known of its shape."""
    _run(model, passes.ShapeInferencePass())


def tidy(model: ir.Model) -> ir.Model:
    """Sorts the graph, drops what no output needs, gives every value a name of its own."""
    _run(model, passes.TopologicalSortPass(), passes.RemoveUnusedNodesPass(), passes.NameFixPass())
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    return model
