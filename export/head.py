"""The network cut at a tap: the trunk computes the tap's activation, the head the logits from it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ..runtime.bundle.manifest import Tap
from .graph import TappedGraph, finish, is_batch, named_values
from .layers.layouts import Layout, from_maps, layouts, prefix_of, to_maps
from .tape import Tape, attribute, constant_of, dims, output

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


def trunk(graph: TappedGraph) -> ir.Model:
    """image -> logits, `activation` (B, K, h, w) and `context:i`: whatever else the head reads; and `means` (B, K) if
    the head reads those.
    """
    model = graph.model.clone()
    tap, tapped, logits = _parts(graph, model)
    means = _means(tapped, tap)  # before there are other readers
    model.graph.inputs[0].name = "image"
    tape = Tape(model.graph)
    outputs = [
        output(tape, logits, "logits", ["batch", dims(logits)[1]]),
        output(tape, to_maps(tape, tapped, tap), "activation", ["batch", tap.channels, *tap.grid]),
    ]
    if means:
        rows = tape.Reshape(means[0].outputs[0], [-1, tap.channels])
        outputs.append(output(tape, rows, "means", ["batch", tap.channels]))
    context = [_moved(tape, x, axis, 0) for x, axis in (_context(model.graph, tapped, logits) or {}).items()]
    if tap.prefix:
        context.append(prefix_of(tape, tapped, tap))
        context[-1].shape, context[-1].type = ir.Shape(["batch", tap.prefix, tap.channels]), tapped.type
    outputs += [output(tape, x, f"context:{i}", ["batch", *dims(x)[1:]]) for i, x in enumerate(context)]
    return finish(model, outputs)


def head(graph: TappedGraph) -> ir.Model | None:
    """`activation` (N, K, h, w), or where the network reads only its means over the grid `means` (N, K); and
    `context:i`, all of batch N -> logits (N, classes).

    None where the network cannot be cut at the tap: another tensor of the image that the head reads is not floating
    point or has no batch axis of its own, or the logits do not depend on the tap.
    """
    model = graph.model.clone()
    tap, tapped, logits = _parts(graph, model)
    context = _context(model.graph, tapped, logits)
    if context is None:
        return None
    tape = Tape(model.graph)
    means = _means(tapped, tap)
    activation = _input("means", [tap.channels]) if means else _input("activation", (tap.channels, *tap.grid))
    inputs = [
        _input(f"context:{i}", [n for a, n in enumerate(dims(x)) if a != b]) for i, (x, b) in enumerate(context.items())
    ]
    context_values = [_moved(tape, x, 0, axis) for x, axis in zip(inputs, context.values(), strict=True)]
    prefix = _input(f"context:{len(inputs)}", (tap.prefix, tap.channels)) if tap.prefix else None
    after = _downstream(model.graph, tapped)
    replaced = dict(zip(context, context_values, strict=True))
    if means:
        replaced |= {node.outputs[0]: _in_shape_of(tape, activation, node.outputs[0]) for node in means}
    else:
        replaced[tapped] = from_maps(tape, activation, tap, prefix)
    for node in after:
        for i, x in enumerate(node.inputs):
            if x in replaced:
                node.replace_input_with(i, replaced[x])
    model.graph.inputs.clear()
    model.graph.inputs.extend([activation, *inputs, *([prefix] if prefix is not None else [])])
    logits = replaced.get(logits, logits)  # the means may be the logits
    return finish(model, [output(tape, logits, "logits", ["batch", dims(logits)[1]])])


def _means(tapped: ir.Value, tap: Tap) -> list[ir.Node]:
    """The nodes that read the tap, if each gives its means over the grid; else none."""
    readers = tapped.consumers()
    return list(readers) if readers and not tap.prefix and all(_is_mean(node, tap) for node in readers) else []


def _is_mean(node: ir.Node, tap: Tap) -> bool:
    """Whether the node gives the means over the grid of the tap that it reads."""
    if node.op_type == "GlobalAveragePool":
        return tap.layout == "NCHW"
    if node.op_type == "AveragePool":
        whole = tuple(attribute(node, "kernel_shape", ())) == tap.grid and not any(attribute(node, "pads", [0]))
        return tap.layout == "NCHW" and whole and attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
    if node.op_type != "ReduceMean":
        return False
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = attribute(node, "axes") if given is None else constant_of(given)
    spatial = {"NCHW": {2, 3}, "NHWC": {1, 2}, "tokens": {1}, "LND": {0}}[tap.layout]
    return axes is not None and {int(a) % (4 if len(spatial) == 2 else 3) for a in axes} == spatial


def _in_shape_of(tape: Tape, means: ir.Value, value: ir.Value) -> ir.Value:
    """means (N, K) in the shape of the means that a node of the network gives: with axes of size 1, or without."""
    sizes = [-1 if not isinstance(n, int) else n for n in value.shape or ()]
    return means if len(sizes) == 2 else tape.Reshape(means, sizes)


def normalize(graph: TappedGraph) -> ir.Model:
    """image -> `normalized` (B, C', H, W): what the network's first layer reads."""
    model = graph.model.clone()
    value = named_values(model.graph)[str(graph.normalized)]
    model.graph.inputs[0].name = "image"
    return finish(model, [output(Tape(model.graph), value, "normalized", ["batch", *dims(value)[1:]])])


def score(graph: TappedGraph) -> ir.Model:
    """`normalized` -> logits."""
    model = graph.model.clone()
    values = named_values(model.graph)
    value, logits = values[str(graph.normalized)], values[graph.logits]
    entry = _input("normalized", dims(value)[1:])
    for node in list(value.consumers()):
        for i, x in enumerate(node.inputs):
            if x is value:
                node.replace_input_with(i, entry)
    model.graph.inputs.clear()
    model.graph.inputs.append(entry)
    return finish(model, [output(Tape(model.graph), logits, "logits", ["batch", dims(logits)[1]])])


def _parts(graph: TappedGraph, model: ir.Model):
    values = named_values(model.graph)
    ((tap, name),) = graph.taps
    return tap, values[name], values[graph.logits]


def _input(name: str, sizes: Sequence[int | None]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(["batch", *sizes]), type=ir.TensorType(ir.DataType.FLOAT))


def _downstream(graph: ir.Graph, *sources: ir.Value) -> list[ir.Node]:
    """Nodes that depend on one of the values, in the graph's order."""
    reached, nodes = set(sources), []
    for node in graph:
        if any(x in reached for x in node.inputs):
            reached.update(node.outputs)
            nodes.append(node)
    return nodes


def _moved(tape: Tape, value: ir.Value, axis: int, to: int) -> ir.Value:
    """`value` with the axis `axis` moved to position `to`."""
    if axis == to:
        return value
    assert value.shape is not None
    perm = [a for a in range(len(value.shape)) if a != axis]
    perm.insert(to, axis)
    moved = tape.Transpose(value, perm=perm)
    moved.shape, moved.type = ir.Shape([value.shape[a] for a in perm]), value.type
    return moved


def _context(graph: ir.Graph, tapped: ir.Value, logits: ir.Value) -> dict[ir.Value, int] | None:
    """{value: its batch axis} for the values that the logits read beside the tap and that depend on the image. None if
    one has no batch axis of its own or is not floating point, or if the logits do not depend on the tap.
    """
    after = _downstream(graph, tapped)
    inside = {tapped, *(y for node in after for y in node.outputs)}
    if logits not in inside:
        return None
    of_image = {graph.inputs[0], *(y for node in _downstream(graph, graph.inputs[0]) for y in node.outputs)}
    needed, context = {logits}, {}
    for node in reversed(after):
        if not any(y in needed for y in node.outputs):
            continue
        for x in node.inputs:
            if x in inside:
                needed.add(x)  # type: ignore[arg-type]
            elif x is not None and x in of_image and constant_of(x) is None:
                context[x] = None
    layout_by_value = layouts(graph)
    batch_axes = {}
    for x in context:
        axis = _batch_axis(graph, x, layout_by_value.get(x)) if x.dtype in _FLOATS else None
        if axis is None:
            return None
        batch_axes[x] = axis
    return batch_axes


def _batch_axis(graph: ir.Graph, value: ir.Value, layout: Layout | None) -> int | None:
    """The axis with one row per image, if all other sizes are static; else None, for example where attention heads are
    merged into the batch axis.
    """
    sizes = list(value.shape or ())
    if layout is not None:
        axis = layout.batch_axis
    else:
        axis = next((i for i, n in enumerate(sizes) if is_batch(graph, n) and (i == 0 or not isinstance(n, int))), None)
    if axis is None or any(not isinstance(n, int) for i, n in enumerate(sizes) if i != axis):
        return None
    return axis
