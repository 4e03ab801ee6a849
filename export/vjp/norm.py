"""Rules for normalisation layers, with the statistics that inference uses."""

from __future__ import annotations

import math

import numpy as np

from ..autodiff import vjp
from ..tape import attribute, constant_of, dims, static_dims


@vjp("BatchNormalization")
def batch_normalization(op, node, g):
    """dx = g scale / sqrt(var + eps), with the running variance."""
    g = g[0] if isinstance(g, tuple) else g
    scale, variance = constant_of(node.inputs[1]), constant_of(node.inputs[4])
    if scale is None or variance is None or attribute(node, "training_mode", 0):
        return (None,)
    factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + attribute(node, "epsilon", 1e-5))
    rank = len(dims(node.inputs[0]))
    return (op.Mul(g, op.floats(factor.reshape(-1, *[1] * (rank - 2)))), None, None, None, None)


def normalized_vjp(op, x, g, axes, epsilon):
    """Cotangent of x for y = (x - mean) / sqrt(var + eps) over `axes`: r (g - mean g - y mean(g y)), r = 1 / sqrt(var
    + eps).
    """
    centred = op.Sub(x, op.ReduceMean(x, axes, keepdims=1))
    variance = op.ReduceMean(op.Mul(centred, centred), axes, keepdims=1)
    r = op.Reciprocal(op.Sqrt(op.Add(variance, op.floats(epsilon))))
    y = op.Mul(centred, r)
    mean_g = op.ReduceMean(g, axes, keepdims=1)
    mean_gy = op.ReduceMean(op.Mul(g, y), axes, keepdims=1)
    return op.Mul(r, op.Sub(op.Sub(g, mean_g), op.Mul(y, mean_gy)))


@vjp("LayerNormalization")
def layer_normalization(op, node, g):
    """y = scale xhat + bias over the axes from `axis` on."""
    g = g[0] if isinstance(g, tuple) else g
    x, scale = node.inputs[:2]
    rank = len(dims(x))
    axes = list(range(attribute(node, "axis", -1) % rank, rank))
    return (normalized_vjp(op, x, op.Mul(g, scale), axes, attribute(node, "epsilon", 1e-5)), None, None)


@vjp("InstanceNormalization")
def instance_normalization(op, node, g):
    """y = scale xhat + bias per image and channel."""
    x, scale = node.inputs[:2]
    rank = len(dims(x))
    scaled = op.Mul(g, op.Reshape(scale, [-1, *[1] * (rank - 2)]))
    return (normalized_vjp(op, x, scaled, list(range(2, rank)), attribute(node, "epsilon", 1e-5)), None, None)


@vjp("GroupNormalization")
def group_normalization(op, node, g):
    """y = scale xhat + bias per image and group of channels; scale and bias one number per channel, or per group
    before opset 21.
    """
    x, scale = node.inputs[:2]
    groups = attribute(node, "num_groups")
    channels, *grid = static_dims(x)
    if dims(scale) == (channels,):
        scale = op.Reshape(scale, [-1, *[1] * len(grid)])
    else:
        each = op.Expand(op.Reshape(scale, [groups, 1]), [groups, channels // groups])
        scale = op.Reshape(each, [-1, *[1] * len(grid)])
    split = [-1, groups, channels // groups * math.prod(grid)]
    dx = normalized_vjp(
        op, op.Reshape(x, split), op.Reshape(op.Mul(g, scale), split), [2], attribute(node, "epsilon", 1e-5)
    )
    return (op.reshape_like(dx, x), None, None)


@vjp("MeanVarianceNormalization")
def mean_variance_normalization(op, node, g):
    """y = (x - mean) / (sd + 1e-9), over axes of one image only: dx = r (g - mean g - y mean(g y)), r = 1 / sd; the
    1e-9 is neglected.
    """
    x, axes = node.inputs[0], [a % len(dims(node.inputs[0])) for a in attribute(node, "axes", [0, 2, 3])]
    if any(dims(x)[a] is None for a in axes):
        return (None,)
    return (normalized_vjp(op, x, g, axes, 0.0),)


@vjp("RMSNormalization")
def rms_normalization(op, node, g):
    """y = scale x r, r = 1 / sqrt(mean x^2 + eps): dx = r (h - x r^2 mean(h x)), h = g scale."""
    x, scale = node.inputs[:2]
    rank = len(dims(x))
    axes = list(range(attribute(node, "axis", -1) % rank, rank))
    square = op.ReduceMean(op.Mul(x, x), axes, keepdims=1)
    r = op.Reciprocal(op.Sqrt(op.Add(square, op.floats(attribute(node, "epsilon", 1e-5)))))
    h = op.Mul(g, scale)
    along = op.ReduceMean(op.Mul(h, x), axes, keepdims=1)
    return (op.Mul(r, op.Sub(h, op.Mul(op.Mul(x, op.Mul(r, r)), along))), None)


@vjp("LpNormalization")
def lp_normalization(op, node, g):
    """y = x / ||x||: p = 2: dx = (g - y sum(g y)) / ||x||; p = 1: dx = (g - sign(x) sum(g y)) / ||x||."""
    x, y, axis, p = node.inputs[0], node.outputs[0], attribute(node, "axis", -1), attribute(node, "p", 2)
    norm = (op.ReduceL2 if p == 2 else op.ReduceL1)(x, [axis], keepdims=1)
    towards = y if p == 2 else op.Sign(x)
    return (op.Div(op.Sub(g, op.Mul(towards, op.ReduceSum(op.Mul(g, y), [axis], keepdims=1))), norm),)


@vjp("LRN")
def local_response_normalization(op, node, g):
    """y = x d^-beta, d = bias + alpha/n sum_window x^2: dx = g d^-beta - 2 alpha beta / n x sum_window(g y / d).

    The window sum runs over channels; its transpose mirrors the window (they differ for an even size).
    """
    x, y = node.inputs[0], node.outputs[0]
    size = attribute(node, "size")
    alpha, beta, bias = (attribute(node, k, d) for k, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    channels, *grid = static_dims(x)
    before = (size - 1) // 2
    offset = np.arange(channels)[None, :] - np.arange(channels)[:, None]
    window = ((offset >= -before) & (offset <= size - 1 - before)).astype(op.dtype)

    def windowed(value, matrix):
        flat = op.Reshape(value, [-1, channels, math.prod(grid)])
        return op.Reshape(op.MatMul(op.floats(matrix), flat), [-1, channels, *grid])

    d = op.Add(op.Mul(windowed(op.Mul(x, x), window), op.floats(alpha / size)), op.floats(bias))
    direct = op.Mul(g, op.Pow(d, op.floats(-beta)))
    across = windowed(op.Div(op.Mul(g, y), d), window.T)
    return (op.Sub(direct, op.Mul(op.Mul(x, across), op.floats(2 * alpha * beta / size))),)
