"""Which tensors a bundle taps, and in which role: `layers="conv"`, `"last"`, `"default"` (both), or a list of names.

Roles come from the graph. "last" is the last tensor on a spatial grid, after its batch norm and activation and before
the grid is pooled or flattened; in a network of tokens, the last layer norm whose grid the logits read. Everything that
the logits read of the image passes through it. The nesting of PyTorch modules does not matter: a network has the same
roles from PyTorch and from ONNX.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ...runtime.errors import ExportError, UnknownLayer, near
from ..autodiff import on_path
from ..tape import constant_of, dims, made_by
from .axes import Axes
from .follow import follow
from .layouts import Layout, named_layouts
from .reads import carries_all, read_by_prefix_only

ROLES = ("conv", "last", "default")

_POOLINGS = ("GlobalAveragePool", "AveragePool", "ReduceMean", "ReduceSum")
# they change how a tensor is held, not what it holds
_SAME_NUMBERS = ("Transpose", "Identity", "Dropout", "Cast", "Reshape", "Flatten")
_QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_PROJECTION = (
    *_SAME_NUMBERS,
    *_QUANTISED,
    *["MatMul", "Gemm", "Add", "Mul", "Div", "Split", "Slice", "Gather", "Squeeze", "Unsqueeze"],
)
_NORMS = ("BatchNormalization", "InstanceNormalization", "GroupNormalization", "LayerNormalization", "LRN")
_ACTIVATIONS = (
    *["Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Elu", "Selu", "Celu", "Clip", "Gelu", "Erf"],
    *["Sigmoid", "HardSigmoid", "Swish", "HardSwish", "Mish", "Softplus", "Softsign", "Tanh"],
    "QuantizeLinear",  # a quantised network's rectifiers lie in the range of its numbers
)


@dataclass(frozen=True)
class FeatureMaps:
    """What is known of a graph's tensors. known: the layout of those that hold a map; unread: maps of which the logits
    read a class token alone; reachable: what lies between image and logits, in the graph's order; last: the tensor in
    the role "last"; without_last: why there is none, a clause, else ""; deeper: a tensor behind "last", on a coarser
    grid, that the logits read beside it.
    """

    known: Mapping[ir.Value, Layout]
    unread: set[ir.Value]
    reachable: Mapping[ir.Value, None]
    last: ir.Value | None
    without_last: str
    deeper: ir.Value | None


def feature_maps(graph: ir.Graph, logits: ir.Value, without_gradient: Container[str] = ()) -> FeatureMaps:
    """Follows the image's grid through a graph with shapes. without_gradient: names of maps whose gradient was seen to
    be zero.
    """
    followed = follow(graph)
    layouts = named_layouts(followed)
    seen = {v for v in layouts if str(v.name) in without_gradient}
    unread = read_by_prefix_only(graph, layouts, logits, seen) | seen
    path = on_path(graph, list(graph.inputs), logits, past_stops=True)
    reachable = dict.fromkeys(y for node in graph for y in node.outputs if y in path)
    read = [y for y in reachable if y not in unread]
    try:
        last, why = last_on_grid(read, layouts, followed, lambda y: carries_all(graph, layouts, unread, logits, y)), ""
    except NoLastLayer as reason:
        last, why = None, str(reason)
    behind = on_path(graph, [last], logits) if last is not None else set()
    coarser = [
        v
        for v in read
        if last is not None
        and v in behind
        and v in layouts
        and 1 not in layouts[v].grid
        and 1 < math.prod(layouts[v].grid) < math.prod(layouts[last].grid)
    ]
    return FeatureMaps(layouts, unread, reachable, last, why, coarser[-1] if coarser else None)


class NoLastLayer(ExportError):
    """No tensor can have the role "last"; the message says why."""


def last_on_grid(
    order: Sequence[ir.Value],
    known: Mapping[ir.Value, Layout],
    followed: Mapping[ir.Value, Axes],
    carries_all: Callable[[ir.Value], bool],
) -> ir.Value:
    """The tensor in the role "last". order: the tensors that the logits read at their grid, as the graph computes
    them; followed: the axes of those of which something is known; carries_all: whether all that the logits read of the
    grid passes a tensor.

    NoLastLayer if a later tensor has positions that could not be followed, or has them in an order of axes that no
    layout has: an earlier tensor would be taken for the last; and if the logits read the image on several branches that
    no single tensor feeds.
    """
    grids = [v for v in order if v in known and known[v].grid != (1, 1) and made_by(v, "Slice", "Pad") is None]
    if any(_pooled_to_strip(v, known) for v in grids):  # later tensors have only rows or only columns
        grids = [v for v in grids if 1 not in known[v].grid]
    behind = order[order.index(grids[-1]) + 1 :] if grids else order
    lost = next((v for v in behind if _unusable(v, known, followed)), None)
    if lost is not None and lost in followed and not followed[lost].lies_over_image:
        moved = _moved_off_image(behind, followed)
        raise NoLastLayer(
            f"{moved.op_type} (node {moved.name!r}) pads or crops the picture within the network, so that later maps "
            "do not lie over the picture: remove this step from the model and let the recipe do it (resize, crop, "
            "letterbox)"
        )
    if lost is not None:
        node = lost.producer()
        assert node is not None
        raise NoLastLayer(
            f"the output of {node.op_type} (node {node.name!r}) could not be traced back to the rows and columns of "
            "the picture"
        )
    if not grids:
        raise NoLastLayer("no tensor that the logits read is known to be a feature map on a grid")
    deepest = grids[-1]
    last = next((v for v in reversed(grids) if carries_all(v)), None)
    if last is None:
        raise NoLastLayer(f"the logits read the image on several branches ({deepest.name!r} is on one of them)")
    if known[last].token_axis is not None:
        last = _behind_projection(last, known, followed)
    usable = set(grids)
    while (node := last.producer()) is not None and (node.op_type in (*_SAME_NUMBERS, "Slice", "Pow", "Clip", "Max")):
        before = node.inputs[0]
        if before not in usable or known[before].grid != known[last].grid:  # type: ignore[index]
            break
        if node.op_type == "Slice" and known[before].prefix == known[last].prefix:  # type: ignore[index]
            break  # the Slice removed channels, not prefix tokens
        if node.op_type in ("Clip", "Max", "Pow") and not _raises(node, last):
            break
        last = before  # type: ignore[assignment]
    return last


def _pooled_to_strip(value: ir.Value, layouts: Mapping[ir.Value, Layout]) -> bool:
    """Whether a pooling over all rows or all columns made the tensor; not one of a window as wide as high."""
    node = made_by(value, *_POOLINGS, "MaxPool", "ReduceMax")
    before = layouts.get(node.inputs[0]) if node is not None and node.inputs[0] is not None else None
    if before is None or 1 not in layouts[value].grid or 1 in before.grid:
        return False
    rows, columns = (n // m for n, m in zip(before.grid, layouts[value].grid, strict=True))
    return rows != columns


def _raises(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node belongs to generalised mean pooling: the power, or the Clip or Max that keeps its base above 0."""
    if node.op_type == "Pow":
        return constant_of(node.inputs[1]) is not None and all(n.op_type in _POOLINGS for n in value.consumers())
    bounds = [constant_of(x) for x in node.inputs[1:] if x is not None]
    low = (
        len(bounds) == 1
        and bounds[0] is not None
        and bounds[0].size == 1
        and 0 < float(bounds[0].reshape(-1)[0]) < 1e-3
    )
    return low and all(n.op_type == "Pow" for n in value.consumers())


def _moved_off_image(order: Iterable[ir.Value], followed: Mapping[ir.Value, Axes]) -> ir.Node:
    """The first node that moves the grid away from the image, as one does that pads or crops the picture within the
    network.
    """
    node = next(v for v in order if v in followed and not followed[v].lies_over_image).producer()
    assert node is not None
    return node


def _unusable(value: ir.Value, layouts: Mapping[ir.Value, Layout], followed: Mapping[ir.Value, Axes]) -> bool:
    """Whether a layer computed the tensor, with positions that no tap can show."""
    if value in layouts:
        return False
    axes = followed.get(value)
    on_grid = axes is None or any(piece.of in ("row", "column") for axis in axes.axes for piece in axis)
    return on_grid and (_has_positions(value) or _sums_on_grid(value, layouts))


def _sums_on_grid(value: ir.Value, layouts: Mapping[ir.Value, Layout]) -> bool:
    """Whether a sum or mean computed the tensor, and its last two sizes are the grid of a known map, as with kernels
    that vary by position.
    """
    return made_by(value, "ReduceSum", "ReduceMean") is not None and tuple(dims(value)[-2:]) in {
        layout.grid for layout in layouts.values() if 1 not in layout.grid
    }


def _has_positions(value: ir.Value) -> bool:
    """Whether a layer of a network made the tensor, and it has more than one position."""
    sizes = dims(value)[1:]
    if len(sizes) == 3 and made_by(value, "Conv", "ConvTranspose", "MaxPool", "AveragePool", "BatchNormalization"):
        return any(n != 1 for n in sizes[1:])
    of_tokens = made_by(value, "LayerNormalization") is not None or _is_activated_product(value)
    return of_tokens and any(n != 1 for n in sizes[:-1])


def _is_activated_product(value: ir.Value) -> bool:
    """Whether the tensor is a linear layer's output after an activation."""
    node = made_by(value, *_ACTIVATIONS)
    before = node.inputs[0] if node is not None else None
    while (node := made_by(before, "Add", "Mul", "Div", "Reshape", "Gemm", "MatMul")) is not None:
        if node.op_type in ("Gemm", "MatMul"):
            return constant_of(node.inputs[1]) is not None
        before = next((x for x in node.inputs if x is not None and constant_of(x) is None), None)
    return False


def _behind_projection(value: ir.Value, layouts: Mapping[ir.Value, Layout], followed: Container[ir.Value]) -> ir.Value:
    """The norm's output of which a token tensor is a linear projection; for attention's keys and values without a norm,
    the tensor from which they are projected; else the tensor itself.
    """
    inner = value
    while (node := inner.producer()) is not None:
        if node.op_type in _NORMS:
            return inner if inner in layouts else value
        computed = [x for x in node.inputs if x is not None and x in followed]
        if node.op_type not in _PROJECTION or len(computed) != 1:
            break
        inner = computed[0]
    return inner if inner in layouts and _is_attended(value) else value


def _is_attended(value: ir.Value) -> bool:
    """Whether a tensor is multiplied by other computed numbers, as attention's keys and values are."""
    pending, seen = [value], set()
    while pending:
        x = pending.pop()
        for node in x.consumers():
            products = node.op_type in ("MatMul", "Einsum")
            if products and all(y is None or constant_of(y) is None for y in node.inputs):
                return True
            if node not in seen and node.op_type in _PROJECTION and not products:
                seen.add(node)
                pending += node.outputs
    return False


def is_finished(value: ir.Value) -> bool:
    """Whether a tensor already has its norm and activation: some reader is neither a norm nor an activation, or there
    is no reader.
    """
    readers = [n for n in value.consumers() if n.op_type != "Identity"]
    gates = {n.outputs[0] for n in readers if n.op_type in _ACTIVATIONS}

    def continues(node: ir.Node) -> bool:
        if node.op_type in (*_NORMS, *_ACTIVATIONS):
            return True
        if node.op_type in ("Mul", "Div") and any(x in gates for x in node.inputs):  # x sigmoid(x)
            return True
        return node.op_type in ("Mul", "Div") and any(n.op_type in _ACTIVATIONS for n in node.outputs[0].consumers())

    return not readers or not all(continues(n) for n in readers)


def choose(
    layers: str | Sequence[str],
    convolutions: Sequence[str],
    last: str | None,
    known: Iterable[str],
    finished: Callable[[str], bool] = lambda _: False,
    without_last: str = "",
    deeper: str | None = None,
) -> dict[str, tuple[str, ...]]:
    """Names to tap, in the model's order, with their roles.

    convolutions: names with the role "conv"; last: the name with the role "last", or None; known: all names in the
    model's order. If layers are named and `last` is not among them, the deepest named one that is `finished` takes its
    role, with a warning. For warnings: without_last, why the network has no last layer; deeper, the name of a layer
    after `last` on a coarser grid. UnknownLayer suggests similar names; ExportError if there is nothing to tap.
    """
    known = list(known)
    check_names(layers, known)
    if isinstance(layers, str):
        requested_names = {
            "conv": list(convolutions),
            "last": [last] if last else [],
            "default": [*convolutions, *([last] if last else [])],
        }.get(layers, [layers])
    else:
        requested_names = list(layers)
    if not requested_names and isinstance(layers, str):
        raise nothing_to_tap(layers, without_last)
    if deeper is not None and last in requested_names:
        warnings.warn(
            f"the logits read {last!r} directly and also through the deeper {deeper!r}: the former is the last layer, "
            "since all that they read of the image passes through it; name the latter to explain its part alone",
            stacklevel=6,
        )
    chosen = [n for n in known if n in set(requested_names)]
    named = layers not in ROLES
    stand_in = None
    if named and last not in chosen:
        stand_in = next((n for n in reversed(chosen) if finished(n)), None)
        if stand_in is not None:
            own = f"the network's own is {last!r}" if last is not None else f"the network has none: {without_last}"
            warnings.warn(
                f"layer {stand_in!r} is used as the last layer: of the named layers it is the deepest one after its "
                f"norm and activation; {own}",
                stacklevel=6,
            )
    roles = {}
    for name in chosen:
        is_last = name == (stand_in if stand_in is not None else last)
        roles[name] = tuple(role for role, holds in (("conv", name in convolutions), ("last", is_last)) if holds)
    return roles


def warn_of_no_last(layers: object, last: str | None, without_last: str) -> None:
    """Warns that the bundle has no last layer, if `layers` asks for one. without_last: why, a clause."""
    if last is None and layers in ("last", "default"):
        warnings.warn(
            f"{without_last}; so the bundle has no last layer, which many methods need: name a layer",
            stacklevel=5,
        )


def nothing_to_tap(layers: object, without_last: str) -> ExportError:
    """The error for `layers` that select nothing. without_last: why there is no last layer, a clause, or ""."""
    because = without_last or "name the layers to explain"
    return ExportError(f"layers={layers!r} finds nothing in this model: {because}")


def not_a_map(name: str, value: ir.Value) -> ExportError:
    """The error for a named layer that is not a feature map."""
    return ExportError(
        f"layer {name!r} has output {value.shape}, which is not known to be a feature map (batch, channels, height, "
        "width), channels-last, or tokens of a grid, over the whole picture: name other layers"
    )


def check_names(layers: str | Sequence[str], known: Iterable[str]) -> list[str]:
    """The layers that the user named; [] for a role. UnknownLayer suggests similar names."""
    known = list(known)
    named = [layers] if isinstance(layers, str) else list(layers)
    if layers in ROLES:
        return []
    for name in named:
        if name not in known:
            raise UnknownLayer(f"the model has no layer {name!r}{near(name, known)}")
    return named
