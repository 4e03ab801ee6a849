"""Products, convolutions and poolings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ...runtime.errors import ExportError
from .registry import operator


@operator("Gemm")
def gemm(attributes, a, b, c=None):
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    y = attributes.get("alpha", 1.0) * (a @ b)
    return y if c is None else y + attributes.get("beta", 1.0) * c


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _paddings(attributes, size, kernel, strides, dilations) -> list[tuple[int, int]]:
    """(before, after) per axis; the specification's auto_pad."""
    rank = len(kernel)
    mode = attributes.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        pads = attributes.get("pads", [0] * 2 * rank) if mode == "NOTSET" else [0] * 2 * rank
        return list(zip(pads[:rank], pads[rank:], strict=True))
    result = []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        small, large = total // 2, total - total // 2
        result.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return result


def _torch_pad(x, paddings, value=0.0):
    return F.pad(x, [p for pair in reversed(paddings) for p in pair], value=value)


@operator("Conv")
def conv(attributes, x, weight, bias=None):
    rank = x.dim() - 2
    strides, dilations = (attributes.get(k, [1] * rank) for k in ("strides", "dilations"))
    padded = _torch_pad(x, _paddings(attributes, x.shape[2:], weight.shape[2:], strides, dilations))
    return _CONV[rank](padded, weight, bias, tuple(strides), 0, tuple(dilations), attributes.get("group", 1))


@operator("ConvTranspose")
def conv_transpose(attributes, x, weight, bias=None):
    rank = x.dim() - 2
    strides, dilations = (tuple(attributes.get(k, [1] * rank)) for k in ("strides", "dilations"))
    extra = tuple(attributes.get("output_padding", [0] * rank))
    if attributes.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in attributes:
        raise ExportError("verification does not know ConvTranspose with auto_pad or output_shape")
    pads = attributes.get("pads", [0] * 2 * rank)
    full = _CONV_TRANSPOSE[rank](x, weight, bias, strides, 0, 0, attributes.get("group", 1), dilations)
    full = F.pad(full, [p for e in reversed(extra) for p in (0, e)])
    if bias is not None and any(extra):
        raise ExportError("verification does not know ConvTranspose with bias and output_padding")
    for i in range(rank):
        full = full.narrow(2 + i, pads[i], full.shape[2 + i] - pads[i] - pads[rank + i])
    return full


def _windows(attributes, x, fill):
    """(x padded for pooling, kernel, strides, dilations, paddings, elements added after x for ceil_mode): windows start
    at 0, and the last one is complete.
    """
    kernel = attributes["kernel_shape"]
    rank = len(kernel)
    strides, dilations = (attributes.get(k, [1] * rank) for k in ("strides", "dilations"))
    paddings = _paddings(attributes, x.shape[2:], kernel, strides, dilations)
    hang = []
    for i in range(rank):
        before, after = paddings[i]
        span = x.shape[2 + i] + before + after - (dilations[i] * (kernel[i] - 1) + 1)
        count = (-(-span // strides[i]) if attributes.get("ceil_mode", 0) else span // strides[i]) + 1
        if attributes.get("ceil_mode", 0) and (count - 1) * strides[i] >= x.shape[2 + i] + before:
            count -= 1  # the last window must start inside the input or the padding before it
        hang.append(max((count - 1) * strides[i] - span, 0))
    padded = _torch_pad(x, [(b, a + h) for (b, a), h in zip(paddings, hang, strict=True)], fill)
    return padded, kernel, strides, dilations, paddings, hang


@operator("MaxPool")
def max_pool(attributes, x):
    padded, kernel, strides, dilations, _, _ = _windows(attributes, x, -math.inf)
    return _MAX_POOL[len(kernel)](padded, tuple(kernel), tuple(strides), 0, tuple(dilations))


@operator("AveragePool")
def average_pool(attributes, x):
    padded, kernel, strides, dilations, paddings, hang = _windows(attributes, x, 0.0)
    if any(d != 1 for d in dilations):
        raise ExportError("verification does not know AveragePool with dilations")
    counted = torch.ones_like(x[:1, :1])
    counted = _torch_pad(counted, paddings, 1.0 if attributes.get("count_include_pad", 0) else 0.0)
    counted = _torch_pad(counted, [(0, h) for h in hang])
    pool = _AVERAGE_POOL[len(kernel)]
    return pool(padded, tuple(kernel), tuple(strides)) / pool(counted, tuple(kernel), tuple(strides))


@operator("GlobalAveragePool")
def global_average_pool(attributes, x):
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(attributes, x):
    flat = x.flatten(2)
    return flat.gather(2, flat.argmax(2, keepdim=True)).reshape(*x.shape[:2], *[1] * (x.dim() - 2))


@operator("LpPool")
def lp_pool(attributes, x):
    p = attributes.get("p", 2)
    padded, kernel, strides, _, _, _ = _windows(attributes, x, 0.0)
    pooled = _AVERAGE_POOL[len(kernel)](padded.abs() ** p, tuple(kernel), tuple(strides))
    return (pooled * math.prod(kernel)) ** (1 / p)


@operator("GlobalLpPool")
def global_lp_pool(attributes, x):
    p = attributes.get("p", 2)
    return (x.abs() ** p).sum(tuple(range(2, x.dim())), keepdim=True) ** (1 / p)
