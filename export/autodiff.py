"""Reverse-mode differentiation on an ONNX graph: appends the nodes that compute cotangents of chosen values."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import onnx_ir as ir

from ..runtime.errors import UnsupportedOperator
from .tape import Tape, is_float


class Elsewhere:
    """A rule's answer for an input whose part of the gradient is in that of another input."""


ELSEWHERE = Elsewhere()
Rule = Callable[[Tape, ir.Node, ir.Value], tuple["ir.Value | Elsewhere | None", ...]]
RULES: dict[str, Rule] = {}
NOT_SHARED: set[str] = (
    set()
)  # operators whose rules need as many seeds as images: their forward values do not broadcast

_FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_QUANTISED = {
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.INT16,
    ir.DataType.UINT16,
    ir.DataType.INT4,
    ir.DataType.UINT4,
}


def vjp(*op_types: str, shares_image: bool = True) -> Callable[[Rule], Rule]:
    """Registers a rule: (tape, node, cotangent of the node's first output) -> one cotangent, None or ELSEWHERE per
    input.

    A rule for a node with several outputs receives a tuple, with None for the outputs that have no cotangent.
    shares_image: whether the emitted nodes also work for several seeds of one image, where the image's tensors are
    broadcast. ValueError if the operator has a rule already.
    """

    def register(rule: Rule) -> Rule:
        for op_type in op_types:
            if op_type in RULES:
                raise ValueError(f"a gradient rule for {op_type} is registered already")
            RULES[op_type] = rule
            if not shares_image:
                NOT_SHARED.add(op_type)
        return rule

    return register


def on_path(graph: ir.Graph, sources: Sequence[ir.Value], target: ir.Value, past_stops: bool = False) -> set[ir.Value]:
    """Floating-point and quantised values that depend on one of `sources` and that `target` depends on.

    The path does not pass a StopGradient. past_stops: values between a StopGradient and the target are included as
    well: they have a gradient, but it does not reach the sources.
    """
    reached = set(sources)
    for node in graph:
        if (past_stops or node.op_type != "StopGradient") and any(x in reached for x in node.inputs):
            results = node.outputs[:1] if node.op_type == "DynamicQuantizeLinear" else node.outputs
            reached.update(y for y in results if y.dtype in _FLOATS or _is_quantised(node, y))
    ancestors = {target}
    for node in reversed(graph):
        if node.op_type != "StopGradient" and any(y in ancestors for y in node.outputs):
            ancestors.update(x for x in node.inputs if x is not None)
    return reached & ancestors


def _is_quantised(node: ir.Node, y: ir.Value) -> bool:
    """Whether y holds quantised numbers: it has an integer type of 4 to 16 bits, and no Cast computed it."""
    return y.dtype in _QUANTISED and node.op_type != "Cast"


def gradients(tape: Tape, sources: Sequence[ir.Value], target: ir.Value, seed: ir.Value) -> list[ir.Value]:
    """Cotangents of `sources`, given the cotangent `seed` of `target`: d(seed . target) / d source.

    Only nodes between the sources and the target are differentiated. UnsupportedOperator names a node without a rule,
    or a source that the target does not depend on. Cotangents carry the seed's batch.
    """
    graph = tape.graph
    path = on_path(graph, sources, target)
    for source in sources:
        if source not in path:
            raise UnsupportedOperator(
                f"no gradient reaches {_label(source)!r}: the logits do not read it, or only through detach or "
                "no_grad: choose another layer"
            )
    tape.needed, tape.sources = path, set(sources)
    forward = list(graph)
    cotangents: dict[ir.Value, ir.Value] = {target: seed}
    for node in reversed(forward):
        if not any(y in cotangents for y in node.outputs) or not any(x in path for x in node.inputs):
            continue
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None:
            raise UnsupportedOperator(
                f"no gradient rule for {node.op_type} (node {node.name!r}, between {_nearest_source(node, sources)!r} "
                "and the logits): tap a later layer, or add a rule in export/vjp/"
            )
        grads = [cotangents.get(y) for y in node.outputs]
        contributions = rule(tape, node, grads[0] if len(grads) == 1 else tuple(grads))  # type: ignore[arg-type]
        for x, contribution in zip(node.inputs, contributions, strict=False):
            if x is None or x not in path or isinstance(contribution, Elsewhere):
                continue
            if contribution is None:
                raise UnsupportedOperator(
                    f"{node.op_type} (node {node.name!r}) has no gradient for its input {x.name!r}: tap a later layer"
                )
            cotangents[x] = tape.Add(cotangents[x], contribution) if x in cotangents else contribution
    for source in sources:
        if source not in cotangents:
            raise UnsupportedOperator(
                f"no gradient reaches {_label(source)!r}: {_decision(target)} gives a decision, not scores: name the "
                "output before it, or export the model without it"
            )
    return [cotangents[source] for source in sources]


def _decision(target: ir.Value) -> str:
    """Describes the node nearest to `target` that computes, or reads computed, booleans or integers."""
    pending, seen = deque([target]), {target}
    while pending:
        node = pending.popleft().producer()
        if node is None:
            continue
        if not is_float(node.outputs[0]) or any(
            x is not None and x.const_value is None and not is_float(x) for x in node.inputs
        ):
            return f"{node.op_type} (node {node.name!r})"
        fresh = [x for x in node.inputs if x is not None and x not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return "the network"


def _nearest_source(node: ir.Node, sources: Sequence[ir.Value]) -> str | None:
    """Name of a source that `node` depends on, the first one that the search finds; None if there is none."""
    source_set, pending, reached = set(sources), [x for x in node.inputs if x is not None], []
    seen = set(pending)
    while pending:
        value = pending.pop()
        if value in source_set:
            reached.append(value)
            continue
        producer = value.producer()
        for x in producer.inputs if producer else ():
            if x is not None and x not in seen:
                seen.add(x)
                pending.append(x)
    return _label(reached[0]) if reached else None


def _label(value: ir.Value) -> str | None:
    """The layer that a tapped value is known by to the user, else its name in the graph."""
    return value.meta.get("layer", value.name)
