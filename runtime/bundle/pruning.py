"""A program that computes only some of its outputs: ONNX Runtime itself runs every node of a file."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from .onnx_wire import fields

_GRAPH = 7  # field of a ModelProto
_NODE, _INITIALIZER, _OUTPUT, _VALUE_INFO = 1, 5, 12, 13  # of a GraphProto
_NODE_INPUT, _NODE_OUTPUT, _NAME, _TENSOR_NAME = 1, 2, 1, 8


def pruned(model: bytes, outputs: Collection[str]) -> bytes:
    """A serialised ONNX model with these of its outputs, and only the nodes and tensors that they need.

    As camrt writes it: sorted, without subgraphs. BundleError for bytes that are no model.
    """
    data = memoryview(model)
    out = bytearray()
    for number, value, start, end in fields(data, 0, len(data)):
        content = _pruned_graph(data, start, end, set(outputs)) if number == _GRAPH else data[start:end]
        out += _field(number, value, content, is_varint=not (start or end))
    return bytes(out)


def _pruned_graph(data: memoryview, start: int, end: int, needed: set[str]) -> bytes:
    """needed: names of values; grows by what they are computed from."""
    parts = list(fields(data, start, end))
    kept = set()
    for at in reversed(range(len(parts))):  # a node comes behind those that it reads
        number, _, first, last = parts[at]
        if number == _NODE and not needed.isdisjoint(_strings(data, first, last, _NODE_OUTPUT)):
            kept.add(at)
            needed.update(_strings(data, first, last, _NODE_INPUT))
    named = {_OUTPUT: _NAME, _VALUE_INFO: _NAME, _INITIALIZER: _TENSOR_NAME}
    out = bytearray()
    for at, (number, value, first, last) in enumerate(parts):
        if number == _NODE and at not in kept:
            continue
        if number in named and needed.isdisjoint(_strings(data, first, last, named[number])):
            continue
        out += _field(number, value, data[first:last], is_varint=not (first or last))
    return bytes(out)


def _strings(data: memoryview, start: int, end: int, number: int) -> Iterator[str]:
    """The strings in a field of a message."""
    return (str(data[first:last], "utf-8") for n, _, first, last in fields(data, start, end) if n == number)


def _field(number: int, value: int, content: memoryview | bytes, is_varint: bool) -> bytes:
    if is_varint:
        return _varint(number << 3) + _varint(value)
    return b"".join((_varint(number << 3 | 2), _varint(len(content)), content))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])
