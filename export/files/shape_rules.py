"""Shape rules for operators where ONNX's shape inference is not enough: each is a function (walk, node) -> True if it
found the shapes of the node's outputs.

A file that was traced with a fixed batch holds literal sizes, such as a Reshape to (1, 256), that fail or are wrong for
any other batch. A rule replaces them where the order of the elements shows which size is the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ...runtime.errors import ExportError
from ..tape import attribute, initializer
from .facts import BatchPinned, Facts, Shape, changing, label

if TYPE_CHECKING:
    from .shapes import ShapeWalk

Rule = Callable[["ShapeWalk", ir.Node], bool]
RULES: dict[str, Rule] = {}


def rule(op_type: str) -> Callable[[Rule], Rule]:
    """Registers what settles the nodes of an operator."""

    def register(function: Rule) -> Rule:
        RULES[op_type] = function
        return function

    return register


@rule("Shape")
def shape(walk: ShapeWalk, node: ir.Node) -> bool:
    x = node.inputs[0]
    assert x is not None
    start, end = attribute(node, "start", 0), attribute(node, "end")
    arrays = [np.array(s[start:end], np.int64) for s in walk.facts[x].shapes]
    contents = tuple(arrays[:1] * len(arrays)) if not walk.facts[x].varies else tuple(arrays)
    _settle(walk, node, contents)
    return True


@rule("CastLike")
def cast_like(walk: ShapeWalk, node: ir.Node) -> bool:
    """Becomes a Cast to the type of its second input."""
    x, like = node.inputs[0], node.inputs[1]
    assert x is not None and like is not None and like.dtype is not None
    node.op_type, node.version = "Cast", None
    node.attributes["to"] = ir.AttrInt64("to", like.dtype)
    node.resize_inputs(1)
    return False


@rule("MaxPool")
@rule("AveragePool")
@rule("LpPool")
def pool(walk: ShapeWalk, node: ir.Node) -> bool:
    """Does without ceil_mode where a window that it adds would start in the padding behind the input: engines leave
    such a window out, but before opset 22 ONNX counts it.
    """
    x = node.inputs[0]
    assert x is not None
    size, kernel = walk.facts[x].shapes[0][2:], attribute(node, "kernel_shape")
    if not attribute(node, "ceil_mode", 0) or attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        return False
    strides, dilations = (attribute(node, name, [1] * len(size)) for name in ("strides", "dilations"))
    pads = list(attribute(node, "pads", [0] * 2 * len(size)))
    left_out, hangs = False, [0] * len(size)
    for i, (n, k, s, d) in enumerate(zip(size, kernel, strides, dilations, strict=True)):
        span = n + pads[i] + pads[len(size) + i] - (d * (k - 1) + 1)
        if span % s and (span // s + 1) * s >= n + pads[i]:
            left_out = True
        elif span % s:
            hangs[i] = s - span % s
    after = [p + hang for p, hang in zip(pads[len(size) :], hangs, strict=True)]
    counted = node.op_type == "AveragePool" and attribute(node, "count_include_pad", 0) and any(pads)
    if left_out and not (counted and any(hangs)) and all(p < k for p, k in zip(after, kernel, strict=True)):
        node.attributes["ceil_mode"] = ir.AttrInt64("ceil_mode", 0)
        node.attributes["pads"] = ir.AttrInt64s("pads", [*pads[: len(size)], *after])
        if any(hangs):
            node.attributes.pop("count_include_pad", None)
    return False


@rule("StopGradient")
def stop_gradient(walk: ShapeWalk, node: ir.Node) -> bool:
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    walk.facts[y], y.type = walk.facts[x], x.type
    return True


@rule("Size")
def size(walk: ShapeWalk, node: ir.Node) -> bool:
    x = node.inputs[0]
    assert x is not None
    _settle(walk, node, tuple(np.array(math.prod(s), np.int64) for s in walk.facts[x].shapes))
    return True


def _settle(walk: ShapeWalk, node: ir.Node, contents: tuple[np.ndarray, ...]) -> None:
    y = node.outputs[0]
    walk.facts[y] = Facts(tuple(tuple(c.shape) for c in contents), contents)
    y.type = ir.TensorType(ir.DataType.INT64)


@rule("Squeeze")
def squeeze(walk: ShapeWalk, node: ir.Node) -> bool:
    """Without axes, a Squeeze removes every size of 1, also a batch of 1: the axes are made explicit."""
    if len(node.inputs) > 1 or attribute(node, "axes") is not None:
        return False
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    shapes = walk.facts[x].shapes
    axes = [a for a in range(len(shapes[0])) if all(s[a] == 1 for s in shapes)]
    if shapes[0].count(1) > len(axes):
        walk.squeezed = node
    contents = walk.facts[x].contents
    squeezed_shapes = tuple(tuple(n for a, n in enumerate(s) if a not in axes) for s in shapes)
    new = None if contents is None else tuple(c.reshape(s) for c, s in zip(contents, squeezed_shapes, strict=True))
    walk.facts[y], y.type = Facts(squeezed_shapes, new), x.type

    def write() -> None:
        if not axes:
            node.op_type, node.version = "Identity", None
            return
        node.resize_inputs(2)
        node.replace_input_with(1, initializer(walk.graph, f"{y.name}_axes", np.array(axes, np.int64)))

    walk.edits.append(write)
    return True


@rule("Gather")
def gather(walk: ShapeWalk, node: ir.Node) -> bool:
    """A Gather of every element of a vector, in order, becomes a Reshape. PyTorch's exporter writes the as_strided of a
    pooled map in this way.
    """
    x, indices, y = node.inputs[0], node.inputs[1], node.outputs[0]
    assert x is not None and indices is not None
    taken, shapes = walk.facts[indices], walk.facts[x].shapes
    if taken.contents is None or len(shapes[0]) != 1 or not walk.facts[x].varies or attribute(node, "axis", 0):
        return False
    for (size,), index in zip(shapes, taken.contents, strict=True):
        if not np.array_equal(index.reshape(-1), np.arange(size)):
            return False
    place = changing(taken.shapes)
    if place is None:
        return False
    walk.facts[y], y.type = Facts(taken.shapes), x.type
    literal = np.array([-1 if a == place else n for a, n in enumerate(taken.shapes[0])], np.int64)

    def write() -> None:
        node.op_type, node.version = "Reshape", None
        node.attributes.pop("axis", None)
        node.replace_input_with(1, initializer(walk.graph, f"{y.name}_sizes", literal))

    walk.edits.append(write)
    return True


@rule("Reshape")
def reshape(walk: ShapeWalk, node: ir.Node) -> bool:
    x, target, y = node.inputs[0], node.inputs[1], node.outputs[0]
    assert x is not None and target is not None
    facts, target_facts = walk.facts[x], walk.facts[target]
    if target_facts.contents is None:
        raise ExportError(
            f"the sizes that {label(node)} gives depend on the image's pixel values: camrt needs sizes that depend "
            "only on the input's size"
        )
    if facts.contents is not None and not facts.varies and target_facts.constant is not None:
        return False  # a constant
    keeps_zero = bool(attribute(node, "allowzero", 0))
    resolved = [_resolve(s, t.tolist(), keeps_zero) for s, t in zip(facts.shapes, target_facts.contents, strict=True)]
    if resolved[0] is None:
        sizes = target_facts.contents[0].tolist()
        times, rest = divmod(math.prod(sizes), math.prod(facts.shapes[0]))
        held = f": the file is for a batch of {times}; export it with a batch of 1" if times > 1 and not rest else ""
        raise ExportError(f"{label(node)} cannot turn {list(facts.shapes[0])} into {sizes}{held}")
    y.type = x.type
    if not facts.varies or target_facts.constant is None:
        if None in resolved:
            raise BatchPinned(node, f"is written for batch {walk.batches[0]}")
        walk.facts[y] = Facts(tuple(r for r in resolved if r is not None))
        _note_inner(walk, x, y)
        return True
    places = _batch_places(walk, x, resolved[0])
    if None not in resolved:
        axis = changing(resolved)  # type: ignore[arg-type]
        if axis is not None and (walk.literal or axis in places[:1] or resolved[0][axis] == walk.batches[0]):
            walk.facts[y] = Facts(tuple(r for r in resolved if r is not None))
            _note_inner(walk, x, y)
            return True
    if not places:
        raise BatchPinned(node, f"is written for batch {walk.batches[0]}")
    place, first = places[0], resolved[0]
    grown = [tuple(n * b // walk.batches[0] if a == place else n for a, n in enumerate(first)) for b in walk.batches]
    walk.facts[y] = Facts(tuple(grown))
    _note_inner(walk, x, y)
    literal = np.array([-1 if a == place else n for a, n in enumerate(first)], np.int64)
    walk.edits.append(lambda: node.replace_input_with(1, initializer(walk.graph, f"{y.name}_sizes", literal)))
    return True


def _prefix(walk: ShapeWalk, x: ir.Value) -> int | None:
    """The product of the sizes of x outside (before) the batch, in row-major order and at the first batch size; None if
    no single axis changes with the batch.
    """
    shapes = walk.facts[x].shapes
    axis = changing(shapes)
    if axis is None:
        return None
    outside = math.prod(shapes[0][:axis])
    return outside * (shapes[0][axis] // walk.batches[0]) if x in walk.inner else outside


def _batch_places(walk: ShapeWalk, x: ir.Value, out: Shape) -> list[int]:
    """The axes of `out`, a reshape of x at the first batch size, that the batch may belong to; the likeliest first.

    A reshape keeps row-major order, so the batch stays at its place in that order: at a boundary between two sizes or
    inside one. At a boundary, a size equal to the traced batch comes first; then the next size. If the number of axes
    falls, the size before, with which the batch was merged, precedes the next size.
    """
    prefix, axis = _prefix(walk, x), changing(walk.facts[x].shapes)
    if prefix is None or axis is None:
        return []
    traced = walk.batches[0]
    ends = np.cumprod([1, *out]).tolist()
    boundary = [j for j in range(len(out)) if ends[j] == prefix]
    own = [j for j in boundary if out[j] == traced]
    after = [j for j in boundary if out[j] % traced == 0 and j not in own]
    before = [j for j in range(len(out)) if ends[j] < prefix and prefix * traced <= ends[j + 1]]
    falls = len(out) < len(walk.facts[x].shapes[0])
    return [*own, *(before + after if falls else after + before)]


def _note_inner(walk: ShapeWalk, x: ir.Value, y: ir.Value) -> None:
    """Adds y, a reshape of x, to `walk.inner` if the batch is innermost in a merged size."""
    prefix, shapes = _prefix(walk, x), walk.facts[y].shapes
    axis = changing(shapes)
    if prefix is None or axis is None or shapes[0][axis] == walk.batches[0]:
        return
    if math.prod(shapes[0][:axis]) != prefix:
        walk.inner.add(y)


@rule("Expand")
def expand(walk: ShapeWalk, node: ir.Node) -> bool:
    """A literal size that equals the traced batch, on the axis that changes with the batch, becomes 1: it fits any."""
    x, target, y = node.inputs[0], node.inputs[1], node.outputs[0]
    assert x is not None and target is not None
    literal = walk.facts[target].constant
    if literal is None or not walk.facts[x].varies or walk.batches[0] == 1:
        return False
    shift = len(literal) - len(walk.facts[x].shapes[0])
    axis = changing(walk.facts[x].shapes)
    if axis is None or shift + axis < 0 or literal[shift + axis] != walk.facts[x].shapes[0][axis]:
        return False
    changed = literal.copy()
    changed[shift + axis] = 1
    walk.facts[y] = Facts(tuple(tuple(np.broadcast_shapes(s, tuple(changed))) for s in walk.facts[x].shapes))
    y.type = x.type
    walk.edits.append(lambda: node.replace_input_with(1, initializer(walk.graph, f"{y.name}_sizes", changed)))
    return True


@rule("Concat")
def concat(walk: ShapeWalk, node: ir.Node) -> bool:
    """Constants of the traced batch size (class tokens) that join tensors of a free batch are repeated to it."""
    inputs = [x for x in node.inputs if x is not None]
    facts = [walk.facts[x] for x in inputs]
    if all(f.contents is not None for f in facts) or not any(f.varies for f in facts):
        return False
    rank, traced = len(facts[0].shapes[0]), walk.batches[0]
    axis = attribute(node, "axis") % rank
    beside = {a for f in facts if f.varies for a in [changing(f.shapes)] if a is not None and a != axis}
    if len(beside) != 1:
        return False
    (place,) = beside
    like = next(x for x, f in zip(inputs, facts, strict=True) if f.varies)
    if walk.facts[like].shapes[0][place] != traced:
        return False
    fixed = [i for i, f in enumerate(facts) if not f.varies]
    if not fixed or any(facts[i].shapes[0][place] != traced for i in fixed):
        return False
    if any(facts[i].of_image for i in fixed):
        raise BatchPinned(node, "joins a tensor whose size changes with the batch to one whose size does not")
    if traced != 1 and any(not _rows_alike(facts[i].constant, place) for i in fixed):
        raise BatchPinned(node, f"joins constants that differ between its {traced} images")
    y = node.outputs[0]
    y.type = inputs[0].type
    joined = sum(f.shapes[0][axis] for f in facts)
    walk.facts[y] = Facts(
        tuple(tuple(joined if a == axis else n for a, n in enumerate(s)) for s in walk.facts[like].shapes)
    )
    walk.edits.append(lambda: _repeat(walk, node, inputs, fixed, like, place))
    return True


def _repeat(
    walk: ShapeWalk, node: ir.Node, inputs: list[ir.Value], fixed: list[int], like: ir.Value, place: int
) -> None:
    graph = walk.graph
    for i in fixed:
        x = inputs[i]
        name = x.name
        sizes = list(walk.facts[x].shapes[0])
        nodes = [ir.node("Shape", [like], {"start": place, "end": place + 1})]
        if sizes[place] != 1:
            bounds = [
                initializer(graph, f"{name}_row{k}", np.array([n], np.int64)) for k, n in enumerate((0, 1, place))
            ]
            nodes.append(ir.node("Slice", [x, *bounds]))
            x = nodes[-1].outputs[0]
        ones = [np.ones(place, np.int64), np.ones(len(sizes) - 1 - place, np.int64)]
        left, right = ([initializer(graph, f"{name}_ones{k}", a)] if a.size else [] for k, a in enumerate(ones))
        parts = [*left, nodes[0].outputs[0], *right]
        nodes.append(ir.node("Concat", parts, {"axis": 0}))
        nodes.append(ir.node("Expand", [x, nodes[-1].outputs[0]]))
        for k, new_node in enumerate(nodes):
            new_node.outputs[0].name = f"{node.outputs[0].name}_{name}_{k}"
            new_node.name = new_node.outputs[0].name
        graph.insert_before(node, nodes)
        node.replace_input_with(i, nodes[-1].outputs[0])
        _settle(walk, nodes[0], tuple(np.array([b], np.int64) for b in walk.batches))
        for new_node in nodes[1:]:
            walk.walk(new_node)


@rule("Resize")
def resize(walk: ShapeWalk, node: ir.Node) -> bool:
    """Literal sizes fix the batch: they become scales, if scales give the same sizes."""
    x = node.inputs[0]
    sizes = node.inputs[3] if len(node.inputs) > 3 else None
    if x is None or sizes is None or attribute(node, "axes") is not None:
        return False
    contents = walk.facts[sizes].contents
    if contents is None:
        return False
    shapes, first = walk.facts[x].shapes, contents[0].tolist()
    axis = changing(shapes)
    if axis is not None and first[axis] != shapes[0][axis]:
        return False
    scales = np.array([f / n for f, n in zip(first, shapes[0], strict=True)], np.float32)
    if any(int(np.float32(n) * s) != f for n, s, f in zip(shapes[0], scales, first, strict=True)):
        return False
    if attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return False
    y = node.outputs[0]
    y.type = x.type
    walk.facts[y] = Facts(tuple(tuple(s[a] if a == axis else n for a, n in enumerate(first)) for s in shapes))

    def write() -> None:
        node.resize_inputs(3)
        node.replace_input_with(2, initializer(walk.graph, f"{y.name}_scales", scales))

    walk.edits.append(write)
    return True


def _rows_alike(array: np.ndarray | None, axis: int) -> bool:
    return array is not None and bool((array == array.take([0], axis)).all())


def _resolve(shape: Shape, target: Sequence[int], keeps_zero: bool) -> Shape | None:
    """The sizes that a Reshape gives; None where they do not fit."""
    sizes = [shape[i] if n == 0 and not keeps_zero and i < len(shape) else n for i, n in enumerate(target)]
    count, product = math.prod(shape), math.prod(n for n in sizes if n != -1)
    if -1 in sizes:
        if product == 0 or count % product:
            return None
        sizes[sizes.index(-1)] = count // product
    return tuple(sizes) if math.prod(sizes) == count else None
