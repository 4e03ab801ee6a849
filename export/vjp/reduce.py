"""Rules for reductions and softmax."""

from __future__ import annotations

import math

from ..autodiff import vjp
from ..tape import attribute, constant_of, dims, open_dims, static_dims


def reduced_axes(node):
    """Axes that a reduction (opset 18 form: axes are an input) removes, non-negative, sorted."""
    x = node.inputs[0]
    rank = len(dims(x))
    axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None:
        axes = attribute(node, "axes")
    if axes is None or len(axes) == 0:
        return [] if attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(int(a) % rank for a in axes)


def keep_dims(op, node, value):
    """`value`, shaped as the reduction's output, with the reduced axes back as ones."""
    axes = reduced_axes(node)
    if attribute(node, "keepdims", 1) or not axes:
        return value
    sizes = [1 if i in axes else d for i, d in enumerate(open_dims(node.inputs[0], -1))]
    return op.Reshape(value, sizes)


def reduced_count(node):
    """How many elements each output reduces; None if the batch is among them."""
    x = node.inputs[0]
    axes = reduced_axes(node)
    return None if any(dims(x)[a] is None for a in axes) else math.prod(open_dims(x, 0)[a] for a in axes)


@vjp("ReduceSum")
def reduce_sum(op, node, g):
    """dx = g, repeated."""
    return (op.expand_like(keep_dims(op, node, g), node.inputs[0]), None)


@vjp("ReduceMean")
def reduce_mean(op, node, g):
    """dx = g / n, repeated."""
    count = reduced_count(node)
    if count is None:
        return (None, None)
    scaled = op.Mul(keep_dims(op, node, g), op.floats(1 / count))
    return (op.expand_like(scaled, node.inputs[0]), None)


@vjp("ReduceL2")
def reduce_l2(op, node, g):
    """dx = g x / y; 0 where all of x is 0, as in PyTorch."""
    norm = op.Max(keep_dims(op, node, node.outputs[0]), op.floats(1e-30))
    return (op.Mul(node.inputs[0], op.Div(keep_dims(op, node, g), norm)), None)


@vjp("ReduceSumSquare")
def reduce_sum_square(op, node, g):
    """dx = 2 g x."""
    return (op.Mul(node.inputs[0], op.Mul(keep_dims(op, node, g), op.floats(2))), None)


@vjp("ReduceL1")
def reduce_l1(op, node, g):
    """dx = g sign(x)."""
    return (op.Mul(op.Sign(node.inputs[0]), keep_dims(op, node, g)), None)


@vjp("ReduceLogSumExp")
def reduce_log_sum_exp(op, node, g):
    """dx = g exp(x - y)."""
    share = op.Exp(op.Sub(node.inputs[0], keep_dims(op, node, node.outputs[0])))
    return (op.Mul(share, keep_dims(op, node, g)), None)


@vjp("ReduceLogSum")
def reduce_log_sum(op, node, g):
    """y = log sum x: dx = g / exp(y), repeated."""
    return (op.expand_like(keep_dims(op, node, op.Mul(g, op.Exp(op.Neg(node.outputs[0])))), node.inputs[0]), None)


@vjp("ReduceProd")
def reduce_prod(op, node, g):
    """dx = g times the product of the other elements, over one axis. The product comes from prefix and suffix products,
    so that no element is divided by (it may be 0).
    """
    x, axes = node.inputs[0], reduced_axes(node)
    if len(axes) != 1 or dims(x)[axes[0]] is None:
        return (None, None)
    axis, size = axes[0], open_dims(x, 0)[axes[0]]
    parts = [op.Slice(x, [i], [i + 1], [axis]) for i in range(size)]
    before, after = [None], [None]
    for part in parts[:-1]:
        before.append(part if before[-1] is None else op.Mul(before[-1], part))
    for part in parts[:0:-1]:
        after.append(part if after[-1] is None else op.Mul(after[-1], part))
    cotangent = keep_dims(op, node, g)
    others = [[p for p in pair if p is not None] for pair in zip(before, after[::-1], strict=True)]
    products = [None if not o else o[0] if len(o) == 1 else op.Mul(*o) for o in others]
    return (op.Concat(*(cotangent if p is None else op.Mul(cotangent, p) for p in products), axis=axis), None)


@vjp("CumSum")
def cum_sum(op, node, g):
    """dx = the cumulative sum of g in the opposite direction."""
    axis = constant_of(node.inputs[1])
    x = node.inputs[0]
    if axis is None or dims(x)[int(axis.reshape(-1)[0])] is None:
        return (None, None)
    flags = {"exclusive": attribute(node, "exclusive", 0), "reverse": 1 - attribute(node, "reverse", 0)}
    return (op.CumSum(g, node.inputs[1], **flags), None)


@vjp("ReduceMax", "ReduceMin")
def reduce_extremum(op, node, g):
    """dx = g where x is the extremum, shared equally by equal elements, as PyTorch's amax and amin do."""
    x = node.inputs[0]
    hit = op.Cast(op.Equal(x, keep_dims(op, node, node.outputs[0])), to=x.dtype)
    count = op.ReduceSum(hit, reduced_axes(node), keepdims=1)
    return (op.Mul(hit, op.Div(keep_dims(op, node, g), count)), None)


@vjp("Softmax")
def softmax(op, node, g):
    """dx = y (g - sum g y)."""
    y, axis = node.outputs[0], attribute(node, "axis", -1)
    return (op.Mul(y, op.Sub(g, op.ReduceSum(op.Mul(g, y), [axis], keepdims=1))),)


@vjp("LogSoftmax")
def log_softmax(op, node, g):
    """dx = g - exp(y) sum g."""
    y, axis = node.outputs[0], attribute(node, "axis", -1)
    return (op.Sub(g, op.Mul(op.Exp(y), op.ReduceSum(g, [axis], keepdims=1))),)


@vjp("GlobalAveragePool")
def global_average_pool(op, node, g):
    """dx = g / (h w), repeated."""
    x = node.inputs[0]
    return (op.expand_like(op.Mul(g, op.floats(1 / math.prod(static_dims(x)[1:]))), x),)


@vjp("GlobalMaxPool")
def global_max_pool(op, node, g):
    """dx = g at the first maximum of each channel in row-major order, as PyTorch's max pooling does."""
    x = node.inputs[0]
    channels, *grid = static_dims(x)
    flat = op.Reshape(x, [0, channels, -1])
    first = op.ArgMax(flat, axis=2, keepdims=1)
    positions = op.value(list(range(math.prod(grid))))
    return (op.reshape_like(op.mask(op.Equal(positions, first), op.Reshape(g, [-1, channels, 1])), x),)
