"""Rules for operators that move elements without changing them."""

from __future__ import annotations

import numpy as np

from ..autodiff import vjp
from ..tape import attribute, constant_of, dims, open_dims, static_dims


@vjp("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(op, node, g):
    """dx = g in the sizes of x."""
    return (op.reshape_like(g, node.inputs[0]), None)


@vjp("Transpose")
def transpose(op, node, g):
    """dx = g under the inverse permutation."""
    rank = len(dims(node.inputs[0]))
    perm = attribute(node, "perm", list(range(rank))[::-1])
    return (op.Transpose(g, perm=[int(i) for i in np.argsort(perm)]),)


@vjp("Concat")
def concat(op, node, g):
    """dx_i = the part of g that x_i filled, by one Split: with a Slice per input, engines take far longer to build."""
    axis = attribute(node, "axis") % len(dims(node.outputs[0]))
    sizes = [dims(x)[axis] for x in node.inputs]
    if None in sizes:
        return tuple(None for _ in node.inputs)
    if len(sizes) == 1:
        return (g,)
    parts = op.Split(g, sizes, outputs=len(sizes), axis=axis)
    return tuple(part if op.wants(x) else None for x, part in zip(node.inputs, parts, strict=True))


@vjp("Split")
def split(op, node, g):
    """dx = the cotangents of the parts, joined; zeros for parts that nothing needs."""
    parts = g if isinstance(g, tuple) else (g,)
    axis = attribute(node, "axis", 0) % len(dims(node.inputs[0]))
    if dims(node.inputs[0])[axis] is None:
        return (None, None)
    first_part = next(p for p in parts if p is not None)
    filled = [_zeros(op, first_part, y, axis) if p is None else p for p, y in zip(parts, node.outputs, strict=True)]
    return (op.Concat(*filled, axis=axis), None)


def _zeros(op, batched, like, axis):
    """Zeros in the sizes of `like` with the batch of `batched`, whose sizes differ at most along `axis`."""
    one = op.Slice(batched, [0], [1], [axis])
    return op.Expand(op.Mul(one, op.floats(0)), list(open_dims(like, 1)))


def pad_zeros(op, value, rank, padding):
    """Pads with zeros; `padding` maps an axis to (before, after)."""
    before, after = [0] * rank, [0] * rank
    for axis, (b, a) in padding.items():
        before[axis], after[axis] = b, a
    return op.Pad(value, [*before, *after], op.floats(0)) if any(before + after) else value


@vjp("Slice")
def slice_(op, node, g):
    """dx = g put back where it was taken from, zeros elsewhere."""
    x = node.inputs[0]
    starts, ends = constant_of(node.inputs[1]), constant_of(node.inputs[2])
    extra = [constant_of(node.inputs[i]) if len(node.inputs) > i else None for i in (3, 4)]
    if starts is None or ends is None:
        return (None,)
    axes = extra[0] if extra[0] is not None else np.arange(len(starts))
    steps = extra[1] if extra[1] is not None else np.ones(len(starts), np.int64)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = int(axis) % len(dims(x))
        size = dims(x)[axis]
        if size is None:
            if (int(start), int(step)) == (0, 1) and int(end) >= 2**31 - 1:
                continue
            return (None,)
        positions = list(range(*slice(int(start), _end(int(end), int(step)), int(step)).indices(size)))
        g = put_back(op, g, len(dims(x)), axis, positions, size)
    return (g, None, None, None, None)


def _end(end, step):
    return None if step < 0 and end < -(2**31) + 2 else end


def put_back(op, g, rank, axis, positions, size):
    """Adds g's slices along `axis` at `positions` of a zero tensor of `size`; a contiguous run is a Pad."""
    first, count = positions[0], len(positions)
    if positions == list(range(first, first + count)):
        return pad_zeros(op, g, rank, {axis: (first, size - first - count)})
    placement = np.zeros((count, size))
    np.add.at(placement, (np.arange(count), positions), 1)
    last = [i for i in range(rank) if i != axis] + [axis]
    moved = op.MatMul(op.Transpose(g, perm=last), op.floats(placement))
    return op.Transpose(moved, perm=[int(i) for i in np.argsort(last)])


@vjp("Gather")
def gather(op, node, g):
    """dx = the sum of g over the positions that took the same slice; indices are constant."""
    x, indices = node.inputs[0], constant_of(node.inputs[1])
    rank = len(dims(x))
    axis = attribute(node, "axis", 0) % rank
    size = dims(x)[axis]
    if indices is None or size is None:
        return (None, None)
    positions = [int(i) % size for i in indices.reshape(-1)]
    if indices.ndim == 0:
        g = op.Unsqueeze(g, [axis])
    elif indices.ndim > 1:
        sizes = open_dims(node.outputs[0], -1)
        g = op.Reshape(g, [*sizes[:axis], len(positions), *sizes[axis + indices.ndim :]])
    return (put_back(op, g, rank, axis, positions, size), None)


@vjp("GatherElements", shares_image=False)
def gather_elements(op, node, g):
    """dx = zeros, with g added at the indices."""
    x, indices = node.inputs
    return (_added(op, x, indices, g, attribute(node, "axis", 0)), None)


@vjp("TopK", shares_image=False)
def top_k(op, node, g):
    """dx = zeros, with the cotangent of the values added at the indices; the indices have no gradient."""
    g = g[0] if isinstance(g, tuple) else g
    if g is None:
        return (None, None)
    return (_added(op, node.inputs[0], node.outputs[1], g, attribute(node, "axis", -1)), None)


def zeros_like(op, x):
    """Zeros in the sizes of x, whatever x holds."""
    return op.Expand(op.floats(0), op.Shape(x))


def _added(op, x, indices, g, axis):
    return op.ScatterElements(zeros_like(op, x), indices, g, axis=axis, reduction="add")


@vjp("ScatterElements", shares_image=False)
def scatter_elements(op, node, g):
    """y = data with updates written, or added, at the indices: d data = g, with 0 where data was overwritten;
    d updates = g at the indices.
    """
    _, indices, updates = node.inputs
    reduction, axis = attribute(node, "reduction", "none"), attribute(node, "axis", 0)
    if reduction not in ("none", "add"):
        return (None, None, None)
    d_data = g
    if reduction == "none":
        d_data = op.ScatterElements(g, indices, zeros_like(op, updates), axis=axis)
    return (d_data, None, op.GatherElements(g, indices, axis=axis) if op.wants(updates) else None)


@vjp("GatherND", shares_image=False)
def gather_nd(op, node, g):
    """dx = zeros, with g added at the indices."""
    x, indices = node.inputs
    if attribute(node, "batch_dims", 0):
        return (None, None)
    return (op.ScatterND(zeros_like(op, x), indices, g, reduction="add"), None)


@vjp("ScatterND", shares_image=False)
def scatter_nd(op, node, g):
    """y = data with updates written, or added, at the indices: d data = g, with 0 where data was overwritten;
    d updates = g at the indices.
    """
    _, indices, updates = node.inputs
    reduction = attribute(node, "reduction", "none")
    if reduction not in ("none", "add"):
        return (None, None, None)
    d_data = g if reduction == "add" else op.ScatterND(g, indices, zeros_like(op, updates))
    return (d_data, None, op.GatherND(g, indices) if op.wants(updates) else None)


@vjp("Pad")
def pad(op, node, g):
    """dx = g without the padding. In modes that fill the padding with elements of x, the cotangent of each copy is
    added to its element.
    """
    x, pads, mode = node.inputs[0], constant_of(node.inputs[1]), attribute(node, "mode", "constant")
    if pads is None:
        return (None,)
    rank = len(dims(x))
    axes = constant_of(node.inputs[3]) if len(node.inputs) > 3 else None
    axes = [int(a) % rank for a in axes] if axes is not None else list(range(rank))
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        before, after = int(before), int(after)
        if not before and not after:
            continue
        size = dims(x)[axis]
        if size is None:
            return (None,)
        if mode != "constant":
            g = put_back(op, g, rank, axis, _repeated_positions(mode, size, before, after), size)
            continue
        g = op.Slice(g, [max(before, 0)], [max(before, 0) + size + min(before, 0) + min(after, 0)], [axis])
        g = pad_zeros(op, g, rank, {axis: (max(-before, 0), max(-after, 0))})
    return (g, None, None, None)


def _repeated_positions(mode, size, before, after):
    """For each element of the padded axis, the index of the element that it copies; numpy's modes are those of ONNX."""
    cut = np.arange(size)[max(-before, 0) : size - max(-after, 0)]
    return [int(i) for i in np.pad(cut, (max(before, 0), max(after, 0)), mode=mode)]


@vjp("Tile")
def tile(op, node, g):
    """dx = g summed over the copies."""
    x, repeats = node.inputs[0], constant_of(node.inputs[1])
    if repeats is None or any(r != 1 and n is None for r, n in zip(repeats, dims(x), strict=True)):
        return (None, None)
    sizes = open_dims(x, -1)
    split = [part for r, n in zip(repeats, sizes, strict=True) for part in (int(r), n)]
    summed = op.ReduceSum(op.Reshape(g, split), list(range(0, 2 * len(sizes), 2)), keepdims=0)
    return (op.reshape_like(summed, x), None)


@vjp("Trilu")
def trilu(op, node, g):
    """dx = the triangle of g."""
    return (op.Trilu(g, *node.inputs[1:], upper=attribute(node, "upper", 1)), None)


@vjp("Expand")
def expand(op, node, g):
    """dx = g summed over the axes that were repeated."""
    return (op.unbroadcast(g, node.inputs[0], node.outputs[0]), None)


@vjp("DepthToSpace")
def depth_to_space(op, node, g):
    """dx = the blocks of g, back in the channels."""
    b = attribute(node, "blocksize")
    channels, h, w = static_dims(node.outputs[0])
    blocks = op.Reshape(g, [-1, channels, h // b, b, w // b, b])
    order = [0, 3, 5, 1, 2, 4] if attribute(node, "mode", "DCR") == "DCR" else [0, 1, 3, 5, 2, 4]
    return (op.reshape_like(op.Transpose(blocks, perm=order), node.inputs[0]),)


@vjp("SpaceToDepth")
def space_to_depth(op, node, g):
    """dx = DepthToSpace of g, depth first."""
    return (op.DepthToSpace(g, blocksize=attribute(node, "blocksize"), mode="DCR"),)
