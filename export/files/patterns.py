"""Rewrites nodes of exported files into the operators that gradient rules and engines handle best, for example a layer
norm that was written in parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..tape import attribute, constant_of, dims, initializer, made_by
from .shapes import ShapeWalk


def simplify(graph: ir.Graph) -> None:
    """In place, on a graph whose shapes are known."""
    for node in list(graph):
        if (node.op_type == "Cast" and _same_type(node)) or _pools_nothing(node):
            put_in_place(graph, node, node.inputs[0], [])
    for node in list(graph):
        if node.op_type == "ReduceMean":
            _global_average(graph, node)
        elif node.op_type == "Div":
            _layer_norm(graph, node)
        elif node.op_type == "Gemm":
            _with_rows_first(graph, node)
            _product_of_rows(graph, node)
        elif node.op_type == "MatMul":
            _product_with_vector(graph, node)


def put_in_place(graph: ir.Graph, node: ir.Node, result: ir.Value | None, made: Sequence[ir.Node]) -> None:
    """Replaces a node with one output by the nodes `made`, whose last output is `result`; without nodes, `result` is a
    value that the graph already has.
    """
    y = node.outputs[0]
    assert result is not None
    for i, new in enumerate(made):
        new.name = node.name if new.outputs[0] is result else f"{node.name or y.name}_{i}"
        if new.outputs[0] is not result:
            new.outputs[0].name = f"{y.name}_{i}"
    graph.insert_after(node, list(made))
    name, shape, kind = y.name, y.shape, y.type
    y.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=False)
    if made:
        result.name, result.shape, result.type = name, shape, kind


def _same_type(node: ir.Node) -> bool:
    x, y = node.inputs[0], node.outputs[0]
    return x is not None and x.dtype is not None and x.dtype == y.dtype and not y.is_graph_output()


def _pools_nothing(node: ir.Node) -> bool:
    """Pooling over windows of one element, as adaptive pooling to the size that is there becomes."""
    if node.op_type not in ("AveragePool", "MaxPool") or len(node.outputs) > 1:
        return False
    numbers = [*attribute(node, "kernel_shape", [0]), *attribute(node, "strides", [1])]
    return all(n == 1 for n in numbers) and not any(attribute(node, "pads", [0]))


def _global_average(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrites a mean over the last two of four axes as GlobalAveragePool, which stays in the blocked layout of the
    convolutions before it.
    """
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or len(x.shape) != 4 or y.shape is None:
        return
    if reduced_axes(node) != [2, 3]:
        return
    nodes = [ir.node("GlobalAveragePool", [x])]
    if not attribute(node, "keepdims", 1):
        nodes[0].outputs[0].shape, nodes[0].outputs[0].type = ir.Shape([*y.shape, 1, 1]), y.type
        sizes = initializer(graph, f"{y.name}_sizes", np.array([-1, *dims(y)[1:]], np.int64))
        nodes.append(ir.node("Reshape", [nodes[0].outputs[0], sizes]))
    put_in_place(graph, node, nodes[-1].outputs[0], nodes)


def reduced_axes(node: ir.Node) -> list[int] | None:
    """Axes of a reduction, non-negative and sorted; None where they are not known."""
    x = node.inputs[0]
    if x is None or x.shape is None:
        return None
    rank = len(x.shape)
    axes = (
        constant_of(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else attribute(node, "axes")
    )
    if axes is None or len(axes) == 0:
        return [] if attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(int(a) % rank for a in axes)


def _with_constant(node: ir.Node | None) -> tuple[ir.Value | None, np.ndarray | None]:
    """(the other operand, the constant) of a node with one constant operand."""
    if node is None or len(node.inputs) != 2:
        return None, None
    for x, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        if constant_of(other) is not None and constant_of(x) is None:
            return x, constant_of(other)
    return None, None


def _layer_norm(graph: ir.Graph, division: ir.Node) -> None:
    """Rewrites (x - mean) / sqrt(mean((x - mean)^2) + epsilon) over the last axes, with the scale and shift after it,
    as LayerNormalization.
    """
    centred, root = division.inputs
    minus, sqrt = made_by(centred, "Sub"), made_by(root, "Sqrt")
    if minus is None or sqrt is None:
        return
    x = minus.inputs[0]
    mean = made_by(minus.inputs[1], "ReduceMean")
    variance, epsilon = _with_constant(made_by(sqrt.inputs[0], "Add"))
    spread = made_by(variance, "ReduceMean")
    if x is None or x.shape is None or mean is None or spread is None or epsilon is None or epsilon.size != 1:
        return
    square = made_by(spread.inputs[0], "Pow", "Mul")
    if square is None or square.inputs[0] is not centred:
        return
    exponent = constant_of(square.inputs[1]) if square.op_type == "Pow" else None
    squared = (
        square.inputs[1] is centred if square.op_type == "Mul" else exponent is not None and bool((exponent == 2).all())
    )
    axes, rank = reduced_axes(mean), len(x.shape)
    last = axes is not None and axes == list(range(rank - len(axes), rank)) and reduced_axes(spread) == axes
    keeps_dims = attribute(mean, "keepdims", 1) and attribute(spread, "keepdims", 1)
    if not squared or mean.inputs[0] is not x or not last or not keeps_dims or not axes:
        return
    sizes = [d for d in dims(x)[axes[0] :] if d is not None]
    if len(sizes) != len(axes) or axes[0] == 0:
        return
    end, scale = _affine(division, "Mul", sizes)
    end, shift = _affine(end, "Add", sizes)
    y = end.outputs[0]
    scale_and_shift = [
        initializer(graph, f"{y.name}_{name}", array.astype(np.float32))
        for name, array in (("scale", np.ones(sizes) if scale is None else scale), ("shift", shift))
        if array is not None
    ]
    norm = ir.node(
        "LayerNormalization", [x, *scale_and_shift], {"axis": axes[0] - rank, "epsilon": float(epsilon.reshape(-1)[0])}
    )
    put_in_place(graph, end, norm.outputs[0], [norm])


def _with_rows_first(graph: ir.Graph, gemm: ir.Node) -> None:
    """Replaces a Gemm's transA by a Transpose before it: the rows of its first operand are then the images."""
    a = gemm.inputs[0]
    if not attribute(gemm, "transA", 0) or a is None or a.shape is None or constant_of(a) is not None:
        return
    turned = ir.node("Transpose", [a], {"perm": [1, 0]})
    y = turned.outputs[0]
    y.shape, y.type, y.name = ir.Shape(list(a.shape)[::-1]), a.type, f"{gemm.outputs[0].name}_rows"
    turned.name = y.name
    graph.insert_before(gemm, turned)
    gemm.replace_input_with(0, y)
    gemm.attributes["transA"] = ir.AttrInt64("transA", 0)


def _product_of_rows(graph: ir.Graph, gemm: ir.Node) -> None:
    """Rewrites Reshape to rows, Gemm, Reshape back as a MatMul over the last axis and an Add of the bias, which keep
    the other axes.
    """
    a, weight, *bias = gemm.inputs
    before, readers = made_by(a, "Reshape"), gemm.outputs[0].consumers()
    after = readers[0] if len(readers) == 1 and readers[0].op_type == "Reshape" else None
    x = before.inputs[0] if before is not None else None
    plain = (
        not attribute(gemm, "transA", 0) and attribute(gemm, "alpha", 1.0) == 1 and attribute(gemm, "beta", 1.0) == 1
    )
    if x is None or after is None or x.shape is None or after.outputs[0].shape is None or not plain or weight is None:
        return
    y = after.outputs[0]
    if len(x.shape) < 3 or list(x.shape)[:-1] != list(y.shape)[:-1] or dims(x)[-1] != dims(a)[-1]:  # type: ignore[arg-type,index]
        return
    nodes = []
    if attribute(gemm, "transB", 0):
        nodes.append(ir.node("Transpose", [weight], {"perm": [1, 0]}))
        nodes[-1].outputs[0].shape, nodes[-1].outputs[0].type = ir.Shape(list(weight.shape)[::-1]), weight.type  # type: ignore[arg-type]
        weight = nodes[-1].outputs[0]
    nodes.append(ir.node("MatMul", [x, weight]))
    nodes[-1].outputs[0].shape, nodes[-1].outputs[0].type = y.shape, y.type
    if bias and bias[0] is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias[0]]))
    name = gemm.name
    put_in_place(graph, after, nodes[-1].outputs[0], nodes)
    nodes[-1].name = name or nodes[-1].name


def _product_with_vector(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrites a MatMul with a vector operand as a product of matrices: the vector gets a second axis of size 1."""
    a, b = node.inputs
    y = node.outputs[0]
    if a is None or b is None or a.shape is None or b.shape is None or y.shape is None:
        return
    if len(a.shape) > 1 and len(b.shape) > 1:
        return
    nodes: list[ir.Node] = []

    def op(kind: str, *inputs: ir.Value, shape: Sequence[object]) -> ir.Value:
        nodes.append(ir.node(kind, list(inputs)))
        value = nodes[-1].outputs[0]
        value.shape, value.type = ir.Shape(shape), y.type  # type: ignore[arg-type]
        return value

    def axis(n: int) -> ir.Value:
        return initializer(graph, f"{y.name}_axis", np.array([n], np.int64))

    shape, vectors = list(y.shape), []
    if len(b.shape) == 1:
        b = op("Unsqueeze", b, axis(1), shape=[*b.shape, 1])
        vectors.append(-1)
        shape = [*shape, 1]
    if len(a.shape) == 1:
        a = op("Unsqueeze", a, axis(0), shape=[1, *a.shape])
        vectors.append(-2)
        shape = [*shape[:-1], 1, *shape[-1:]]
    product = op("MatMul", a, b, shape=shape)
    for n in sorted(vectors):
        shape = [s for i, s in enumerate(shape) if i != len(shape) + n]
        product = op("Squeeze", product, axis(n), shape=shape)
    put_in_place(graph, node, product, nodes)


def _affine(node: ir.Node, op_type: str, sizes: Sequence[int]) -> tuple[ir.Node, np.ndarray | None]:
    """(reader, constant) if the only reader of `node` is an `op_type` with a constant of `sizes`, the last axes' sizes;
    else (node, None).
    """
    y = node.outputs[0]
    readers = y.consumers()
    if len(readers) != 1 or readers[0].op_type != op_type or y.is_graph_output():
        return node, None
    other, constant = _with_constant(readers[0])
    if (
        other is not y
        or constant is None
        or constant.size != np.prod(sizes)
        or list(constant.shape)[-len(sizes) :] != list(sizes)
    ):
        return node, None
    return readers[0], constant.reshape(sizes)


# ---- assignments to parts of a tensor


def write_boxes(walk: ShapeWalk) -> None:
    """Every ScatterND whose indices fill a box of the tensor, as assignments to slices do, becomes Slice, Concat, Pad
    and Where.
    """
    for node in list(walk.graph):
        if node.op_type != "ScatterND" or attribute(node, "reduction", "none") not in ("none", "add"):
            continue
        data, indices, updates = node.inputs
        assert data is not None and indices is not None and updates is not None
        contents = walk.facts[indices].contents
        if contents is None or not any(walk.facts[v].of_image for v in (data, updates)):
            continue
        boxes = [_box(index, shape) for index, shape in zip(contents, walk.facts[data].shapes, strict=True)]
        if None in boxes:
            continue
        box = _same_box(boxes, walk, data)  # type: ignore[arg-type]
        if box is not None:
            _write_box(walk, node, box)


def _box(index: np.ndarray, shape: Sequence[int]) -> list[tuple[int, int]] | None:
    """(start, stop) along each axis of the box that the indices (..., k) fill in row-major order; None if they fill
    none.
    """
    depth = index.shape[-1]
    rows = index.reshape(-1, depth)
    if not len(rows):
        return None
    rows = np.where(rows < 0, rows + np.array(shape[:depth]), rows)
    low, high = rows.min(axis=0), rows.max(axis=0) + 1
    spans = high - low
    if np.prod(spans) != len(rows):
        return None
    grid = np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij"), axis=-1)
    if not np.array_equal(grid.reshape(-1, depth), rows):
        return None
    return [*((int(a), int(b)) for a, b in zip(low, high, strict=True)), *((0, n) for n in shape[depth:])]


def _same_box(
    boxes: Sequence[list[tuple[int, int]]], walk: ShapeWalk, data: ir.Value
) -> list[tuple[int, int] | None] | None:
    """The box, with None for each axis that it fills; None if the box changes with the batch. An index that lists every
    traced image fills the batch axis.
    """
    shapes = walk.facts[data].shapes
    result: list[tuple[int, int] | None] = []
    for axis in range(len(shapes[0])):
        ranges, sizes = [b[axis] for b in boxes], [s[axis] for s in shapes]
        if all(r == (0, n) for r, n in zip(ranges, sizes, strict=True)) or (
            len(set(sizes)) > 1 and all(r == (0, sizes[0]) for r in ranges)
        ):
            result.append(None)
        elif len(set(ranges)) == 1 and len(set(sizes)) == 1:
            result.append(ranges[0])
        else:
            return None
    return result


def _write_box(walk: ShapeWalk, node: ir.Node, box: Sequence[tuple[int, int] | None]) -> None:
    graph, y = walk.graph, node.outputs[0]
    data, _, updates = node.inputs
    assert data is not None and updates is not None
    shapes = walk.facts[data].shapes
    nodes: list[ir.Node] = []

    def ints(*values: int) -> ir.Value:
        return initializer(graph, f"{y.name}_box", np.array(values, np.int64))

    def op(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nodes.append(ir.node(kind, list(inputs), attributes))
        return nodes[-1].outputs[0]

    sizes = [-1 if len({s[a] for s in shapes}) > 1 else (b[1] - b[0] if b else shapes[0][a]) for a, b in enumerate(box)]
    filled = op("Reshape", updates, ints(*sizes))
    part = [a for a, b in enumerate(box) if b is not None]
    if attribute(node, "reduction", "none") == "none" and len(part) == 1:
        axis = part[0]
        start, stop = box[axis]  # type: ignore[misc]
        size = shapes[0][axis]
        pieces = [filled]
        if start > 0:
            pieces.insert(0, op("Slice", data, ints(0), ints(start), ints(axis)))
        if stop < size:
            pieces.append(op("Slice", data, ints(stop), ints(size), ints(axis)))
        result = op("Concat", *pieces, axis=axis)
    elif not part and attribute(node, "reduction", "none") == "none":
        result = filled
    else:
        before = [0 if b is None else b[0] for b in box]
        after = [0 if b is None else shapes[0][a] - b[1] for a, b in enumerate(box)]
        padded = op("Pad", filled, ints(*before, *after)) if any(before + after) else filled
        if attribute(node, "reduction", "none") == "add":
            result = op("Add", data, padded)
        else:
            inside = np.zeros([1 if b is None else shapes[0][a] for a, b in enumerate(box)], bool)
            inside[tuple(slice(*b) if b else slice(None) for b in box)] = True
            result = op("Where", initializer(graph, f"{y.name}_inside", inside), padded, data)
    facts = walk.facts[y]
    put_in_place(graph, node, result, nodes)
    walk.note(nodes)
    walk.facts[result] = facts
