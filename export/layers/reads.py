"""What the logits read of a feature map: its grid, its class token alone, all of the image or a part."""

from __future__ import annotations

from collections.abc import Container, Mapping

import onnx_ir as ir

from ...runtime.errors import ExportError
from ..tape import attribute, constant_of, dims
from .axes import ELEMENTWISE
from .layouts import Layout


def read_by_prefix_only(
    graph: ir.Graph, found: Mapping[ir.Value, Layout], target: ir.Value, known: Container[ir.Value] = ()
) -> set[ir.Value]:
    """Maps of which `target` reads only the prefix tokens, or nothing: in a vision transformer, only the class token is
    read after the last attention.

    The gradient on their grid is zero, so they cannot explain `target`. known: values that are known to be such maps.
    """
    whole = _reads(graph, found, target, unread=known)
    return {v for v in found if not whole.get(v, False)}


def carries_all(
    graph: ir.Graph, found: Mapping[ir.Value, Layout], unread: Container[ir.Value], target: ir.Value, value: ir.Value
) -> bool:
    """Whether everything that `target` reads of the image's grid passes through `value`. If not, `value` lies on one of
    several branches, and its gradient is only a part of the explanation. What a class token took from earlier layers
    does not count. unread: the result of `read_by_prefix_only`.
    """
    whole = _reads(graph, found, target, value, unread)
    return not any(whole.get(x, False) for x in graph.inputs)


def _reads(
    graph: ir.Graph,
    layouts: Mapping[ir.Value, Layout],
    target: ir.Value,
    barrier: ir.Value | None = None,
    unread: Container[ir.Value] = (),
) -> dict[ir.Value, bool]:
    """{value: True if `target` reads its grid, False if only its prefix}. barrier: a value that is not followed back to
    its inputs.
    """
    whole = {target: True}
    for node in reversed(graph):
        scaled = node.op_type == "DynamicQuantizeLinear"  # its scales have no gradient
        outputs = node.outputs[:1] if scaled else node.outputs
        reads = [whole[y] for y in outputs if y in whole and y is not barrier]
        if not reads:
            continue
        if barrier is not None:
            if node.op_type in ("Shape", "Size", "StopGradient"):
                continue
            if not any(reads) and not any(y in unread for y in outputs):
                continue  # the class token of an earlier layer
        behind = set() if any(reads) else _behind_prefix(node, layouts)
        for place, x in enumerate(node.inputs):
            if x is None or place in behind:
                continue
            layout = layouts.get(x)
            grid = any(reads)
            if layout is not None and layout.prefix and _takes_prefix(node, layout):
                grid = False
            elif not grid:
                grid = not _keeps_tokens_apart(node, layout, layouts.get(node.outputs[0]))
            whole[x] = whole.get(x, False) or (grid and x not in unread)
    return whole


def refuse_unread(name: str, value: ir.Value, unread: set[ir.Value]) -> None:
    """ExportError for a layer that `read_by_prefix_only` found."""
    if value in unread:
        raise ExportError(
            f"layer {name!r}: the logits read none of its grid, only its class token, so its gradient there is zero: "
            "name a layer before the last attention"
        )


def _behind_prefix(node: ir.Node, layouts: Mapping[ir.Value, Layout]) -> set[int]:
    """Positions of the inputs of a token Concat that come after the prefix tokens."""
    layout = layouts.get(node.outputs[0])
    if node.op_type != "Concat" or layout is None or layout.token_axis is None:
        return set()
    if attribute(node, "axis", 0) % layout.rank != layout.token_axis:
        return set()
    behind, start = set(), 0
    for place, x in enumerate(node.inputs):
        if start >= layout.prefix:
            behind.add(place)
        size = dims(x)[layout.token_axis] if x is not None and len(dims(x)) == layout.rank else None
        if size is None:
            return behind
        start += size
    return behind


def _keeps_tokens_apart(node: ir.Node, before: Layout | None, after: Layout | None) -> bool:
    """Whether each token of a node's output depends only on the same token of its input."""
    if before is None or after is None or before.token_axis is None:
        return False
    if node.op_type == "Transpose":
        return after.token_axis is not None and after.prefix == before.prefix
    apart = node.op_type in ELEMENTWISE - {"Softmax", "LogSoftmax", "CumSum"} or node.op_type == "MatMul"
    return apart and before == after


def _takes_prefix(node: ir.Node, layout: Layout) -> bool:
    """Whether a Gather or Slice of tokens takes none but prefix tokens."""
    if node.op_type == "Gather":
        indices = constant_of(node.inputs[1])
        axis = attribute(node, "axis", 0) % layout.rank
        return (
            axis == layout.token_axis
            and indices is not None
            and bool(((indices >= 0) & (indices < layout.prefix)).all())
        )
    if node.op_type != "Slice":
        return False
    starts, ends, axes = (constant_of(x) for x in node.inputs[1:4]) if len(node.inputs) > 3 else (None, None, None)
    if starts is None or ends is None or axes is None:
        return False
    return any(
        int(a) % layout.rank == layout.token_axis and int(s) >= 0 and 0 <= int(e) <= layout.prefix
        for s, e, a in zip(starts, ends, axes, strict=True)
    )
