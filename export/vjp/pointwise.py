"""Rules for operators that act element by element, with broadcasting."""

from __future__ import annotations

import math

import numpy as np

from ..autodiff import vjp
from ..tape import attribute, constant_of


@vjp("Identity", "Dropout")
def identity(op, node, g):
    """dx = g; a deployed Dropout is the identity."""
    g = g[0] if isinstance(g, tuple) else g
    return (g, None, None)


@vjp("Cast")
def cast(op, node, g):
    """dx = g in the type of x."""
    return (op.Cast(g, to=node.inputs[0].dtype),)


@vjp("Relu")
def relu(op, node, g):
    """dx = g [x > 0]."""
    return (op.Mul(g, op.step(node.inputs[0])),)


@vjp("LeakyRelu")
def leaky_relu(op, node, g):
    """dx = g where x > 0, else alpha g."""
    alpha = attribute(node, "alpha", 0.01)
    return (op.Where(op.Greater(node.inputs[0], op.floats(0)), g, op.Mul(g, op.floats(alpha))),)


@vjp("ThresholdedRelu")
def thresholded_relu(op, node, g):
    """dx = g [x > alpha]."""
    return (op.mask(op.Greater(node.inputs[0], op.floats(attribute(node, "alpha", 1.0))), g),)


@vjp("PRelu")
def prelu(op, node, g):
    """dx = g where x > 0, else slope g."""
    x, slope = node.inputs
    return (op.Where(op.Greater(x, op.floats(0)), g, op.Mul(g, slope)), None)


@vjp("Elu")
def elu(op, node, g):
    """dx = g where x > 0, else g (y + alpha)."""
    alpha = attribute(node, "alpha", 1.0)
    y = node.outputs[0]
    return (op.Where(op.Greater(node.inputs[0], op.floats(0)), g, op.Mul(g, op.Add(y, op.floats(alpha)))),)


@vjp("Celu")
def celu(op, node, g):
    """dx = g where x > 0, else g (y / alpha + 1)."""
    alpha = attribute(node, "alpha", 1.0)
    slope = op.Add(op.Mul(node.outputs[0], op.floats(1 / alpha)), op.floats(1))
    return (op.Where(op.Greater(node.inputs[0], op.floats(0)), g, op.Mul(g, slope)),)


@vjp("Selu")
def selu(op, node, g):
    """dx = gamma g where x > 0, else g (y + gamma alpha)."""
    alpha = attribute(node, "alpha", 1.67326319217681884765625)
    gamma = attribute(node, "gamma", 1.05070102214813232421875)
    below = op.Mul(g, op.Add(node.outputs[0], op.floats(gamma * alpha)))
    return (op.Where(op.Greater(node.inputs[0], op.floats(0)), op.Mul(g, op.floats(gamma)), below),)


@vjp("Sigmoid")
def sigmoid(op, node, g):
    """dx = g y (1 - y)."""
    y = node.outputs[0]
    return (op.Mul(g, op.Mul(y, op.Sub(op.floats(1), y))),)


@vjp("HardSigmoid")
def hard_sigmoid(op, node, g):
    """dx = alpha g where 0 < y < 1."""
    y = node.outputs[0]
    inside = op.And(op.Greater(y, op.floats(0)), op.Less(y, op.floats(1)))
    return (op.mask(inside, op.Mul(g, op.floats(attribute(node, "alpha", 0.2)))),)


@vjp("HardSwish")
def hard_swish(op, node, g):
    """dx = 0 below -3, g above 3, g (x / 3 + 1 / 2) between."""
    x = node.inputs[0]
    slope = op.Add(op.Mul(x, op.floats(1 / 3)), op.floats(0.5))
    above = op.Where(op.Greater(x, op.floats(3)), op.floats(1), slope)
    return (op.Mul(g, op.Where(op.Less(x, op.floats(-3)), op.floats(0), above)),)


@vjp("Swish")
def swish(op, node, g):
    """y = x s, s = sigmoid(alpha x): dx = g s (1 + alpha x (1 - s))."""
    x, alpha = node.inputs[0], attribute(node, "alpha", 1.0)
    scaled = op.Mul(x, op.floats(alpha))
    s = op.Sigmoid(scaled)
    return (op.Mul(g, op.Mul(s, op.Add(op.floats(1), op.Mul(scaled, op.Sub(op.floats(1), s))))),)


@vjp("Tanh")
def tanh(op, node, g):
    """dx = g (1 - y^2)."""
    y = node.outputs[0]
    return (op.Sub(g, op.Mul(g, op.Mul(y, y))),)


@vjp("Softplus")
def softplus(op, node, g):
    """dx = g sigmoid(x)."""
    return (op.Mul(g, op.Sigmoid(node.inputs[0])),)


@vjp("Softsign")
def softsign(op, node, g):
    """dx = g / (1 + |x|)^2."""
    d = op.Add(op.Abs(node.inputs[0]), op.floats(1))
    return (op.Div(g, op.Mul(d, d)),)


@vjp("Mish")
def mish(op, node, g):
    """y = x t, t = tanh(softplus(x)): dx = g (t + x (1 - t^2) sigmoid(x))."""
    x = node.inputs[0]
    t = op.Tanh(op.Softplus(x))
    slope = op.Mul(op.Mul(x, op.Sub(op.floats(1), op.Mul(t, t))), op.Sigmoid(x))
    return (op.Mul(g, op.Add(t, slope)),)


@vjp("Erf")
def erf(op, node, g):
    """dx = g 2 / sqrt(pi) exp(-x^2)."""
    x = node.inputs[0]
    return (op.Mul(g, op.Mul(op.Exp(op.Neg(op.Mul(x, x))), op.floats(2 / math.sqrt(math.pi)))),)


@vjp("Gelu")
def gelu(op, node, g):
    """Exact: dx = g (Phi(x) + x phi(x)). approximate='tanh': the derivative of its tanh form."""
    x = node.inputs[0]
    if attribute(node, "approximate", "none") == "tanh":
        c = math.sqrt(2 / math.pi)
        square = op.Mul(x, x)
        inner = op.Mul(op.Mul(x, op.Add(op.floats(1), op.Mul(square, op.floats(0.044715)))), op.floats(c))
        t = op.Tanh(inner)
        d_inner = op.Add(op.floats(c), op.Mul(square, op.floats(3 * 0.044715 * c)))
        left = op.Mul(op.Add(t, op.floats(1)), op.floats(0.5))
        right = op.Mul(op.Mul(x, op.floats(0.5)), op.Mul(op.Sub(op.floats(1), op.Mul(t, t)), d_inner))
        return (op.Mul(g, op.Add(left, right)),)
    phi_cdf = op.Mul(op.Add(op.Erf(op.Mul(x, op.floats(math.sqrt(0.5)))), op.floats(1)), op.floats(0.5))
    pdf = op.Mul(op.Exp(op.Mul(op.Mul(x, x), op.floats(-0.5))), op.floats(1 / math.sqrt(2 * math.pi)))
    return (op.Mul(g, op.Add(phi_cdf, op.Mul(x, pdf))),)


@vjp("Exp")
def exp(op, node, g):
    """dx = g y."""
    return (op.Mul(g, node.outputs[0]),)


@vjp("Log")
def log(op, node, g):
    """dx = g / x."""
    return (op.Div(g, node.inputs[0]),)


@vjp("Sqrt")
def sqrt(op, node, g):
    """dx = g / (2 y)."""
    return (op.Div(op.Mul(g, op.floats(0.5)), node.outputs[0]),)


@vjp("Reciprocal")
def reciprocal(op, node, g):
    """dx = -g y^2."""
    y = node.outputs[0]
    return (op.Neg(op.Mul(g, op.Mul(y, y))),)


@vjp("Neg")
def neg(op, node, g):
    """dx = -g."""
    return (op.Neg(g),)


@vjp("Abs")
def absolute(op, node, g):
    """dx = g sign(x)."""
    return (op.Mul(g, op.Sign(node.inputs[0])),)


@vjp("Clip")
def clip(op, node, g):
    """dx = g where min < x < max, strictly, as PyTorch's relu6 and hardtanh do."""
    x, *bounds = node.inputs
    for bound, inside in zip(bounds, (op.Greater, op.Less), strict=False):
        if bound is not None:
            g = op.mask(inside(x, bound), g)
    return (g, None, None)


@vjp("Pow")
def power(op, node, g):
    """dx = g p x^(p - 1), for a constant exponent p."""
    x, exponent = node.inputs
    p = constant_of(exponent)
    if p is None or not op.wants(x):
        return (None, None)
    p = p.astype(op.dtype)
    slope = x if np.all(p == 2) else op.Pow(x, op.floats(p - 1))
    return (op.unbroadcast(op.Mul(g, op.Mul(slope, op.floats(p))), x, node.outputs[0]), None)


@vjp("Add", "Sum")
def add(op, node, g):
    """dx_i = g."""
    return tuple(op.unbroadcast(g, x, node.outputs[0]) for x in node.inputs)


@vjp("Mean")
def mean(op, node, g):
    """dx_i = g / n."""
    g = op.Mul(g, op.floats(1 / len(node.inputs)))
    return tuple(op.unbroadcast(g, x, node.outputs[0]) for x in node.inputs)


@vjp("Sub")
def sub(op, node, g):
    """da = g, db = -g."""
    (a, b), y = node.inputs, node.outputs[0]
    return op.unbroadcast(g, a, y), op.unbroadcast(op.Neg(g), b, y) if op.wants(b) else None


@vjp("Mul")
def mul(op, node, g):
    """da = g b, db = g a."""
    (a, b), y = node.inputs, node.outputs[0]
    return tuple(op.unbroadcast(op.Mul(g, other), x, y) if op.wants(x) else None for x, other in ((a, b), (b, a)))


@vjp("Div")
def div(op, node, g):
    """da = g / b, db = -g y / b."""
    (a, b), y = node.inputs, node.outputs[0]
    quotient = op.Div(g, b)
    return (
        op.unbroadcast(quotient, a, y),
        op.unbroadcast(op.Neg(op.Mul(quotient, y)), b, y) if op.wants(b) else None,
    )


@vjp("Max", "Min")
def extremum(op, node, g):
    """dx_i = g where x_i is the extremum, shared equally by equal inputs, as PyTorch's maximum and minimum do."""
    y = node.outputs[0]
    hits = [op.Cast(op.Equal(x, y), to=node.outputs[0].dtype) for x in node.inputs]
    shared = op.Div(g, hits[0] if len(hits) == 1 else op.Sum(*hits))
    return tuple(op.unbroadcast(op.Mul(shared, hit), x, y) for x, hit in zip(node.inputs, hits, strict=True))


@vjp("Where")
def where(op, node, g):
    """da = g where the condition holds, db = g where it does not."""
    condition, a, b = node.inputs
    y = node.outputs[0]
    return (
        None,
        op.unbroadcast(op.mask(condition, g), a, y) if op.wants(a) else None,
        op.unbroadcast(op.mask(op.Not(condition), g), b, y) if op.wants(b) else None,
    )
