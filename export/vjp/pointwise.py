"""Rules for operators that act element by element, with broadcasting."""

from __future__ import annotations

import math

import numpy as np

from ..autodiff import ELSEWHERE, vjp
from ..tape import attribute, constant_of, dims, made_by


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
    """dx = g [y > 0]; y is there in any engine, while x may have been fused away."""
    return (op.mask(op.Greater(node.outputs[0], op.floats(0)), g),)


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
    inside = [holds(x, bound) for bound, holds in zip(bounds, (op.Greater, op.Less), strict=False) if bound is not None]
    return (op.mask(op.And(*inside) if len(inside) == 2 else inside[0], g) if inside else g, None, None)


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
    """da = g b, db = g a. Of x sigmoid(x): dx = g (s + y (1 - s)), of fewer products than the two rules one by one."""
    (a, b), y = node.inputs, node.outputs[0]
    for x, s in ((a, b), (b, a)):
        if _is_gate_of(op, s, x):
            slope = op.Add(s, op.Mul(y, op.Sub(op.floats(1), s)))
            return tuple(op.Mul(g, slope) if value is x else ELSEWHERE for value in (a, b))
    return tuple(op.unbroadcast(op.Mul(g, other), x, y) if op.wants(x) else None for x, other in ((a, b), (b, a)))


def _is_gate_of(op, s, x):
    """Whether s is sigmoid(x) and nothing else reads it."""
    node = made_by(s, "Sigmoid")
    return (
        node is not None
        and node.inputs[0] is x
        and len(s.consumers()) == 1
        and not s.is_graph_output()
        and s not in op.sources
        and op.wants(x)
    )


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


@vjp("Sign", "Round", "Floor", "Ceil", "Hardmax")
def stepwise(op, node, g):
    """dx = 0: constant between its steps."""
    return (op.Mul(g, op.floats(0)),)


@vjp("Shrink")
def shrink(op, node, g):
    """dx = g where |x| > lambd."""
    x = node.inputs[0]
    return (op.mask(op.Greater(op.Abs(x), op.floats(attribute(node, "lambd", 0.5))), g),)


@vjp("Sin")
def sin(op, node, g):
    """dx = g cos x."""
    return (op.Mul(g, op.Cos(node.inputs[0])),)


@vjp("Cos")
def cos(op, node, g):
    """dx = -g sin x."""
    return (op.Neg(op.Mul(g, op.Sin(node.inputs[0]))),)


@vjp("Tan")
def tan(op, node, g):
    """dx = g (1 + y^2)."""
    y = node.outputs[0]
    return (op.Add(g, op.Mul(g, op.Mul(y, y))),)


@vjp("Atan")
def atan(op, node, g):
    """dx = g / (1 + x^2)."""
    x = node.inputs[0]
    return (op.Div(g, op.Add(op.Mul(x, x), op.floats(1))),)


@vjp("Asin")
def asin(op, node, g):
    """dx = g / sqrt(1 - x^2)."""
    x = node.inputs[0]
    return (op.Div(g, op.Sqrt(op.Sub(op.floats(1), op.Mul(x, x)))),)


@vjp("Acos")
def acos(op, node, g):
    """dx = -g / sqrt(1 - x^2)."""
    x = node.inputs[0]
    return (op.Neg(op.Div(g, op.Sqrt(op.Sub(op.floats(1), op.Mul(x, x))))),)


@vjp("Sinh")
def sinh(op, node, g):
    """dx = g cosh x."""
    return (op.Mul(g, op.Cosh(node.inputs[0])),)


@vjp("Cosh")
def cosh(op, node, g):
    """dx = g sinh x."""
    return (op.Mul(g, op.Sinh(node.inputs[0])),)


@vjp("Asinh")
def asinh(op, node, g):
    """dx = g / sqrt(1 + x^2)."""
    x = node.inputs[0]
    return (op.Div(g, op.Sqrt(op.Add(op.Mul(x, x), op.floats(1)))),)


@vjp("Acosh")
def acosh(op, node, g):
    """dx = g / sqrt(x^2 - 1)."""
    x = node.inputs[0]
    return (op.Div(g, op.Sqrt(op.Sub(op.Mul(x, x), op.floats(1)))),)


@vjp("Atanh")
def atanh(op, node, g):
    """dx = g / (1 - x^2)."""
    x = node.inputs[0]
    return (op.Div(g, op.Sub(op.floats(1), op.Mul(x, x))),)


@vjp("Mod")
def mod(op, node, g):
    """dx = g: the remainder moves with x; the divisor is constant."""
    return (op.unbroadcast(g, node.inputs[0], node.outputs[0]), None)


# ---- quantised numbers: straight-through, in the units of the number at hand


@vjp("QuantizeLinear")
def quantize(op, node, g):
    """y = clip(round(x / scale) + zero): dx = g / scale inside the range of y's type, 0 outside, as PyTorch's
    fake_quantize does.

    Where a converter replaced a ReLU by this clipping, the rule is the ReLU's gradient.
    """
    x, zero = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    scale = _along(op, node, node.inputs[1])
    position = op.Div(x, scale)
    if zero is not None:
        position = op.Add(position, _along(op, node, op.Cast(zero, to=x.dtype), zero))
    low, high = quantised_range(node.outputs[0].dtype)
    inside = op.And(op.Greater(position, op.floats(low - 0.5)), op.Less(position, op.floats(high + 0.5)))
    return (op.mask(inside, op.Div(g, scale)), None, None)


@vjp("DequantizeLinear")
def dequantize(op, node, g):
    """y = (x - zero) scale: dx = g scale."""
    return (op.Mul(g, _along(op, node, node.inputs[1])), None, None)


@vjp("DynamicQuantizeLinear")
def dynamic_quantize(op, node, g):
    """y = round(x / scale) + zero, scale and zero such that y's range holds all of x: dx = g / scale."""
    return (op.Div(g[0], node.outputs[1]),)


def quantised_range(dtype):
    """The lowest and highest number of an integer type."""
    bits = dtype.bitwidth
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.is_signed() else (0, 2**bits - 1)


def _along(op, node, value, like=None):
    """A scale or zero point (one number, or one for each place along the node's axis) in a shape that broadcasts."""
    sizes = dims(like if like is not None else value)
    if len(sizes) == 0 or sizes == (1,):
        return value
    rank, axis = len(dims(node.inputs[0])), attribute(node, "axis", 1)
    return op.Reshape(value, [-1 if i == axis % rank else 1 for i in range(rank)])
