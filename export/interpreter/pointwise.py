"""Operators that act element by element, softmax and log-softmax, Hardmax, MatMul."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .registry import OPERATORS, operator

for _name, _function in {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "HardSwish": F.hardswish,
    "Softsign": F.softsign,
    "Mish": F.mish,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tan": torch.tan,
    "Asin": torch.asin,
    "Acos": torch.acos,
    "Atan": torch.atan,
    "Sinh": torch.sinh,
    "Cosh": torch.cosh,
    "Asinh": torch.asinh,
    "Acosh": torch.acosh,
    "Atanh": torch.atanh,
    "Round": torch.round,
    "IsNaN": torch.isnan,
    "Xor": torch.logical_xor,
    "StopGradient": lambda x: x.detach(),
    "Softplus": F.softplus,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Not": torch.logical_not,
    "Identity": lambda x: x,
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "MatMul": torch.matmul,
    "Pow": lambda x, p: torch.pow(x, p),
    "Max": lambda *xs: _fold(torch.maximum, xs),
    "Min": lambda *xs: _fold(torch.minimum, xs),
    "Sum": lambda *xs: _fold(torch.add, xs),
    "Mean": lambda *xs: _fold(torch.add, xs) / len(xs),
}.items():
    OPERATORS[_name] = lambda attributes, *xs, _function=_function: _function(*xs)


def _fold(function: Callable[..., torch.Tensor], xs: Sequence[torch.Tensor]) -> torch.Tensor:
    total = xs[0]
    for x in xs[1:]:
        total = function(total, x)
    return total


@operator("Dropout")
def dropout(attributes, x, *_):
    return x


@operator("Div")
def div(attributes, a, b):
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("LeakyRelu")
def leaky_relu(attributes, x):
    return F.leaky_relu(x, attributes.get("alpha", 0.01))


@operator("ThresholdedRelu")
def thresholded_relu(attributes, x):
    return F.threshold(x, attributes.get("alpha", 1.0), 0.0)


@operator("PRelu")
def prelu(attributes, x, slope):
    return torch.where(x > 0, x, x * slope)


@operator("Elu")
def elu(attributes, x):
    return F.elu(x, attributes.get("alpha", 1.0))


@operator("Celu")
def celu(attributes, x):
    return F.celu(x, attributes.get("alpha", 1.0))


@operator("Selu")
def selu(attributes, x):
    alpha = attributes.get("alpha", 1.67326319217681884765625)
    gamma = attributes.get("gamma", 1.05070102214813232421875)
    return gamma * torch.where(x > 0, x, alpha * (torch.exp(x) - 1))


@operator("Shrink")
def shrink(attributes, x):
    lambd, bias = attributes.get("lambd", 0.5), attributes.get("bias", 0.0)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0))


@operator("Mod")
def mod(attributes, a, b):
    return torch.fmod(a, b) if attributes.get("fmod", 0) else torch.remainder(a, b)


@operator("Hardmax")
def hardmax(attributes, x):
    axis = attributes.get("axis", -1)
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


@operator("HardSigmoid")
def hard_sigmoid(attributes, x):
    return F.hardtanh(attributes.get("alpha", 0.2) * x + attributes.get("beta", 0.5), 0.0, 1.0)


@operator("Swish")
def swish(attributes, x):
    return x * torch.sigmoid(attributes.get("alpha", 1.0) * x)


@operator("Gelu")
def gelu(attributes, x):
    return F.gelu(x, approximate=attributes.get("approximate", "none"))


@operator("Clip")
def clip(attributes, x, low=None, high=None):
    """By hardtanh, whose gradient is that of ReLU6: zero on the bounds."""
    if not x.is_floating_point():
        return x.clamp(low, high)
    return F.hardtanh(x, -math.inf if low is None else low.item(), math.inf if high is None else high.item())


@operator("Where")
def where(attributes, condition, a, b):
    return torch.where(condition, a, b)


@operator("Softmax")
def softmax(attributes, x):
    return torch.softmax(x, attributes.get("axis", -1))


@operator("LogSoftmax")
def log_softmax(attributes, x):
    return torch.log_softmax(x, attributes.get("axis", -1))
