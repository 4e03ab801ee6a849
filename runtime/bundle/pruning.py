"""A program that computes only some of its outputs: ONNX Runtime itself runs every node of a file."""

from __future__ import annotations

from collections.abc import Collection

from .onnx_wire import copied, fields, strings, with_graph

_NODE, _INITIALIZER, _OUTPUT, _VALUE_INFO = 1, 5, 12, 13  # fields of a GraphProto
_NODE_INPUT, _NODE_OUTPUT, _NAME, _TENSOR_NAME = 1, 2, 1, 8


def pruned(model: bytes, outputs: Collection[str]) -> bytes:
    """A serialised ONNX model with these of its outputs, and only the nodes and tensors that they need.

    As camrt writes it: sorted, without subgraphs. BundleError for bytes that are no model.
    """
    return with_graph(model, lambda data, start, end: _pruned_graph(data, start, end, set(outputs)))


def _pruned_graph(data: memoryview, start: int, end: int, needed: set[str]) -> bytes:
    """needed: names of values; grows by what they are computed from."""
    parts = list(fields(data, start, end))
    kept = set()
    for at in reversed(range(len(parts))):  # a node comes behind those that it reads
        number, _, first, last = parts[at]
        if number == _NODE and not needed.isdisjoint(strings(data, first, last, _NODE_OUTPUT)):
            kept.add(at)
            needed.update(strings(data, first, last, _NODE_INPUT))
    named = {_OUTPUT: _NAME, _VALUE_INFO: _NAME, _INITIALIZER: _TENSOR_NAME}
    out = bytearray()
    for at, field in enumerate(parts):
        number, _, first, last = field
        if number == _NODE and at not in kept:
            continue
        if number in named and needed.isdisjoint(strings(data, first, last, named[number])):
            continue
        out += copied(data, field)
    return bytes(out)
