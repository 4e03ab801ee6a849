"""Which tensors a bundle taps, and in which role: `layers="conv"`, `"last"`, `"default"` (both), or a list of names.

Roles come from the graph. "last" is the last tensor on a spatial grid that the logits read before the grid is pooled or flattened,
behind its batch norm and activation; of tokens, the last layer norm whose grid the logits read. All that the logits read of the image passes it. How PyTorch modules are nested
plays no part, so that a network has the same roles from PyTorch and from ONNX.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ..runtime.errors import ExportError, UnknownLayer, near
from .autodiff import on_path
from .layouts import TAPPABLE, Axes, Layout, carries_all, follow, named_layouts, read_by_prefix_only
from .tape import dims, made_by

ROLES = ("conv", "last", "default")

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
    """What is known of a graph's tensors. known: the layout of those that hold a map; unread: maps of which the logits read a class
    token alone; reachable: what lies between image and logits, in the graph's order; last: the tensor in the role "last".
    """

    known: Mapping[ir.Value, Layout]
    unread: set[ir.Value]
    reachable: Mapping[ir.Value, None]
    last: ir.Value | None


def feature_maps(graph: ir.Graph, logits: ir.Value) -> FeatureMaps:
    """Warns where no tensor can have the role "last"."""
    followed = follow(graph)
    known = named_layouts(followed)
    unread = read_by_prefix_only(graph, known, logits)
    path = on_path(graph, list(graph.inputs), logits, past_stops=True)
    reachable = dict.fromkeys(y for node in graph for y in node.outputs if y in path)
    read = [y for y in reachable if y not in unread]
    last = last_on_grid(read, known, followed, lambda y: carries_all(graph, known, unread, logits, y))
    return FeatureMaps(known, unread, reachable, last)


def last_on_grid(
    order: Sequence[ir.Value],
    known: Mapping[ir.Value, Layout],
    followed: Mapping[ir.Value, Axes],
    carries_all: Callable[[ir.Value], bool],
) -> ir.Value | None:
    """The tensor in the role "last". order: the tensors that the logits read at their grid, as the graph computes them; followed:
    the axes of those of which something is known; carries_all: whether all that the logits read of the grid passes a tensor.

    None, with a warning, where a later tensor has positions that are not followed, or in another order of axes than a layer can
    have: an earlier one would pass for the last. None, too, where the network ends in several branches that no tensor feeds.
    """
    grids = [
        v
        for v in order
        if v in known and known[v].kind in TAPPABLE and known[v].grid != (1, 1) and made_by(v, "Slice", "Pad") is None
    ]
    if not grids:
        return None
    lost = next((v for v in order[order.index(grids[-1]) + 1 :] if _unusable(v, known, followed)), None)
    if lost is not None:
        node = lost.producer()
        assert node is not None
        warnings.warn(
            f"what {node.op_type} (node {node.name!r}) computes is not known to be a feature map (batch first), so the bundle has no last "
            "layer for the methods that explain it: name a layer",
            stacklevel=6,
        )
        return None
    deepest = grids[-1]
    last = next((v for v in reversed(grids) if carries_all(v)), None)
    if last is None:
        warnings.warn(
            f"the logits read the image on several branches ({deepest.name!r} is on one of them), so the bundle has no last layer for "
            "the methods that explain it: name a layer",
            stacklevel=6,
        )
        return None
    if known[last].kind == "tokens":
        last = _behind_projection(last, known, followed)
    usable = set(grids)
    while (node := last.producer()) is not None and (node.op_type in _SAME_NUMBERS or node.op_type == "Slice"):
        before = node.inputs[0]
        if before not in usable or known[before].grid != known[last].grid:  # type: ignore[index]
            break
        if node.op_type == "Slice" and known[before].prefix == known[last].prefix:  # type: ignore[index]
            break  # channels, not the tokens before the grid, were left behind
        last = before  # type: ignore[assignment]
    return last


def _unusable(value: ir.Value, known: Mapping[ir.Value, Layout], followed: Mapping[ir.Value, Axes]) -> bool:
    """Whether a layer of the network made a tensor with positions that no tap can show."""
    if value in known and known[value].kind in TAPPABLE:
        return False
    axes = followed.get(value)
    on_grid = axes is None or any(piece.of in ("row", "column") for axis in axes.axes for piece in axis)
    return on_grid and _has_positions(value)


def _has_positions(value: ir.Value) -> bool:
    """Whether a layer of a network made the tensor, and it has more than one position."""
    sizes = dims(value)[1:]
    if len(sizes) == 3 and made_by(value, "Conv", "ConvTranspose", "MaxPool", "AveragePool", "BatchNormalization"):
        return any(n != 1 for n in sizes[1:])
    return made_by(value, "LayerNormalization") is not None and any(n != 1 for n in sizes[:-1])


def _behind_projection(value: ir.Value, known: Mapping[ir.Value, Layout], followed: Container[ir.Value]) -> ir.Value:
    """The norm that a token tensor is a projection of, as attention's keys and values are; else the tensor itself."""
    inner = value
    while (node := inner.producer()) is not None:
        if node.op_type in _NORMS:
            return inner if inner in known else value
        computed = [x for x in node.inputs if x is not None and x in followed]
        if node.op_type not in _PROJECTION or len(computed) != 1:
            return value
        inner = computed[0]
    return value


def is_finished(value: ir.Value) -> bool:
    """Whether a tensor lies behind its norm and activation: not all that reads it normalises or activates it."""
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
) -> dict[str, tuple[str, ...]]:
    """Names to tap, in the model's order, with their roles.

    Where layers are named and the last tensor on the grid is not among them, the deepest that is `finished` takes its role, with a
    warning. UnknownLayer names near misses; ExportError if nothing is left to tap.
    """
    known = list(known)
    check_names(layers, known)
    if isinstance(layers, str):
        wanted = {
            "conv": list(convolutions),
            "last": [last] if last else [],
            "default": [*convolutions, *([last] if last else [])],
        }.get(layers, [layers])
    else:
        wanted = list(layers)
    if not wanted and isinstance(layers, str):
        raise ExportError(f"layers={layers!r} finds nothing in this model: name the layers to explain")
    chosen = [n for n in known if n in set(wanted)]
    named = layers not in ROLES
    stand_in = None
    if named and last not in chosen:
        stand_in = next((n for n in reversed(chosen) if finished(n)), None)
        if stand_in is not None:
            warnings.warn(
                f"layer {stand_in!r} stands for the last layer, the deepest of those named that lies behind its norm and activation; "
                f"the network's own is {last!r}",
                stacklevel=6,
            )
    roles = {}
    for name in chosen:
        is_last = name == (stand_in if stand_in is not None else last)
        roles[name] = tuple(role for role, holds in (("conv", name in convolutions), ("last", is_last)) if holds)
    return roles


def check_names(layers: str | Sequence[str], known: Iterable[str]) -> list[str]:
    """The layers that were named, rather than chosen by role. UnknownLayer names near misses."""
    known = list(known)
    named = [layers] if isinstance(layers, str) else list(layers)
    if layers in ROLES:
        return []
    for name in named:
        if name not in known:
            raise UnknownLayer(f"the model has no layer {name!r}{near(name, known)}")
    return named
