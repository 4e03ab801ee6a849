"""Reads and writes the protocol buffers' wire format of ONNX files: the runtime does without the onnx package.

Source: the protocol buffers' encoding specification. Field numbers are onnx.proto's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from ..errors import BundleError

Field = tuple[int, int, int, int]  # number, value of a varint, start and end of a message or string (0, 0 for a varint)


def fields(data: memoryview, start: int, end: int) -> Iterator[Field]:
    """Yields the fields of the message in data[start:end]. BundleError if it is cut off or is not a message."""
    while start < end:
        tag, start = varint(data, start, end)
        number, kind = tag >> 3, tag & 7
        if kind == 2:
            length, start = varint(data, start, end)
            if start + length > end:
                raise _cut_off()
            yield number, 0, start, start + length
            start += length
        elif kind == 0:
            value, start = varint(data, start, end)
            yield number, value, 0, 0
        elif kind in (1, 5):
            start += 8 if kind == 1 else 4
            if start > end:
                raise _cut_off()
        else:
            raise BundleError("an ONNX file is damaged: export the bundle again")


def varint(data: memoryview, start: int, end: int) -> tuple[int, int]:
    """Reads a number in groups of seven bits, the lowest first: (number, position after it). BundleError if cut off."""
    value = shift = 0
    while start < end and shift < 64:
        byte = data[start]
        value |= (byte & 0x7F) << shift
        start, shift = start + 1, shift + 7
        if byte < 0x80:
            return value, start
    raise _cut_off()


def _cut_off() -> BundleError:
    return BundleError("an ONNX file is cut off: export the bundle again")


def with_graph(model: bytes, rewrite: Callable[[memoryview, int, int], bytes]) -> bytes:
    """A serialised ONNX model whose graph, in data[start:end], is what `rewrite` makes of it."""
    data = memoryview(model)
    parts = list(fields(data, 0, len(data)))
    return b"".join(content(7, rewrite(data, f[2], f[3])) if f[0] == 7 else copied(data, f) for f in parts)


def strings(data: memoryview, start: int, end: int, number: int) -> Iterator[str]:
    """The strings in field `number` of the message in data[start:end]."""
    return (str(data[first:last], "utf-8") for n, _, first, last in fields(data, start, end) if n == number)


def copied(data: memoryview, field: Field) -> bytes:
    """A field as it stands in data."""
    number, value, start, end = field
    return content(number, data[start:end]) if start or end else whole(number, value)


def content(number: int, value: memoryview | bytes | str) -> bytes:
    """A field that holds a message, a string or bytes."""
    value = value.encode() if isinstance(value, str) else value
    return b"".join((_varint(number << 3 | 2), _varint(len(value)), value))


def whole(number: int, value: int) -> bytes:
    """A field that holds a number, not negative."""
    return _varint(number << 3) + _varint(value)


def single(number: int, value: float) -> bytes:
    """A field that holds a 32-bit float."""
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])
