"""A model in today's opset -> a graph of static sizes and a free batch, in the forms that the rest of export reads."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as passes

from ...runtime.bundle.manifest import LARGEST_SIDE, MOST_ELEMENTS
from ...runtime.errors import ExportError
from ..graph import run_passes
from ..tape import attribute, dims
from .facts import BatchPinned
from .patterns import simplify, write_boxes
from .shapes import ShapeWalk

_PICTURES = (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64)


def image_input(model: ir.Model) -> ir.Value:
    """The model's image input. ExportError if there is not exactly one input of numbers and rank 4."""
    inputs = model.graph.inputs
    if len(inputs) != 1:
        names = ", ".join(f"{v.name} {_shape_text(v)}" for v in inputs) or "none"
        raise ExportError(f"the model has {len(inputs)} inputs ({names}): camrt explains models with one image input")
    image = inputs[0]
    if image.dtype != ir.DataType.FLOAT and image.dtype not in _PICTURES:
        raise ExportError(
            f"input {image.name!r} is {image.dtype}: camrt takes images of a floating type, uint8, int8, int32 or int64"
        )
    if image.shape is None or len(image.shape) != 4:
        extra = ""
        if image.shape is not None and len(image.shape) == 3:
            has_batch = dims(image)[0] in (None, 1) and None not in dims(image)[1:] and dims(image)[1] not in (1, 3, 4)
            extra = f": it has no {'channel' if has_batch else 'batch'} axis"
        raise ExportError(
            f"input {image.name!r} has shape {_shape_text(image)}{extra}: camrt takes images (batch, channels, height, "
            "width)"
        )
    return image


def _shape_text(value: ir.Value) -> str:
    return "of unknown shape" if value.shape is None else str(value.shape)


def channels_first(model: ir.Model, input_shape: Sequence[int] | None = None) -> None:
    """Makes a channels-last image input (batch, H, W, C) an NCHW one, by a Transpose behind it.

    input_shape (C, H, W): what the user says of a file whose sizes are open.
    """
    image = image_input(model)
    sizes = dims(image)
    if sizes[1] in (1, 3, 4) or (sizes[3] not in (1, 3, 4) and not _turned_at_once(image)):
        return
    if sizes[3] is None and input_shape is None:
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


def _turned_at_once(image: ir.Value) -> bool:
    """Whether all that reads the image turns it from channels-last."""
    readers = image.consumers()
    return bool(readers) and all(
        n.op_type == "Transpose" and list(attribute(n, "perm", [])) == [0, 3, 1, 2] for n in readers
    )


def take_numbers_as_float(model: ir.Model) -> bool:
    """Makes an integer image input float32, which is exact for pixels (integers up to 2^24). Returns whether it was
    integer.
    """
    image = image_input(model)
    if image.dtype == ir.DataType.FLOAT:
        return False
    graph = model.graph
    image.type = ir.TensorType(ir.DataType.FLOAT)
    for node in image.consumers():
        if node.op_type == "DequantizeLinear":
            _, scale, zero = [*node.inputs, None][:3]
            nodes, x = [], image
            if zero is not None:
                nodes.append(ir.node("Cast", [zero], {"to": ir.DataType.FLOAT}))
                nodes.append(ir.node("Sub", [x, nodes[-1].outputs[0]]))
                x = nodes[-1].outputs[0]
            nodes.append(ir.node("Mul", [x, scale]))
            for i, new_node in enumerate(nodes):
                new_node.name = new_node.outputs[0].name = f"{node.outputs[0].name}_{i}"
            graph.insert_before(node, nodes)
            y, result = node.outputs[0], nodes[-1].outputs[0]
            y.replace_all_uses_with(result, replace_graph_outputs=True)
            graph.remove(node, safe=False)
            result.name = y.name
    return True


def settle(model: ir.Model, input_shape: Sequence[int] | None, pinned: bool = False) -> str | int:
    """Gives every value its sizes, in place: static ones, and a free batch, or batch 1 with a warning where it cannot
    be freed.

    input_shape: (channels, height, width), where the file leaves them open. pinned: batch 1 in any case. Returns the
    manifest's `batch`. ExportError where sizes stay open or do not fit.
    """
    image = image_input(model)
    assert image.shape is not None
    declared, *sizes = [None if d is None or d < 1 else d for d in dims(image)]  # Paddle writes -1 for what is open
    if input_shape is not None:
        for have, want in zip(sizes, input_shape, strict=True):
            if have is not None and have != want:
                raise ExportError(f"input_shape={tuple(input_shape)} does not fit the model's input {image.shape}")
        sizes = [int(n) for n in input_shape]
    if None in sizes:
        raise ExportError(
            f"input {image.name!r} has dynamic sizes {image.shape}: pass input_shape=(channels, height, width), on the "
            "command line --input-shape 3 224 224"
        )
    traced = declared or 1
    image.shape = ir.Shape(["batch", *sizes])
    walk, batch = None, "dynamic"
    if not pinned:
        walk = _free_walk(model, traced, declared is None)
    if walk is None:
        image.shape, batch = ir.Shape([1, *sizes]), 1
        walk = ShapeWalk(model, (1,))
    write_boxes(walk)
    walk.apply()
    run_passes(
        model,
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
    )
    simplify(model.graph)
    run_passes(model, passes.RemoveUnusedNodesPass(), passes.NameFixPass())
    check_sizes(model.graph)
    return batch


def _free_walk(model: ir.Model, traced: int, declared_free: bool) -> ShapeWalk | None:
    """Walks the shapes with a free batch; None, with a warning, where a batch of 1 cannot be freed. If the file
    declares a free batch, its literal sizes are first taken as they are. ExportError where sizes do not fit, or where a
    batch larger than 1 cannot be freed.
    """
    batches = (traced, traced + 1, traced + 2)
    if declared_free:
        with contextlib.suppress(BatchPinned, ExportError):
            return ShapeWalk(model, batches, literal=True)
    try:
        return ShapeWalk(model, batches)
    except BatchPinned as problem:
        if traced != 1:
            raise ExportError(f"the batch is fixed at {traced} and cannot be freed: {problem}") from None
        warnings.warn(f"the bundle explains one image at a time (batch 1): {problem}", stacklevel=6)
        return None


def check_sizes(graph: ir.Graph) -> None:
    """ExportError names the first tensor that is empty or has more than MOST_ELEMENTS numbers, or the first convolution
    or pooling whose window is larger than LARGEST_SIDE or does not fit its input.
    """
    for y in (*graph.inputs, *(y for node in graph for y in node.outputs)):
        if y.shape is None:
            continue
        sizes = [d for d in dims(y) if d is not None]
        if min(sizes, default=1) < 1 or math.prod(sizes) > MOST_ELEMENTS:
            node = y.producer()
            where = f"{y.name!r}" + ("" if node is None else f" ({node.op_type}, node {node.name!r})")
            raise ExportError(f"{where} has the sizes {y.shape}: this is no usable network")
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
                f"the window of {node.op_type} {node.name!r} is larger than {LARGEST_SIDE}, or does not fit its input: "
                f"kernel {kernel}, strides and dilations {numbers[1:]}, pads {pads}: this is no usable network"
            )
