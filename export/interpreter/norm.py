"""Normalisations."""

from __future__ import annotations

import torch.nn.functional as F

from .registry import operator


@operator("BatchNormalization")
def batch_normalization(attributes, x, scale, bias, mean, variance):
    """Written out: the backward pass of F.batch_norm is wrong for one image's channels-last gradients (PyTorch
    2.13).
    """
    sizes = (1, -1, *(1,) * (x.dim() - 2))
    mean, variance, scale, bias = (c.reshape(sizes) for c in (mean, variance, scale, bias))
    return (x - mean) * (scale / (variance + attributes.get("epsilon", 1e-5)).sqrt()) + bias


@operator("LayerNormalization")
def layer_normalization(attributes, x, scale, bias=None):
    axis = attributes.get("axis", -1) % x.dim()
    return F.layer_norm(x, x.shape[axis:], scale, bias, attributes.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def instance_normalization(attributes, x, scale, bias):
    axes = tuple(range(2, x.dim()))
    centred = x - x.mean(axes, keepdim=True)
    normalised = centred / ((centred * centred).mean(axes, keepdim=True) + attributes.get("epsilon", 1e-5)).sqrt()
    sizes = (1, -1, *(1,) * (x.dim() - 2))
    return normalised * scale.reshape(sizes) + bias.reshape(sizes)


@operator("GroupNormalization")
def group_normalization(attributes, x, scale, bias):
    groups = attributes["num_groups"]
    if scale.numel() == groups and groups != x.shape[1]:  # before opset 21
        scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return F.group_norm(x, groups, scale, bias, attributes.get("epsilon", 1e-5))


@operator("MeanVarianceNormalization")
def mean_variance_normalization(attributes, x):
    axes = tuple(attributes.get("axes", [0, 2, 3]))
    centred = x - x.mean(axes, keepdim=True)
    return centred / ((centred * centred).mean(axes, keepdim=True).sqrt() + 1e-9)


@operator("RMSNormalization")
def rms_normalization(attributes, x, scale):
    axis = attributes.get("axis", -1) % x.dim()
    square = (x * x).mean(tuple(range(axis, x.dim())), keepdim=True)
    return x * (square + attributes.get("epsilon", 1e-5)).rsqrt() * scale


@operator("LpNormalization")
def lp_normalization(attributes, x):
    axis, p = attributes.get("axis", -1), attributes.get("p", 2)
    return x / x.norm(p, axis, keepdim=True)


@operator("LRN")
def lrn(attributes, x):
    size, alpha = attributes["size"], attributes.get("alpha", 1e-4)
    square = F.pad(x * x, (0, 0, 0, 0, (size - 1) // 2, size // 2))
    total = square.unfold(1, size, 1).sum(-1)
    return x / (attributes.get("bias", 1.0) + alpha / size * total) ** attributes.get("beta", 0.75)
