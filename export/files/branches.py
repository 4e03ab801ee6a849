"""Replaces an If by the branch that it takes, where constants and sizes determine its condition."""

from __future__ import annotations

import onnx_ir as ir

from ..tape import initializer


def inline_branch(graph: ir.Graph, node: ir.Node, taken: bool) -> list[ir.Node]:
    """Puts the branch that an If takes in its place, and returns its nodes."""
    branch = node.attributes["then_branch" if taken else "else_branch"].as_graph()
    results = list(branch.outputs)
    for name, value in list(branch.initializers.items()):
        assert value.const_value is not None
        copy = initializer(graph, f"{node.outputs[0].name}_{name}", value.const_value.numpy())
        value.replace_all_uses_with(copy)
        results = [copy if r is value else r for r in results]
    moved = list(branch)
    branch.outputs.clear()
    branch.remove(moved)
    for inner in moved:
        for y in inner.outputs:
            y.name = f"{node.outputs[0].name}_{y.name}"
    graph.insert_before(node, moved)
    passed = []
    for y, result in zip(list(node.outputs), results, strict=True):
        same = ir.node("Identity", [result])
        same.outputs[0].name, same.outputs[0].type = y.name, y.type
        passed.append(same)
    graph.insert_before(node, passed)
    for y, same in zip(list(node.outputs), passed, strict=True):
        y.replace_all_uses_with(same.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=False)
    return [*moved, *passed]
