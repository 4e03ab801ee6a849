"""Quantised numbers stand for real ones: held as floats, so that autograd passes straight through their rounding."""

from __future__ import annotations

import torch

from .registry import operator

_RANGES = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-32768, 32767)}


def _along(value, x, attributes):
    if value is None or value.dim() == 0 or value.numel() == 1:
        return value
    axis = attributes.get("axis", 1) % x.dim()
    return value.reshape([-1 if i == axis else 1 for i in range(x.dim())])


@operator("QuantizeLinear")
def quantize_linear(attributes, x, scale, zero=None):
    low, high = _RANGES[torch.uint8 if zero is None else zero.dtype]
    position = x / _along(scale, x, attributes)
    rounded = position + (position.round() - position).detach()
    shifted = rounded if zero is None else rounded + _along(zero, x, attributes)
    return shifted.clamp(low, high)


@operator("DequantizeLinear")
def dequantize_linear(attributes, x, scale, zero=None):
    number = x if x.is_floating_point() else x.to(scale.dtype)
    shifted = number if zero is None else number - _along(zero, x, attributes)
    return shifted * _along(scale, x, attributes)


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(attributes, x):
    low, high = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
    scale = (high - low) / 255
    zero = (-low / scale).round().clamp(0, 255)
    position = x / scale
    return position + (position.round() - position).detach() + zero, scale, zero
