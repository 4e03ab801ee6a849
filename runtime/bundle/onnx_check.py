"""Checks that an ONNX file holds only what camrt writes, before an engine reads it.

A bundle may come from an attacker. camrt's programs have no subgraphs, no functions, no operators of other domains, and
read no file but the bundle's weights. No constant tensor may be larger than the bytes that are there, and no declared
tensor larger than 2^31 elements.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

from ..errors import BundleError
from .manifest import MOST_ELEMENTS
from .onnx_wire import fields, varint

_BYTES = {
    1: 4,
    2: 1,
    3: 1,
    4: 2,
    5: 2,
    6: 4,
    7: 8,
    9: 1,
    10: 2,
    11: 8,
    12: 4,
    13: 8,
    16: 2,
}  # of an element, by data type
_INT64 = 7
# operators whose output size is the value of an input: which input
_SIZED = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Resize": 3}


def check_program(file: Path, weights: str, weights_size: int) -> tuple[int, int]:
    """BundleError if an ONNX file holds anything that camrt does not write.

    Returns the bytes of weights that it reads, and how many nodes it has.

    weights: the name of the only other file that may hold its tensors; weights_size: that file's bytes.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror}): export the bundle again") from None
    try:
        check = _Check(memoryview(data), weights, weights_size)
        check.model()
        return check.read, check.nodes
    except BundleError as error:
        raise BundleError(f"{file}: {error}") from None


class _Check:
    def __init__(self, data: memoryview, weights: str, weights_size: int) -> None:
        self._data = data
        self._weights = weights
        self._weights_size = weights_size
        self._numbers: dict[bytes, tuple[int, ...]] = {}  # of small int64 tensors
        self.read, self.nodes = 0, 0  # bytes of tensors in the weights' file; nodes

    def model(self) -> None:
        graphs = []
        for number, _, start, end in fields(self._data, 0, len(self._data)):
            if number == 7:
                graphs.append((start, end))
            elif number == 8:
                self._standard(self._string(start, end, 1))
            elif number == 25:
                raise _foreign("a function")
        if len(graphs) != 1:
            raise BundleError(f"holds {len(graphs)} graphs: export the bundle again")
        self._graph(*graphs[0])

    def _graph(self, start: int, end: int) -> None:
        nodes = []
        for number, _, first, last in fields(self._data, start, end):
            if number == 1:
                nodes.append((first, last))
            elif number == 5:
                self._tensor(first, last)
            elif number in (11, 12, 13):
                self._declared(first, last)
            elif number == 15:
                raise _foreign("a sparse tensor")
        self.nodes = len(nodes)
        for node in nodes:
            self._node(*node)

    def _node(self, start: int, end: int) -> None:
        inputs, kind = [], b""
        for number, _, first, last in fields(self._data, start, end):
            if number == 1:
                inputs.append(bytes(self._data[first:last]))
            elif number == 4:
                kind = bytes(self._data[first:last])
            elif number == 5:
                self._attribute(first, last)
            elif number == 7:
                self._standard(bytes(self._data[first:last]))
        index = _SIZED.get(kind.decode(errors="replace"))
        if index is not None and index < len(inputs):
            self._limited([abs(n) for n in self._numbers.get(inputs[index], ())])

    def _attribute(self, start: int, end: int) -> None:
        for number, _, first, last in fields(self._data, start, end):
            if number in (5, 10):
                self._tensor(first, last)
            elif number in (6, 11):
                raise _foreign("a subgraph")
            elif number in (22, 23):
                raise _foreign("a sparse tensor")

    def _tensor(self, start: int, end: int) -> None:
        dims: list[int] = []
        kind, raw, name, outside = 0, None, b"", {}
        for number, value, first, last in fields(self._data, start, end):
            if number == 1:
                dims += [value] if not last else self._packed(first, last)
            elif number == 2:
                kind = value
            elif number == 8:
                name = bytes(self._data[first:last])
            elif number == 9:
                raw = (first, last)
            elif number == 13:
                outside[self._string(first, last, 1)] = self._string(first, last, 2)
        if kind not in _BYTES:
            raise _foreign(f"a tensor of data type {kind}")
        size = self._limited(dims) * _BYTES[kind]
        if outside:
            self._outside(outside, size)
        elif raw is not None:
            if raw[1] - raw[0] != size:
                raise BundleError("a tensor is not as large as it says: export the bundle again")
            if kind == _INT64 and size <= 64:
                self._numbers[name] = struct.unpack(f"<{size // 8}q", self._data[raw[0] : raw[1]])
        elif math.prod(dims) > end - start:  # the numbers are in other fields, at least one byte each
            raise BundleError("a tensor is not as large as it says: export the bundle again")

    def _outside(self, entries: dict[bytes, bytes], size: int) -> None:
        """Checks a tensor that is stored in another file: it must lie fully inside the bundle's weights."""
        if set(entries) - {b"location", b"offset", b"length"} or entries.get(b"location") != self._weights.encode():
            place = entries.get(b"location", b"").decode(errors="replace")
            raise BundleError(f"reads the file {place[:100]!r}, which is not the bundle's: export the bundle again")
        try:
            offset, length = int(entries.get(b"offset", b"0")), int(entries.get(b"length", b"-1"))
        except ValueError:
            offset = length = -1
        if offset < 0 or length != size or offset + length > self._weights_size:
            raise BundleError("a tensor's place in the weights is wrong: export the bundle again")
        self.read += length

    def _declared(self, start: int, end: int) -> None:
        """The shape of an input, an output or a tensor between."""
        dims = []
        for number, _, first, last in fields(self._data, start, end):
            for tensor in self._inside(first, last, 1) if number == 2 else ():
                for shape in self._inside(*tensor, 2):
                    for dim in self._inside(*shape, 1):
                        dims += [value for n, value, _, _ in fields(self._data, *dim) if n == 1]
        self._limited(dims)

    def _inside(self, start: int, end: int, field: int) -> list[tuple[int, int]]:
        return [(first, last) for n, _, first, last in fields(self._data, start, end) if n == field and last]

    def _packed(self, start: int, end: int) -> list[int]:
        values = []
        while start < end:
            value, start = varint(self._data, start, end)
            values.append(value)
        return values

    def _string(self, start: int, end: int, field: int) -> bytes:
        return b"".join(bytes(self._data[first:last]) for first, last in self._inside(start, end, field))

    def _limited(self, dims: list[int]) -> int:
        """The number of elements. BundleError if it is too large; a negative size reads as a huge number here."""
        count = 1
        for n in dims:
            count *= n
            if n > MOST_ELEMENTS or count > MOST_ELEMENTS:
                raise BundleError("declares a tensor that no machine holds: export the bundle again")
        return count

    def _standard(self, domain: bytes) -> None:
        if domain not in (b"", b"ai.onnx"):
            raise _foreign(f"operators of {domain.decode(errors='replace')[:100]!r}")


def _foreign(what: str) -> BundleError:
    return BundleError(f"holds {what}, which camrt never writes: export the bundle again")
