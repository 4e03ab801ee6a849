"""Which tensors of a graph hold a feature map, in which layout, and how one leaves the graph as NCHW."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx_ir as ir

from ..runtime.errors import ExportError
from ..runtime.manifest import Tap
from .tape import Tape, attribute, constant_of, dims


@dataclass(frozen=True)
class Layout:
    """How a tensor holds a feature map of a grid (height, width), one row of the batch for each image.

    NCHW; NHWC; tokens: (batch, prefix + height * width, channels), the prefix being class and register tokens. Three more
    are passed through and never tapped: grouped (NCHW with channels on two axes), flat (batch, channels, height * width),
    and folded: some other reshape of a map, whose layout and sizes are `origin`, as group norms make.
    """

    kind: str
    grid: tuple[int, int]
    prefix: int = 0
    origin: tuple[Layout, tuple[int | None, ...]] | None = None

    @property
    def channel_axis(self) -> int:
        return {"NHWC": 3, "tokens": 2}.get(self.kind, 1)

    @property
    def rank(self) -> int:
        return {"grouped": 5, "flat": 3, "tokens": 3}.get(self.kind, 4)


TAPPABLE = ("NCHW", "NHWC", "tokens")

_ELEMENTWISE = {
    "Abs",
    "Add",
    "Atan",
    "BatchNormalization",
    "Cast",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "CumSum",
    "DequantizeLinear",
    "Div",
    "Dropout",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "GroupNormalization",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "InstanceNormalization",
    "LRN",
    "LayerNormalization",
    "LeakyRelu",
    "Log",
    "LogSoftmax",
    "LpNormalization",
    "Max",
    "Mean",
    "Min",
    "Mish",
    "Mul",
    "Neg",
    "PRelu",
    "Pow",
    "QuantizeLinear",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softmax",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Sub",
    "Sum",
    "Swish",
    "Tanh",
    "ThresholdedRelu",
    "Where",
}
_MAPS_TO_MAPS = {
    *("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool"),
    *("DepthToSpace", "SpaceToDepth", "Resize", "Upsample"),
}


def layouts(graph: ir.Graph) -> dict[ir.Value, Layout]:
    """The values that are known to hold feature maps, not merely shaped as if they did.

    Convolutions and pooling of maps make maps; transposing and reshaping between the layouts is followed; elementwise
    operators, channel shuffles and linear maps of the channels keep them. What mixes or exchanges positions (attention,
    rolling, other transposes) loses them, until a sum with a known map of the same shape, a residual connection, says what
    they are again.
    """
    found: dict[ir.Value, Layout] = {}
    start = _layout_of("NCHW", graph.inputs[0])
    if start is not None:
        found[graph.inputs[0]] = start
    for node in graph:
        result = _result(node, found)
        if result is not None:
            found.update({y: result for y in node.outputs if _fits(y, result)})
    return found


def _layout_of(kind: str, value: ir.Value) -> Layout | None:
    """NCHW, grouped or NHWC of a value with static sizes; None for any other."""
    sizes = dims(value) if value.shape is not None else ()
    if kind == "NHWC":
        grid = sizes[1:3] if len(sizes) == 4 else ()
    else:
        grid = sizes[-2:] if len(sizes) == (5 if kind == "grouped" else 4) else ()
    return Layout(kind, grid) if len(grid) == 2 and None not in grid else None  # type: ignore[arg-type]


def _fits(value: ir.Value, layout: Layout) -> bool:
    if layout.kind == "folded":
        return True
    if value.shape is None or len(value.shape) != layout.rank:
        return False
    sizes = dims(value)
    pixels = layout.prefix + math.prod(layout.grid)
    want = {"NHWC": sizes[1:3], "tokens": sizes[1:2], "flat": sizes[2:3]}.get(layout.kind, sizes[-2:])
    return want == (layout.grid if layout.rank > 3 else (pixels,))


def _result(node: ir.Node, found: dict[ir.Value, Layout]) -> Layout | None:
    x, y = (node.inputs[0] if node.inputs else None), node.outputs[0]
    before = found.get(x) if x is not None else None
    if node.op_type in _MAPS_TO_MAPS:
        return _layout_of("NCHW", y) if before is not None and before.kind == "NCHW" else None
    if node.op_type in _ELEMENTWISE:  # an operand that is broadcast, such as a gate of 1 x 1, says nothing
        known = {found[v] for v in node.inputs if v in found and _fits(y, found[v])}
        return known.pop() if len(known) == 1 else None
    if before is None or x is None or y.shape is None:
        return _join(node, found) if node.op_type == "Concat" else None
    if node.op_type in ("Reshape", "Flatten"):
        return _reshaped(before, x, y)
    if before.kind == "folded":  # nothing else is known of its axes
        return None
    if node.op_type == "Transpose":
        return _transposed(before, tuple(attribute(node, "perm", ())), y)
    if node.op_type == "MatMul":
        linear = node.inputs[1] not in found and constant_of(node.inputs[1]) is not None
        return before if linear and before.kind in ("NHWC", "tokens") else None
    if node.op_type == "Slice":
        return _sliced(node, before)
    if node.op_type == "Pad":
        return _padded(node, before)
    if node.op_type == "Split":
        return before if attribute(node, "axis", 0) % before.rank == before.channel_axis else None
    if node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL2"):
        return before if _reduces_channels(node, before) else None
    return _join(node, found) if node.op_type == "Concat" else None


def _reduces_channels(node: ir.Node, before: Layout) -> bool:
    axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
    kept = bool(attribute(node, "keepdims", 1))
    return kept and axes is not None and [int(a) % before.rank for a in axes] == [before.channel_axis]


def _transposed(before: Layout, perm: tuple[int, ...], y: ir.Value) -> Layout | None:
    if before.kind == "grouped":
        return before if perm == (0, 2, 1, 3, 4) else None
    if before.kind in ("flat", "tokens") and perm == (0, 2, 1):
        return replace(before, kind="tokens" if before.kind == "flat" else "flat") if not before.prefix else None
    steps: dict[tuple[str, tuple[int, ...]], str] = {
        ("NCHW", (0, 2, 3, 1)): "NHWC",
        ("NHWC", (0, 3, 1, 2)): "NCHW",
    }
    turned = steps.get((before.kind, perm))
    return _layout_of(turned, y) if turned else None


def _reshaped(before: Layout, x: ir.Value, y: ir.Value) -> Layout | None:
    """Channels split or joined, or the grid written out or joined, an image staying one row of the batch; else folded, which
    a reshape to the original sizes undoes.
    """
    if before.origin is not None:
        layout, sizes = before.origin
        return layout if dims(y)[1:] == sizes and len(dims(y)) == len(sizes) + 1 else before
    sizes, inner = dims(y)[1:], dims(x)[1:]
    folded = Layout("folded", before.grid, 0, (before, inner))
    if None in sizes or None in inner or math.prod(sizes) != math.prod(inner) or before.prefix:  # type: ignore[arg-type]
        return folded
    candidates = {
        "NCHW": [("NCHW", 4), ("grouped", 5), ("flat", 3)],
        "grouped": [("NCHW", 4), ("grouped", 5), ("flat", 3)],
        "flat": [("NCHW", 4), ("flat", 3)],
        "NHWC": [("tokens", 3), ("NHWC", 4)],
        "tokens": [("NHWC", 4), ("tokens", 3)],
    }[before.kind]
    for kind, rank in candidates:
        layout = Layout(kind, before.grid)
        if len(dims(y)) == rank and _fits(y, layout):
            return layout
    return folded


def _sliced(node: ir.Node, before: Layout) -> Layout | None:
    """Channels taken, positions taken at a stride, a border cropped, or prefix tokens dropped."""
    starts, ends = constant_of(node.inputs[1]), constant_of(node.inputs[2])
    extra = [constant_of(node.inputs[i]) if len(node.inputs) > i else None for i in (3, 4)]
    if starts is None or ends is None:
        return None
    axes = extra[0] if extra[0] is not None else range(len(starts))
    steps = extra[1] if extra[1] is not None else [1] * len(starts)
    result: Layout | None = before
    sizes = dims(node.inputs[0])  # type: ignore[arg-type]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = int(axis) % before.rank
        size = sizes[axis]
        if axis == before.channel_axis or size is None or result is None:
            continue
        if int(start) == 0 and int(end) >= size and step == 1:
            continue
        if before.kind == "tokens" and step == 1 and 0 < int(start) <= before.prefix and int(end) >= size:
            result = replace(result, prefix=before.prefix - int(start))
        elif before.kind in ("NCHW", "NHWC"):
            taken = range(*slice(int(start), int(end), int(step)).indices(size))
            strided = step > 1 and taken.start < step and len(taken) * step >= size - step
            if not strided and not (step == 1 and len(taken) >= 0.75 * size):
                return None
            first = 1 if before.kind == "NHWC" else 2
            grid = list(result.grid)
            grid[axis - first] = len(taken)
            result = replace(result, grid=tuple(grid))  # type: ignore[arg-type]
        else:
            result = None
    return result


def _padded(node: ir.Node, before: Layout) -> Layout | None:
    """Channels padded, or a border around the grid of NCHW and NHWC."""
    pads = constant_of(node.inputs[1])
    if pads is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
        return None
    touched = {i % before.rank for i, amount in enumerate(pads) if amount}
    if touched <= {before.channel_axis}:
        return before
    return _layout_of(before.kind, node.outputs[0]) if before.kind in ("NCHW", "NHWC") and 0 not in touched else None


def _join(node: ir.Node, found: dict[ir.Value, Layout]) -> Layout | None:
    """Joined channels of maps alike; or tokens with others in front of them."""
    known = [found.get(x) for x in node.inputs if x is not None]
    last = known[-1]
    if last is None or last.kind == "folded":
        return None
    axis = attribute(node, "axis", 0) % last.rank
    if all(k == last for k in known):
        return last if axis == last.channel_axis else None
    if last.kind != "tokens" or last.prefix or axis != 1 or any(k is not None for k in known[:-1]):
        return None
    counts = [dims(x)[1] for x in node.inputs[:-1] if x is not None]
    return replace(last, prefix=sum(counts)) if None not in counts else None  # type: ignore[arg-type]


def read_by_prefix_only(graph: ir.Graph, found: dict[ir.Value, Layout], target: ir.Value) -> set[ir.Value]:
    """Maps of whose tokens `target` reads the prefix alone: after a vision transformer's last attention, the class token.

    Its gradient at their grid is zero, so they cannot explain it.
    """
    whole = {target: True}  # value -> whether its grid is read
    for node in reversed(graph):
        reads = [whole[y] for y in node.outputs if y in whole]
        if not reads:
            continue
        for x in node.inputs:
            if x is None:
                continue
            layout = found.get(x)
            grid = any(reads)
            if layout is not None and layout.prefix and _takes_prefix(node, layout):
                grid = False
            elif not grid:
                apart = node.op_type in _ELEMENTWISE - {"Softmax"} or node.op_type == "MatMul"
                grid = not (apart and layout is not None and found.get(node.outputs[0]) == layout)
            whole[x] = whole.get(x, False) or grid
    return {v for v in found if not whole.get(v, False)}


def refuse_unread(name: str, value: ir.Value, unread: set[ir.Value]) -> None:
    """ExportError for a layer that `read_by_prefix_only` found."""
    if value in unread:
        raise ExportError(
            f"layer {name!r}: the logits read none of its grid, only its class token, so its gradient there is zero: "
            "name a layer before the last attention"
        )


def _takes_prefix(node: ir.Node, layout: Layout) -> bool:
    """Whether a Gather or Slice of tokens takes none but prefix tokens."""
    if node.op_type == "Gather":
        indices = constant_of(node.inputs[1])
        axis = attribute(node, "axis", 0) % layout.rank
        return axis == 1 and indices is not None and bool(((indices >= 0) & (indices < layout.prefix)).all())
    if node.op_type != "Slice":
        return False
    starts, ends, axes = (constant_of(x) for x in node.inputs[1:4]) if len(node.inputs) > 3 else (None, None, None)
    if starts is None or ends is None or axes is None:
        return False
    return any(
        int(a) % layout.rank == 1 and int(s) >= 0 and 0 <= int(e) <= layout.prefix
        for s, e, a in zip(starts, ends, axes, strict=True)
    )


def tap_at(name: str, roles: tuple[str, ...], value: ir.Value, layout: Layout, batch_norm: str) -> Tap:
    """The manifest's entry for a tapped value."""
    channels = dims(value)[layout.channel_axis]
    assert channels is not None
    return Tap(name, roles, channels, layout.grid, batch_norm, layout.kind, layout.prefix)


def to_maps(tape: Tape, value: ir.Value, tap: Tap) -> ir.Value:
    """A tapped value, or its cotangent, as (batch, channels, height, width)."""
    if tap.layout == "NCHW":
        return value
    if tap.layout == "NHWC":
        return tape.Transpose(value, perm=[0, 3, 1, 2])
    if tap.prefix:
        value = tape.Slice(value, [tap.prefix], [2**31], [1])
    return tape.Reshape(tape.Transpose(value, perm=[0, 2, 1]), [-1, tap.channels, *tap.grid])


def from_maps(tape: Tape, maps: ir.Value, tap: Tap, prefix: ir.Value | None) -> ir.Value:
    """The inverse of `to_maps`; prefix (batch, prefix, channels), for tokens that have one."""
    if tap.layout == "NCHW":
        return maps
    if tap.layout == "NHWC":
        return tape.Transpose(maps, perm=[0, 2, 3, 1])
    tokens = tape.Transpose(tape.Reshape(maps, [-1, tap.channels, math.prod(tap.grid)]), perm=[0, 2, 1])
    return tokens if prefix is None else tape.Concat(prefix, tokens, axis=1)
