"""A program whose backward pass ONNX Runtime's CPU provider keeps in the blocked layout of its convolutions.

Between convolutions it keeps tensors in blocks of channels (NCHWc) as long as only pooling, Add, Mul and a few
activations lie there. A comparison, as of a ReLU's mask, is not among them, nor is Reshape: each takes the tensor out
of the layout and back. Here the mask is a convolution, and so is the way in.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .onnx_wire import Field, content, copied, fields, single, strings, whole, with_graph

_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO = 1, 5, 11, 12, 13  # fields of a GraphProto
_FLOAT, _INT64 = 1, 7  # data types
_BLOCK = 16  # channels of the largest block
_GREAT = 2.0**127
_PREFIX = "camrt:blocked:"  # of the names of what is new
_RESHAPES = ("Reshape", "Expand", "Slice")
_INSIDE = ("Add", "Mul", "MaxPool", "AveragePool", "GlobalAveragePool", "Relu", "Sigmoid", "Tanh")  # stay in the layout


def blocked(model: bytes) -> bytes:
    """The same serialised model, as camrt writes it, where
    - a mask [y > 0] of a map y, Cast(Greater(y, 0)), of a cotangent that comes in the blocked layout, is HardSigmoid(
      2^127 (2^127 y)): exactly 1 for every y > 0, the least denormal one included, and exactly 0 otherwise; the inner
      product is a depthwise 1 x 1 convolution;
    - c - x of a map x, as in the slope of SiLU, s + y (1 - s), is a depthwise 1 x 1 convolution with a bias;
    - a cotangent that a mask or such a slope multiplies, or one of its summands, passes through a depthwise 1 x 1
      convolution of ones if it comes from a Reshape, Expand or Slice.

    Of maps (N, C, H, W) with C known and a multiple of 16; everything else is left as it is. BundleError for bytes that
    are no model.
    """
    return with_graph(model, lambda data, start, end: _Graph(data, start, end).blocked())


@dataclass
class _Node:
    field: Field
    kind: str
    inputs: list[str]
    outputs: list[str]


class _Graph:
    def __init__(self, data: memoryview, start: int, end: int) -> None:
        self._data = data
        self._fields = list(fields(data, start, end))
        self._nodes = [self._node(f) for f in self._fields if f[0] == _NODE]
        self._makers = {name: node for node in self._nodes for name in node.outputs}
        self._tensors: dict[str, Field] = {}
        self._shapes: dict[str, list[int | None]] = {}
        self._outputs: set[str] = set()
        for field in self._fields:
            number, _, first, last = field
            if number == _INITIALIZER:
                self._tensors[next(strings(data, first, last, 8), "")] = field
            elif number in (_INPUT, _OUTPUT, _VALUE_INFO):
                name = next(strings(data, first, last, 1), "")
                self._shapes[name] = list(self._shape(first, last))
                self._outputs |= {name} if number == _OUTPUT else set()

    def blocked(self) -> bytes:
        masks = self._masks()
        complements = {node.outputs[0]: c for node in self._nodes if (c := self._complement(node)) is not None}
        entries = self._entries({name: self._channels(y) for name, y in masks.items()} | self._slopes(complements))
        changed = masks.keys() | complements.keys() | entries.keys()
        weights: dict[tuple[float, tuple[int, ...]], str] = {}
        read = {name for node in self._nodes if node.outputs[0] not in masks for name in node.inputs} | self._outputs
        idle = {self._makers[name].inputs[0] for name in masks} - read
        out = bytearray()
        nodes = iter(self._nodes)
        for field in self._fields:
            node = next(nodes) if field[0] == _NODE else None
            name = node.outputs[0] if node is not None else ""
            if name in idle:
                continue
            if node is None or name not in changed:
                out += copied(self._data, field)
            elif name in masks:
                y = masks[name]
                out += _depthwise(y, f"{_PREFIX}{name}", self._channels(y), weights, _GREAT)
                alpha_beta = _attribute("alpha", _float(_GREAT)), _attribute("beta", _float(0))
                out += _encoded("HardSigmoid", [f"{_PREFIX}{name}"], name, *alpha_beta)
            elif name in complements:
                x, number = complements[name]
                out += _depthwise(x, name, self._channels(x), weights, -1, number)
            else:
                out += self._renamed(node, f"{_PREFIX}{name}")
                out += _depthwise(f"{_PREFIX}{name}", name, entries[name], weights, 1)
        for (value, shape), name in weights.items():
            out += content(_INITIALIZER, _tensor(name, shape, value))
        return bytes(out)

    def _masks(self) -> dict[str, str]:
        """y of each mask that should be a convolution, by name: what it multiplies comes in the layout, and no other
        mask, which stays outside, multiplies the product.
        """
        masks = {node.outputs[0]: y for node in self._nodes if (y := self._masked_by(node)) is not None}
        while True:
            inside = self._inside_layout(masks)
            outside = {n.outputs[0] for n in self._nodes if n.kind == "Cast"} - masks.keys()
            masked_again = {x for n in self._nodes if n.kind == "Mul" and outside & set(n.inputs) for x in n.inputs}
            products = [n for n in self._nodes if n.kind == "Mul" and n.outputs[0] in inside - masked_again]
            used = {x for n in products for x in n.inputs if x in masks}
            if len(used) == len(masks):
                return masks
            masks = {name: y for name, y in masks.items() if name in used}

    def _inside_layout(self, masks: Collection[str]) -> set[str]:
        """What comes in the blocked layout, if these masks do."""
        inside = set(masks)
        for node in self._nodes:
            name = node.outputs[0]
            if node.kind in _RESHAPES:
                within = name not in self._shapes and self._is_blocked(name)  # there it enters
            else:
                within = node.kind == "Conv" or (node.kind in _INSIDE and all(x in inside for x in node.inputs))
            inside |= {name} if within else set()
        return inside

    def _masked_by(self, node: _Node) -> str | None:
        """y, where the node makes the float32 mask [y > 0] of a map."""
        if node.kind != "Cast" or self._attributes(node).get("to") != _FLOAT:
            return None
        greater = self._makers.get(node.inputs[0])
        if greater is None or greater.kind != "Greater" or self._number(greater.inputs[1]) != 0:
            return None
        return greater.inputs[0] if self._is_blocked(greater.inputs[0]) else None

    def _complement(self, node: _Node) -> tuple[str, float] | None:
        """(x, c), where the node makes c - x of a map."""
        if node.kind != "Sub" or node.outputs[0] in self._shapes or not self._is_blocked(node.inputs[1]):
            return None
        number = self._number(node.inputs[0])
        return None if number is None else (node.inputs[1], number)

    def _slopes(self, complements: dict[str, tuple[str, float]]) -> dict[str, int]:
        """Channels of the sums that hold a product with one of the complements, by name."""
        channels = {name: self._channels(x) for name, (x, _) in complements.items()}
        slopes: dict[str, int] = {}
        for node in self._nodes:
            found = [channels[name] for name in node.inputs if name in channels]
            if found and node.kind == "Mul":
                channels[node.outputs[0]] = found[0]
            elif found and node.kind == "Add":
                slopes[node.outputs[0]] = found[0]
        return slopes

    def _entries(self, gates: dict[str, int]) -> dict[str, int]:
        """Channels of the cotangents that should enter the blocked layout, by name. gates: channels of what multiplies
        them.
        """
        found: dict[str, int] = {}
        for node in self._nodes:
            if node.kind == "Mul" and not gates.keys().isdisjoint(node.inputs):
                channels = next(gates[name] for name in node.inputs if name in gates)
                waiting = [name for name in node.inputs if name not in gates]
                while waiting:
                    maker = self._makers.get(waiting.pop())
                    if maker is None or maker.outputs[0] in self._shapes:  # the forward pass is as the network has it
                        continue
                    if maker.kind == "Add":
                        waiting += maker.inputs
                    elif maker.kind in _RESHAPES and self._channels(maker.outputs[0]) == channels:
                        found[maker.outputs[0]] = channels
        return found

    def _channels(self, name: str) -> int:
        """C of a value (N, C, H, W); 0 where it is not known to be such."""
        shape = self._shapes.get(name)
        if shape is not None:
            return (shape[1] or 0) if len(shape) == 4 else 0
        maker = self._makers.get(name)
        if maker is None or maker.kind not in _RESHAPES:
            return 0
        if maker.kind == "Slice":
            axes = self._numbers(maker.inputs[3]) if len(maker.inputs) > 3 else ()
            return self._channels(maker.inputs[0]) if axes and set(axes) <= {2, 3} else 0
        sizes = self._numbers(maker.inputs[1])
        return max(sizes[1], 0) if len(sizes) == 4 else 0

    def _node(self, field: Field) -> _Node:
        _, _, start, end = field
        inputs, outputs, kinds = (list(strings(self._data, start, end, n)) for n in (1, 2, 4))
        return _Node(field, kinds[0], inputs, outputs)

    def _renamed(self, node: _Node, output: str) -> bytes:
        """The node with another name of its output."""
        _, _, start, end = node.field
        parts = fields(self._data, start, end)
        return content(_NODE, b"".join(content(2, output) if p[0] == 2 else copied(self._data, p) for p in parts))

    def _attributes(self, node: _Node) -> dict[str, int]:
        """The whole numbers among a node's attributes."""
        _, _, start, end = node.field
        numbers = {}
        for number, _, first, last in fields(self._data, start, end):
            if number == 5:
                name = next(strings(self._data, first, last, 1), "")
                numbers.update((name, value) for n, value, _, _ in fields(self._data, first, last) if n == 3)
        return numbers

    def _is_blocked(self, name: str) -> bool:
        """Whether it is a map that the blocked layout holds without a rest."""
        channels = self._channels(name)
        return channels > 0 and channels % _BLOCK == 0

    def _number(self, name: str) -> float | None:
        """A constant of one float32."""
        raw = self._raw(name, _FLOAT)
        return struct.unpack("<f", raw)[0] if raw is not None and len(raw) == 4 else None

    def _numbers(self, name: str) -> tuple[int, ...]:
        """A constant of int64; empty where there is none."""
        raw = self._raw(name, _INT64)
        return struct.unpack(f"<{len(raw) // 8}q", raw) if raw is not None else ()

    def _raw(self, name: str, kind: int) -> memoryview | None:
        """The bytes of a constant of this data type that lie in the file itself."""
        if name not in self._tensors:
            return None
        _, _, start, end = self._tensors[name]
        parts = list(fields(self._data, start, end))
        raw = [self._data[first:last] for n, _, first, last in parts if n == 9]
        return raw[0] if raw and any(n == 2 and value == kind for n, value, _, _ in parts) else None

    def _shape(self, start: int, end: int) -> Iterator[int | None]:
        """The sizes in a ValueInfoProto, None for a symbolic one."""
        for dim in self._inside(start, end, 2, 1, 2, 1):
            yield next((value for n, value, _, _ in fields(self._data, *dim) if n == 1), None)

    def _inside(self, start: int, end: int, *path: int) -> Iterator[tuple[int, int]]:
        """The messages that lie at a path of field numbers."""
        if not path:
            yield start, end
            return
        for number, _, first, last in fields(self._data, start, end):
            if number == path[0]:
                yield from self._inside(first, last, *path[1:])


def _depthwise(
    x: str,
    y: str,
    channels: int,
    weights: dict[tuple[float, tuple[int, ...]], str],
    value: float,
    bias: float | None = None,
) -> bytes:
    """A depthwise 1 x 1 convolution of a constant weight and bias; weights: names of the tensors in use."""
    tensors = [(value, (channels, 1, 1, 1)), *([(bias, (channels,))] if bias is not None else [])]
    names = [weights.setdefault(tensor, f"{_PREFIX}{len(weights)}") for tensor in tensors]
    return _encoded("Conv", [x, *names], y, _attribute("group", whole(3, channels) + whole(20, 2)))


def _encoded(kind: str, inputs: list[str], output: str, *attributes: bytes) -> bytes:
    parts = [*(content(1, name) for name in inputs), content(2, output), content(3, output), content(4, kind)]
    return content(_NODE, b"".join((*parts, *attributes)))


def _attribute(name: str, value: bytes) -> bytes:
    return content(5, content(1, name) + value)


def _float(value: float) -> bytes:
    return single(2, value) + whole(20, 1)


def _tensor(name: str, shape: tuple[int, ...], value: float) -> bytes:
    """A constant of one value."""
    dims = b"".join(whole(1, n) for n in shape)
    return dims + whole(2, _FLOAT) + content(8, name) + content(9, struct.pack("<f", value) * shape[0])
