"""Reductions, running sums, positions of the largest."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .registry import OPERATORS, Operator, operator


def _reduction(function: Callable[..., torch.Tensor]) -> Operator:
    def run(attributes, x, axes=None):
        chosen = attributes.get("axes") if axes is None else axes.tolist()
        if not chosen:
            if attributes.get("noop_with_empty_axes", 0):
                return x
            chosen = range(x.dim())
        return function(x, tuple(a % x.dim() for a in chosen), bool(attributes.get("keepdims", 1)))

    return run


OPERATORS["ReduceSum"] = _reduction(lambda x, a, k: x.sum(a, keepdim=k))
OPERATORS["ReduceMean"] = _reduction(lambda x, a, k: x.mean(a, keepdim=k))
OPERATORS["ReduceMax"] = _reduction(lambda x, a, k: x.amax(a, keepdim=k))
OPERATORS["ReduceMin"] = _reduction(lambda x, a, k: x.amin(a, keepdim=k))
OPERATORS["ReduceL2"] = _reduction(lambda x, a, k: (x * x).sum(a, keepdim=k).sqrt())
OPERATORS["ReduceSumSquare"] = _reduction(lambda x, a, k: (x * x).sum(a, keepdim=k))
OPERATORS["ReduceL1"] = _reduction(lambda x, a, k: x.abs().sum(a, keepdim=k))
OPERATORS["ReduceLogSumExp"] = _reduction(lambda x, a, k: x.logsumexp(a, keepdim=k))
OPERATORS["ReduceLogSum"] = _reduction(lambda x, a, k: x.sum(a, keepdim=k).log())
OPERATORS["ReduceProd"] = _reduction(lambda x, a, k: x.prod(a[0], keepdim=k))


@operator("ArgMax")
def arg_max(attributes, x):
    return x.argmax(attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


@operator("ArgMin")
def arg_min(attributes, x):
    return x.argmin(attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


@operator("CumSum")
def cum_sum(attributes, x, axis):
    axis = int(axis.item())
    x = x.flip(axis) if attributes.get("reverse", 0) else x
    y = x.cumsum(axis)
    y = y - x if attributes.get("exclusive", 0) else y
    return y.flip(axis) if attributes.get("reverse", 0) else y


@operator("TopK")
def top_k(attributes, x, k):
    largest = bool(attributes.get("largest", 1))
    return tuple(
        torch.topk(x, int(k.reshape(-1)[0]), attributes.get("axis", -1), largest, bool(attributes.get("sorted", 1)))
    )
