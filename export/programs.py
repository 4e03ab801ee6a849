"""The programs of a bundle, each built from its own copy of the tapped forward graph.

Feature maps leave and enter every program as (batch, channels, height, width), whatever the network's layout is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ..runtime.bundle.kinds import KINDS, Kind
from ..runtime.bundle.manifest import Tap
from ..runtime.errors import UnsupportedOperator
from . import vjp  # noqa: F401  registers the gradient rules
from .autodiff import NOT_SHARED, on_path
from .autodiff import gradients as cotangents
from .graph import TappedGraph, batch_norm_affine, finish, fold_batch_norm, keeps_batch_apart, named_values
from .head import head, normalize, score, trunk
from .layers.layouts import layouts, to_maps
from .layers.norms import behind_norm
from .precision import takes_half, to_half
from .tape import Tape, attribute, constant_of, dims, output, static_dims, weight_dims

# In mixed precision a seed is scaled until this is its largest entry: gradients from 2e-7 to 250, for a seed whose
# largest entry is 1, are then normal float16 numbers.
SEED_SCALE = 256.0


@dataclass(frozen=True)
class BuiltProgram:
    """A program before it is written."""

    kind: str
    file: str
    taps: tuple[str, ...]
    model: ir.Model
    precision: str


def build_programs(graph: TappedGraph, progress: Callable[[str], None] = lambda _: None) -> list[BuiltProgram]:
    """Builds the programs of a bundle. UnsupportedOperator if an operator between a tap and the logits has no rule.

    classify; normalize and score, if the graph normalises its own image; masked, in float16; activations, gradients and
    layer_maps for all taps, and again for the last block alone, whose backward pass is short; signed_maps; full_grad,
    if the network allows it; trunk and head, the network cut in two, at the last block and at every tap that is not a
    convolution. All are in the graph's precision, but programs that run once per explanation are always float32.
    """
    last, whole = graph.select("last"), replace(graph, taps=())
    scopes = [("", graph)] + ([(".last", last)] if last.taps and len(last.taps) < len(graph.taps) else [])
    built = []

    def add(kind: Kind, suffix: str, scope: TappedGraph, build: Callable[[TappedGraph], ir.Model | None]) -> None:
        half = graph.precision == "float16" and not KINDS[kind].runs_once
        name = f"{kind}{suffix}{'.fp16' if half else ''}"
        progress(f"building {name}")
        model = build(scope)
        if model is not None:
            taps = tuple(t.name for t, _ in scope.taps)
            model = to_half(model) if half else model
            model = takes_half(model) if kind == Kind.MASKED else model
            built.append(BuiltProgram(kind, f"{name}.onnx", taps, model, "float16" if half else "float32"))

    add(Kind.CLASSIFY, "", whole, classify)
    if graph.normalized is not None:
        add(Kind.NORMALIZE, "", whole, normalize)
        add(Kind.SCORE, "", whole, score)
    if graph.precision == "float16":
        add(Kind.MASKED, "", whole, masked)
    for suffix, scope in scopes:
        add(Kind.ACTIVATIONS, suffix, scope, activations)
        add(Kind.GRADIENTS, suffix, scope, gradients)
        add(Kind.LAYER_MAPS, suffix, scope, layer_maps)
    add(Kind.SIGNED_MAPS, "", graph, signed_maps)
    with contextlib.suppress(UnsupportedOperator):  # FullGrad alone needs all of the network to be differentiable maps
        add(Kind.FULL_GRAD, "", whole, full_grad)
    for i, (tap, value) in enumerate(graph.taps):
        if "last" not in tap.roles and "conv" in tap.roles:
            continue
        suffix = "" if "last" in tap.roles else f".{i}"
        cut = replace(graph, taps=((tap, value),))
        add(Kind.TRUNK, suffix, cut, trunk)
        add(Kind.HEAD, suffix, cut, head)
        if built[-1].kind == Kind.TRUNK:  # of no use without its head
            built.pop()
    return built


def seeds_share_image(graph: TappedGraph) -> bool:
    """True if programs accept several seeds for one image: every tensor between the taps and the logits has the batch
    alone on its first axis, and every gradient rule there broadcasts the image's tensors.
    """
    values = named_values(graph.model.graph)
    path = on_path(graph.model.graph, [values[name] for _, name in graph.taps], values[graph.logits])
    if any(n.op_type in NOT_SHARED and any(y in path for y in n.outputs) for n in graph.model.graph):
        return False
    return keeps_batch_apart(graph.model.graph, path)


def classify(graph: TappedGraph) -> ir.Model:
    """image (B, C, H, W) -> logits (B, classes)."""
    return _program(graph, lambda tape, logits, values, recovered: [])


def masked(graph: TappedGraph) -> ir.Model:
    """masked (B, C', H, W) float32, until `takes_half` -> logits: what runs on masked images."""
    model = classify(graph) if graph.normalized is None else score(graph)
    model.graph.inputs[0].name = "masked"
    return model


def activations(graph: TappedGraph) -> ir.Model:
    """image -> logits, and per tap its activation (B, K, h, w)."""
    return _program(
        graph,
        lambda tape, logits, values, recovered: [
            output(tape, to_maps(tape, v, tap), f"activation:{tap.name}", ["batch", tap.channels, *tap.grid])
            for (tap, _), v in zip(graph.taps, values, strict=True)
        ],
    )


def gradients(graph: TappedGraph) -> ir.Model:
    """image, seed -> logits, and per tap its activation (B, K, h, w) and gradient (S, K, h, w) of seed . logits.

    seed (S, classes), S = B or, for several targets of one image, B = 1. A row of zeros stands for the top class.
    """

    def build(tape: Tape, logits: ir.Value, values: list[ir.Value], recovered: object) -> list[ir.Value]:
        seed, restored = _seed(tape, logits, graph.precision)
        outputs = []
        for (tap, _), v, g in zip(graph.taps, values, cotangents(tape, values, logits, seed), strict=True):
            sizes = [tap.channels, *tap.grid]
            outputs.append(output(tape, to_maps(tape, v, tap), f"activation:{tap.name}", ["batch", *sizes]))
            outputs.append(output(tape, restored(to_maps(tape, g, tap), 4), f"gradient:{tap.name}", ["seeds", *sizes]))
        return outputs

    return _program(graph, build)


def layer_maps(graph: TappedGraph) -> ir.Model:
    """image, seed -> logits, alphas (S, sum K) and maps (S, sum h w), taps side by side in their order.

    alpha_k = mean over the grid of the gradient; map = sum_k alpha_k A_k, not rectified. Batch norm is folded into the
    convolutions; where a tap was the convolution's own output A, with y = s A + b: alpha_A = s alpha_y and
    map = sum_k alpha_y,k (y_k - b_k).
    """

    def build(
        tape: Tape, logits: ir.Value, values: list[ir.Value], recovered: list[tuple[np.ndarray, np.ndarray] | None]
    ) -> list[ir.Value]:
        seed, restored = _seed(tape, logits, graph.precision)
        pooled = [_pool_behind(v, values) for v in values]
        sources = [v if p is None else p for v, p in zip(values, pooled, strict=True)]
        alphas, maps, scales = [], [], []
        source_gradients = cotangents(tape, sources, logits, seed)
        for (tap, _), v, p, g, affine in zip(graph.taps, values, pooled, source_gradients, recovered, strict=True):
            channels, (h, w) = tap.channels, tap.grid
            v, g = to_maps(tape, v, tap), to_maps(tape, g, tap)
            if p is not None:
                part = math.prod(static_dims(p)[1:]) / (h * w)
                g = tape.Mul(tape.mask(tape.Greater(p, tape.floats(0)), g), tape.floats(part))
            alpha = tape.Reshape(tape.GlobalAveragePool(g), [-1, 1, channels])
            scale, shift = (np.ones(channels), np.zeros(channels)) if affine is None else affine
            scales.append(scale)
            alphas.append(alpha)
            maps.append(_weighted_sum(tape, alpha, v, tap, shift))
        scale = tape.floats(np.concatenate(scales))
        joined = [restored(tape.Mul(_flat(tape, alphas), scale), 2), restored(_flat(tape, maps), 2)]
        widths = [sum(t.channels for t, _ in graph.taps), sum(math.prod(t.grid) for t, _ in graph.taps)]
        return [
            output(tape, value, name, ["seeds", width])
            for value, name, width in zip(joined, ("alphas", "maps"), widths, strict=True)
        ]

    return _program(graph, build, fold=True)


def signed_maps(graph: TappedGraph) -> ir.Model:
    """image, seed, ratio (S, 1) -> logits, maps (S, sum h w), taps side by side in their order, and magnitudes
    (S, taps): Integrative CAM's.

    map = sum_k u_k y_k, not rectified; magnitude = sum_k,mn |u_k y_k|, with u = G / (2 + ratio |G| sum_mn |y_k,mn|) at
    each position. y is the tap, or the output of the norm that alone reads it; G is its gradient. ratio: |third /
    second derivative| of the smooth function of the score. In front of a norm that divides by the tap's own deviation,
    sum_k G_k y_k would be 0.
    """

    def build(tape: Tape, logits: ir.Value, values: list[ir.Value], recovered: object) -> list[ir.Value]:
        seed, restored = _seed(tape, logits, graph.precision)
        ratio = ir.Value(name="ratio", shape=ir.Shape(["seeds", 1]), type=ir.TensorType(ir.DataType.FLOAT))
        tape.graph.inputs.append(ratio)
        bend = tape.Reshape(restored(ratio, 2), [-1, 1, 1, 1])  # scaled as the gradients are
        layout_by_value, taps, sources = layouts(tape.graph), [], []
        for (tap, _), value in zip(graph.taps, values, strict=True):
            behind = behind_norm(value, layout_by_value)
            sources.append(value if behind is None else behind)
            layout = None if behind is None else layout_by_value[behind]
            taps.append(tap if layout is None else replace(tap, layout=layout.kind, prefix=layout.prefix))
        maps, magnitudes = [], []
        for tap, v, g in zip(taps, sources, cotangents(tape, sources, logits, seed), strict=True):
            v, g = to_maps(tape, v, tap), to_maps(tape, g, tap)
            if graph.precision != "float32":  # a sum over the grid may be too large for float16
                g = tape.Cast(g, to=ir.DataType.FLOAT)
            total = tape.Mul(tape.ReduceSum(tape.Abs(v), [2, 3], keepdims=1), bend)
            divisor = tape.Add(tape.Mul(tape.Abs(g), total), tape.floats(2))
            evidence = tape.Div(tape.Mul(g, v), divisor)
            magnitudes.append(tape.Reshape(tape.ReduceSum(tape.Abs(evidence), [1, 2, 3], keepdims=0), [-1, 1, 1]))
            maps.append(tape.Reshape(tape.ReduceSum(evidence, [1], keepdims=0), [-1, 1, math.prod(tap.grid)]))
        width = sum(math.prod(t.grid) for t, _ in graph.taps)
        return [
            output(tape, restored(_flat(tape, maps), 2), "maps", ["seeds", width]),
            output(tape, restored(_flat(tape, magnitudes), 2), "magnitudes", ["seeds", len(taps)]),
        ]

    return _program(graph, build, fold=True)


def full_grad(graph: TappedGraph) -> ir.Model:
    """image, seed (S, classes), one image per seed -> logits, and per grid size the sum of the FullGrad maps (S, h, w)
    of that size. UnsupportedOperator if a bias is not added on an NCHW map, or an operator has no rule.

    For every convolution's bias, every batch norm's (beta - mean gamma / sqrt(var + eps)) and the image itself: sum
    over channels of minmax(|bias_k g_k|), or of minmax(|image_c g_c|), minmax being (x - min) / (1e-7 + max - min).
    """

    def build(tape: Tape, logits: ir.Value, values: list[ir.Value], recovered: object) -> list[ir.Value]:
        image = tape.graph.inputs[0]
        path = on_path(tape.graph, [image], logits)
        layout_by_value = layouts(tape.graph)
        biased = [(y, b) for y, b in _biased(tape.graph) if y in path]
        for y, _ in biased:
            if y not in layout_by_value or layout_by_value[y].kind != "NCHW":
                raise UnsupportedOperator(f"FullGrad needs every bias on the image's grid, and {y.name!r} is not")
        points = [image, *(y for y, _ in biased)]
        weights = [image, *(tape.floats(b.reshape(1, -1, 1, 1)) for _, b in biased)]
        seed, restored = _seed(tape, logits, graph.precision)
        sums: dict[tuple[int, ...], ir.Value] = {}
        for point, weight, g in zip(points, weights, cotangents(tape, points, logits, seed), strict=True):
            magnitude = tape.Abs(tape.Mul(restored(g, 4), weight))
            shifted = tape.Sub(magnitude, tape.ReduceMin(magnitude, [2, 3], keepdims=1))
            span = tape.Add(tape.ReduceMax(shifted, [2, 3], keepdims=1), tape.floats(1e-7))
            summed = tape.ReduceSum(tape.Div(shifted, span), [1], keepdims=0)
            grid = static_dims(point)[1:]
            sums[grid] = tape.Add(sums[grid], summed) if grid in sums else summed
        return [output(tape, m, f"grid:{h}x{w}", ["seeds", h, w]) for (h, w), m in sums.items()]

    return _program(graph, build)


def _biased(graph: ir.Graph) -> list[tuple[ir.Value, np.ndarray]]:
    """Outputs (B, K, h, w) of convolutions and batch norms that add a constant, and that constant (K,)."""
    biases = []
    for node in graph:
        y = node.outputs[0]
        if y.shape is None or len(y.shape) != 4:
            continue
        if node.op_type == "Conv" and len(node.inputs) > 2 and constant_of(node.inputs[2]) is not None:
            biases.append((y, constant_of(node.inputs[2])))
        elif node.op_type == "BatchNormalization":
            affine = batch_norm_affine(node)
            if affine is not None:
                biases.append((y, affine[1]))
    return biases


def _weighted_sum(tape: Tape, alpha: ir.Value, value: ir.Value, tap: Tap, shift: np.ndarray) -> ir.Value:
    """sum_k alpha_k (y_k - shift_k), alpha (S, 1, K), y (B, K, h, w) -> (S, 1, h w).

    Where y is a 1 x 1 convolution of fewer channels, y = W x + b, it is (alpha W) x + sum_k alpha_k (b_k - shift_k): x
    is smaller to read than y.
    """
    channels, (h, w) = tap.channels, tap.grid
    node, source, constant = value.producer(), value, -shift
    if node is not None and _is_narrow_pointwise(node, h * w):
        source, weight = node.inputs[0], node.inputs[1]
        assert source is not None and weight is not None
        bias = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
        constant = (np.zeros(channels, np.float32) if bias is None else bias) - shift.astype(np.float32)
        alpha_w = tape.MatMul(alpha, tape.Reshape(weight, list(weight_dims(weight)[:2])))
        summed = tape.MatMul(alpha_w, tape.Reshape(source, [-1, weight_dims(weight)[1], h * w]))
    else:
        summed = tape.MatMul(alpha, tape.Reshape(source, [-1, channels, h * w]))
    return tape.Add(summed, tape.MatMul(alpha, tape.floats(constant[:, None]))) if constant.any() else summed


def _is_narrow_pointwise(node: ir.Node, pixels: int) -> bool:
    """True for a plain 1 x 1 Conv with a known bias whose input and weights together have less than 0.6 times as many
    numbers as its output.
    """
    if node.op_type != "Conv" or node.inputs[1] is None:
        return False
    channels, inputs, *kernel = weight_dims(node.inputs[1])
    plain = (
        all(k == 1 for k in kernel)
        and attribute(node, "group", 1) == 1
        and all(s == 1 for s in attribute(node, "strides", [1]))
        and not any(attribute(node, "pads", [0]))
        and (len(node.inputs) < 3 or node.inputs[2] is None or constant_of(node.inputs[2]) is not None)
    )
    return plain and (pixels + channels) * inputs < 0.6 * pixels * channels


def _flat(tape: Tape, rows: Sequence[ir.Value]) -> ir.Value:
    """Rows (S, 1, n) side by side, (S, sum n)."""
    return tape.Squeeze(tape.Concat(*rows, axis=2), [1])


def _pool_behind(tap: ir.Value, taps: Sequence[ir.Value]) -> ir.Value | None:
    """The output p of a MaxPool, if `tap` feeds only a ReLU, the ReLU only that MaxPool, and no other tap comes before
    `tap`; else None.

    The sum over the grid of the tap's gradient is then sum g_p [p > 0], whichever elements were the maxima: the pooling
    need not be differentiated.
    """
    value = tap
    for op_type in ("Relu", "MaxPool"):
        consumers = value.consumers()
        if len(consumers) != 1 or consumers[0].op_type != op_type or value.is_graph_output():
            return None
        value = consumers[0].outputs[0]
    graph = tap.graph
    assert isinstance(graph, ir.Graph)
    reached = on_path(graph, [v for v in taps if v is not tap], tap)
    return None if any(v in reached for v in taps if v is not tap) else value


def _program(graph: TappedGraph, build: Callable[..., list[ir.Value]], fold: bool = False) -> ir.Model:
    model = graph.model.clone()
    names = [name for _, name in graph.taps]
    recovered: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(names)
    if fold:
        folded = fold_batch_norm(model)
        for i, name in enumerate(names):
            if name in folded:
                names[i], *affine = folded[name]
                recovered[i] = tuple(affine)  # type: ignore[assignment]
    values = named_values(model.graph)
    tape = Tape(model.graph)
    logits = values[graph.logits]
    model.graph.inputs[0].name = "image"
    for (tap, _), name in zip(graph.taps, names, strict=True):
        values[name].meta["layer"] = tap.name
    outputs = build(tape, logits, [values[n] for n in names], recovered)
    return finish(model, [output(tape, logits, "logits", ["batch", dims(logits)[1]]), *outputs])


def _seed(tape: Tape, logits: ir.Value, precision: str) -> tuple[ir.Value, Callable[[ir.Value, int], ir.Value]]:
    """Adds the `seed` input (S, classes) and returns (seed, restored). A row of zeros becomes the one-hot row of the
    image's top class (the first, in a tie).

    In mixed precision the seed is scaled against underflow. restored(value, rank), for a value that is linear in the
    seed: undoes the seed's scaling; returns float32.
    """
    classes = dims(logits)[1]
    assert classes is not None
    seed_input = ir.Value(name="seed", shape=ir.Shape(["seeds", classes]), type=ir.TensorType(ir.DataType.FLOAT))
    tape.graph.inputs.append(seed_input)
    nonzero = tape.Greater(tape.ReduceMax(tape.Abs(seed_input), [1], keepdims=1), tape.floats(0))
    top = tape.Equal(tape.value(list(range(classes))), tape.ArgMax(logits, axis=1, keepdims=1))
    seed = tape.Where(nonzero, seed_input, tape.Cast(top, to=ir.DataType.FLOAT))
    if precision == "float32":
        return seed, lambda value, rank: value
    largest = tape.ReduceMax(tape.Abs(seed), [1], keepdims=1)
    scale = tape.floats(SEED_SCALE)

    def restored(value: ir.Value, rank: int) -> ir.Value:
        factor = tape.Div(largest, scale)
        return tape.Mul(value, factor if rank == 2 else tape.Reshape(factor, [-1, *[1] * (rank - 1)]))

    return tape.Mul(seed, tape.Div(scale, largest)), restored
