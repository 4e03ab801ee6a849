"""Rewrites operators of an exported PyTorch program that PyTorch's ONNX exporter converts wrongly or not at all."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

_SMALL = 2e-8  # PyTorch's exporter may take smaller numbers for 0
_NOTHING = 1e-20  # smaller numbers are not rewritten: the other term would overflow when it is scaled

aten = torch.ops.aten


def rewrite_operators(program: torch.export.ExportedProgram) -> None:
    """Rewrites a program in place; what it computes stays."""
    for rewrite in (_pool_by_mean, _pick_first_maximum, _deviate_from_zero, _attention, _keep_small_terms):
        rewrite(program.graph_module.graph)
    program.graph_module.recompile()


def _pool_by_mean(graph: torch.fx.Graph) -> None:
    """Writes global average pooling as the mean that it is.

    PyTorch's own decomposition adds an as_strided for channels-last tensors (ConvNeXt), which mixes the batch with the
    channels in the ONNX graph.
    """
    for node in list(graph.nodes):
        if node.target == aten.adaptive_avg_pool2d.default and all(n == 1 for n in node.args[1]):
            with graph.inserting_before(node):
                mean = graph.call_function(aten.mean.dim, (node.args[0], [-2, -1], True))
            mean.meta.update(node.meta)
            node.replace_all_uses_with(mean)
            graph.erase_node(node)


def _pick_first_maximum(graph: torch.fx.Graph) -> None:
    """Writes a maximum or minimum along an axis as the element at its position: of equal elements, the first gets the
    gradient, as in PyTorch.

    The rule for ONNX's ReduceMax shares the gradient among equal elements.
    """
    global_pools = {aten.adaptive_max_pool2d.default: 2, aten.adaptive_max_pool1d.default: 1}
    for node in list(graph.nodes):
        if node.target not in (aten.max.dim, aten.min.dim, *global_pools):
            continue
        values = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
        if not values:
            continue
        x = node.args[0]
        call = _caller(graph, node)
        if node.target in global_pools:
            axes = global_pools[node.target]
            if any(n != 1 for n in node.args[1]):
                continue
            flat = call(aten.flatten.using_ints, x, -axes)
            taken = call(aten.gather.default, flat, -1, call(aten.argmax.default, flat, -1, True))
            taken = call(aten.unsqueeze.default, taken, -1) if axes == 2 else taken
        else:
            axis, keeps = node.args[1], len(node.args) > 2 and node.args[2]
            position = aten.argmax.default if node.target == aten.max.dim else aten.argmin.default
            taken = call(aten.gather.default, x, axis, call(position, x, axis, True))
            taken = taken if keeps else call(aten.squeeze.dim, taken, axis)
        for value in values:
            value.replace_all_uses_with(taken)
            graph.erase_node(value)
        if not node.users:
            graph.erase_node(node)


def _deviate_from_zero(graph: torch.fx.Graph) -> None:
    """Writes a standard deviation as a square root whose gradient is 0 where the deviation is 0, as PyTorch's is."""
    variances = {aten.std.dim: aten.var.dim, aten.std.correction: aten.var.correction}
    for node in list(graph.nodes):
        if node.target not in variances:
            continue
        call = _caller(graph, node)
        variance = call(variances[node.target], *node.args, **node.kwargs)
        varies = call(aten.gt.Scalar, variance, 0)
        safe = call(aten.sqrt.default, call(aten.where.ScalarOther, varies, variance, 1.0))
        root = call(aten.where.ScalarOther, varies, safe, 0.0)
        node.replace_all_uses_with(root)
        graph.erase_node(node)


def _caller(graph: torch.fx.Graph, before: torch.fx.Node) -> Callable[..., torch.fx.Node]:
    """A function that inserts a call before a node: (operator, *arguments) -> the new node, with its shape."""

    def call(target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        with graph.inserting_before(before):
            new = graph.call_function(target, args, kwargs)
        new.meta.update({k: v for k, v in before.meta.items() if k in ("stack_trace", "nn_module_stack")})
        new.meta["val"] = target(*(a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in args), **kwargs)
        return new

    return call


def _attention(graph: torch.fx.Graph) -> None:
    """Writes attention of tensors that do not have four axes as products and a softmax: ONNX's form needs four axes."""
    for node in list(graph.nodes):
        if node.target != aten.scaled_dot_product_attention.default or node.meta["val"].dim() == 4:
            continue
        arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
        arguments |= node.kwargs
        if arguments.get("is_causal") or arguments.get("enable_gqa"):
            continue  # the exporter's error says which operator it is
        query, mask = arguments["query"], arguments.get("attn_mask")
        scale = arguments.get("scale") or 1 / math.sqrt(query.meta["val"].shape[-1])
        call = _caller(graph, node)
        scores = call(
            aten.matmul.default, call(aten.mul.Tensor, query, scale), call(aten.transpose.int, arguments["key"], -2, -1)
        )
        if mask is not None and mask.meta["val"].dtype == torch.bool:
            scores = call(aten.masked_fill.Scalar, scores, call(aten.logical_not.default, mask), -math.inf)
        elif mask is not None:
            scores = call(aten.add.Tensor, scores, mask)
        mixed = call(aten.matmul.default, call(aten.softmax.int, scores, -1), arguments["value"])
        node.replace_all_uses_with(mixed)
        graph.erase_node(node)


def _keep_small_terms(graph: torch.fx.Graph) -> None:
    """Rewrites the addition of a constant as small as 1e-8 (an epsilon under a root or in a denominator): scales both
    terms by a power of two, adds them, and scales the sum back.

    PyTorch's exporter replaces a constant within 1e-8 of 0 by 0; a root without its epsilon has no gradient at 0.
    Scaling by a power of two is exact.
    """
    multiply = {aten.add.Tensor: aten.mul.Tensor, aten.sub.Tensor: aten.mul.Tensor}
    multiply |= {aten.add_.Tensor: aten.mul_.Tensor, aten.sub_.Tensor: aten.mul_.Tensor}
    for node in list(graph.nodes):
        if node.target not in multiply or len(node.args) != 2 or node.kwargs:
            continue
        x, term = node.args
        if not isinstance(term, float) or not _NOTHING < abs(term) < _SMALL:
            continue
        scale = 2.0 ** math.ceil(math.log2(100 * _SMALL / abs(term)))
        with graph.inserting_before(node):
            larger = graph.call_function(multiply[node.target], (x, scale))
            total = graph.call_function(node.target, (larger, term * scale))
            back = graph.call_function(multiply[node.target], (total, 1 / scale))
        for new in (larger, total, back):
            new.meta.update(node.meta)
        node.replace_all_uses_with(back)
        graph.erase_node(node)
