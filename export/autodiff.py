"""Reverse-mode differentiation on an ONNX graph: appends the nodes that compute cotangents of chosen values."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import onnx_ir as ir

from ..runtime.errors import UnsupportedOperator
from .tape import Tape, is_float

Rule = Callable[[Tape, ir.Node, ir.Value], tuple["ir.Value | None", ...]]
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
    """Registers a rule: (tape, node, cotangent of the node's first output) -> one cotangent or None per input.

    A rule for a node with several outputs receives a tuple with None for the outputs that nothing needs. shares_image:
    whether what it emits also works for several seeds of one image, the image's tensors being broadcast.
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
    """Values that depend on one of `sources`, smoothly or but for rounding, and that `target` depends on.

    Quantised numbers stand for real ones and are on the path; what a StopGradient gives is not. past_stops: what lies
    behind one as well, which has a gradient of its own but gives the sources none.
    """
    reached = set(sources)
    for node in graph:
        if (past_stops or node.op_type != "StopGradient") and any(x in reached for x in node.inputs):
            results = node.outputs[:1] if node.op_type == "DynamicQuantizeLinear" else node.outputs
            reached.update(y for y in results if y.dtype in _FLOATS or _is_quantised(node, y))
    wanted = {target}
    for node in reversed(graph):
        if node.op_type != "StopGradient" and any(y in wanted for y in node.outputs):
            wanted.update(x for x in node.inputs if x is not None)
    return reached & wanted


def _is_quantised(node: ir.Node, y: ir.Value) -> bool:
    """Whether y holds quantised numbers, which a Cast to whole numbers does not make."""
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
                f"no gradient reaches {_label(source)!r}: the logits read it through detach or no_grad alone, or not "
                "at all: choose another layer"
            )
    tape.needed = path
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
        given = [cotangents.get(y) for y in node.outputs]
        contributions = rule(tape, node, given[0] if len(given) == 1 else tuple(given))  # type: ignore[arg-type]
        for x, contribution in zip(node.inputs, contributions, strict=False):
            if x is None or x not in path:
                continue
            if contribution is None:
                raise UnsupportedOperator(
                    f"{node.op_type} (node {node.name!r}) has no gradient for its input {x.name!r}: tap a later layer"
                )
            cotangents[x] = tape.Add(cotangents[x], contribution) if x in cotangents else contribution
    for source in sources:
        if source not in cotangents:
            raise UnsupportedOperator(
                f"no gradient reaches {_label(source)!r}: {_decision(target)} decides rather than scores: name the "
                "output before it, or export the model without it"
            )
    return [cotangents[source] for source in sources]


def _decision(target: ir.Value) -> str:
    """The last node before a value that computes truths or whole numbers, in words."""
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
    """Name of a source upstream of `node`, the last one in graph order."""
    wanted, pending, found = set(sources), [x for x in node.inputs if x is not None], []
    seen = set(pending)
    while pending:
        value = pending.pop()
        if value in wanted:
            found.append(value)
            continue
        producer = value.producer()
        for x in producer.inputs if producer else ():
            if x is not None and x not in seen:
                seen.add(x)
                pending.append(x)
    return _label(found[0]) if found else None


def _label(value: ir.Value) -> str | None:
    """The layer that a tapped value is known by to the user, else its name in the graph."""
    return value.meta.get("layer", value.name)
