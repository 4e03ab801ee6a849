"""The symbolic sizes of an ONNX file, without the onnx package: the wire format of protocol buffers, as far as they lie in it.

Source: onnx.proto (field numbers) and the protocol buffers' encoding specification.
"""

from __future__ import annotations

from collections.abc import Iterator

from .errors import BundleError

_BYTES = 2  # the wire type of messages and strings
# ModelProto.graph, then GraphProto.input, output or value_info, then .type.tensor_type.shape.dim.dim_param
_PATH = ({7}, {11, 12, 13}, {2}, {1}, {2}, {1}, {2})


def rename_symbol(model: bytes, old: str, new: str) -> bytes:
    """The same model with a symbolic size under another name of the same length. BundleError if it is not a model.

    Sizes of one name are known to be equal, which an engine's builder makes much of.
    """
    if len(old.encode()) != len(new.encode()):
        raise ValueError(f"{old!r} and {new!r} differ in length")
    renamed = bytearray(model)
    for start, end in _places(memoryview(model), 0, len(model), 0):
        if model[start:end] == old.encode():
            renamed[start:end] = new.encode()
    return bytes(renamed)


def _places(data: memoryview, start: int, end: int, depth: int) -> Iterator[tuple[int, int]]:
    """Where the strings at the end of the path lie."""
    for field, first, last in _fields(data, start, end):
        if field in _PATH[depth]:
            if depth == len(_PATH) - 1:
                yield first, last
            else:
                yield from _places(data, first, last, depth + 1)


def _fields(data: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Field number and extent of every message or string of a message."""
    while start < end:
        tag, start = _varint(data, start, end)
        field, kind = tag >> 3, tag & 7
        if kind == _BYTES:
            length, start = _varint(data, start, end)
            if start + length > end:
                raise BundleError("an ONNX file is cut off: export the bundle again")
            yield field, start, start + length
            start += length
        elif kind == 0:
            _, start = _varint(data, start, end)
        elif kind in (1, 5):
            start += 8 if kind == 1 else 4
        else:
            raise BundleError("an ONNX file is damaged: export the bundle again")


def _varint(data: memoryview, start: int, end: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    value = shift = 0
    while start < end and shift < 64:
        byte = data[start]
        value |= (byte & 0x7F) << shift
        start, shift = start + 1, shift + 7
        if byte < 0x80:
            return value, start
    raise BundleError("an ONNX file is cut off: export the bundle again")
