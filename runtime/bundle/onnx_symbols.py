"""The symbolic sizes of an ONNX file."""

from __future__ import annotations

from collections.abc import Iterator

from .onnx_wire import fields

# ModelProto.graph, then GraphProto.input, output or value_info, then .type.tensor_type.shape.dim.dim_param
_PATH = ({7}, {11, 12, 13}, {2}, {1}, {2}, {1}, {2})


def rename_symbol(model: bytes, old: str, new: str) -> bytes:
    """Renames a symbolic size of an ONNX model's inputs, outputs and values; returns the changed model.

    An engine builder knows that two sizes with one name are equal, and builds a faster engine. BundleError if `model`
    is not an ONNX model; ValueError if the names differ in length.
    """
    if len(old.encode()) != len(new.encode()):
        raise ValueError(f"{old!r} and {new!r} differ in length")
    renamed = bytearray(model)
    for start, end in _places(memoryview(model), 0, len(model), 0):
        if model[start:end] == old.encode():
            renamed[start:end] = new.encode()
    return bytes(renamed)


def _places(data: memoryview, start: int, end: int, depth: int) -> Iterator[tuple[int, int]]:
    """(start, end) of every string that _PATH leads to."""
    for number, _, first, last in fields(data, start, end):
        if number in _PATH[depth] and last:
            if depth == len(_PATH) - 1:
                yield first, last
            else:
                yield from _places(data, first, last, depth + 1)
