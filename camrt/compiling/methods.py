"""The methods that one ONNX file can hold: a row each, which continues a program of the bundle to the finished map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from ..export.tape import Tape
from ..runtime.bundle.kinds import Kind
from ..runtime.bundle.manifest import UNMEASURED
from ..runtime.cams.masking import VARIANTS
from ..runtime.cams.perturbing import RECIPRO_CAM_VARIANTS
from ..runtime.cams.registry import is_number
from ..runtime.cams.winsor import check_options
from ..runtime.errors import InputError, UnknownMethod
from .maps import combined, minmax, resize, scale, sum_channels, within_range
from .perturbing import recipro_cam, score_cam, score_cam_pp
from .source import Compiled, Finished, Source

RATIOS = {"identity": 0.0, "exp": 1.0}  # of the third over the second derivative, where it is the same at any score


def winsor_cam(source: Source, layer_aggregation: str = "mean", low: float = 0.1, high: float = 1.0) -> Finished:
    """sum_l w_l up(minmax(ReLU(M_l))), w the importances winsorized at the input `percentile`."""
    check_options(0, layer_aggregation, "bilinear", low, high)
    tape, taps = source.tape, source.chosen
    noise = [t.noise.get(source.precision, UNMEASURED) for t in taps]
    kept = tape.floats(np.array([[0.0 if n.alone else 1.0 for n in noise]]))
    importance = _importance(source, layer_aggregation, [n.zero for n in noise])
    weights = _winsorized(tape, tape.Mul(importance, kept), source.inputs["percentile"], len(taps), low, high)
    largest = max(t.grid[0] for t in taps), max(t.grid[1] for t in taps)
    parts = source.layers("maps")
    total = None
    for grid in dict.fromkeys(t.grid for t in taps):
        places = [i for i, t in enumerate(taps) if t.grid == grid]
        stack = [tape.Unsqueeze(parts[i], [1]) for i in places]
        rectified = tape.Relu(stack[0] if len(stack) == 1 else tape.Concat(*stack, axis=1))
        scaled = minmax(tape, tape.Reshape(rectified, [-1, len(places), 1, grid[0] * grid[1]]))
        flat = tape.Reshape(scaled, [-1, len(places), grid[0] * grid[1]])
        of_grid = tape.Unsqueeze(tape.Gather(weights, places, axis=1), [1])
        summed = tape.Reshape(tape.MatMul(of_grid, flat), [-1, *grid])
        resized = resize(tape, summed, [grid, largest, source.size])
        total = resized if total is None else tape.Add(total, resized)
    assert total is not None
    return total, weights


def _importance(source: Source, aggregation: str, zero: Sequence[float]) -> ir.Value:
    """ReLU(aggregate_k alpha_k) of each layer, (batch, layers); a mean that cancels is 0."""
    tape, aggregates = source.tape, []
    for alphas, limit in zip(source.layers("alphas"), zero, strict=True):
        if aggregation == "mean":
            mean = tape.ReduceMean(alphas, [1], keepdims=1)
            magnitude = tape.ReduceMean(tape.Abs(alphas), [1], keepdims=1)
            cancelled = tape.LessOrEqual(tape.Abs(mean), tape.Mul(magnitude, tape.floats(limit)))
            aggregates.append(tape.Where(cancelled, tape.floats(0), mean) if limit > 0 else mean)
        else:
            aggregates.append(tape.ReduceMax(alphas, [1], keepdims=1))
    return tape.Relu(aggregates[0] if len(aggregates) == 1 else tape.Concat(*aggregates, axis=1))


def _winsorized(
    tape: Tape, importance: ir.Value, percentile: ir.Value, layers: int, low: float, high: float
) -> ir.Value:
    """Positive importances (batch, layers), clamped at their own percentile (batch,), rescaled to [low, high].

    Ranks are counted by comparing pairs: it needs no sort, which engines limit, and no index computed from data.
    """
    zero, one = tape.floats(0), tape.floats(1)
    positive = tape.Greater(importance, zero)
    counted = tape.Cast(positive, to=ir.DataType.FLOAT)
    count = tape.ReduceSum(counted, [1], keepdims=1)
    last = tape.Relu(tape.Sub(count, one))
    percentile = tape.Min(tape.Relu(tape.Unsqueeze(percentile, [1])), tape.floats(100))
    share = tape.Div(percentile, tape.floats(100))
    position = tape.Mul(share, last)
    below = tape.Floor(position)
    above = tape.Min(tape.Add(below, one), last)
    # rank among the positive ones: how many are smaller, or equal and before it
    column, row = tape.Unsqueeze(importance, [2]), tape.Unsqueeze(importance, [1])
    smaller = tape.Cast(tape.Less(row, column), to=ir.DataType.FLOAT)
    equal = tape.Cast(tape.Equal(row, column), to=ir.DataType.FLOAT)
    before = tape.floats(np.tril(np.ones((layers, layers)), -1)[None])
    ahead = tape.Mul(tape.Add(smaller, tape.Mul(equal, before)), tape.Unsqueeze(counted, [1]))
    rank = tape.ReduceSum(ahead, [2], keepdims=0)

    def at(order: ir.Value) -> ir.Value:
        """The positive importance of a rank, (batch, 1)."""
        hit = tape.Mul(tape.Cast(tape.Equal(rank, order), to=ir.DataType.FLOAT), counted)
        return tape.ReduceSum(tape.Mul(hit, importance), [1], keepdims=1)

    first, second, least = at(below), at(above), at(tape.Mul(last, zero))
    span = tape.Add(tape.Sub(first, least), tape.Mul(tape.Sub(second, first), tape.Sub(position, below)))
    usable = tape.And(tape.Greater(span, zero), tape.Greater(share, zero))
    part = tape.Div(tape.Min(tape.Sub(importance, least), span), tape.Where(usable, span, one))
    rescaled = tape.Add(tape.floats(low), tape.Mul(part, tape.floats(high - low)))
    return tape.Where(positive, tape.Where(usable, rescaled, tape.floats(high)), zero)


def grad_cam(source: Source) -> Finished:
    """ReLU(sum_k alpha_k A_k)."""
    return combined(source.tape, source.maps(), source.size), source.even()


def _of_gradients(layer: Callable[[Tape, ir.Value, ir.Value], ir.Value]) -> Callable[..., Finished]:
    """A baseline that reads each layer's activation and gradient (batch, K, h, w) and gives its map (batch, h, w)."""

    def build(source: Source) -> Finished:
        maps = [(layer(source.tape, a, g), grid) for a, g, grid in source.pairs()]
        return combined(source.tape, maps, source.size), source.even()

    return build


def _grad_cam_pp(tape: Tape, activation: ir.Value, gradient: ir.Value) -> ir.Value:
    square = tape.Mul(gradient, gradient)
    cubed = tape.Mul(tape.ReduceSum(activation, [2, 3], keepdims=1), tape.Mul(square, gradient))
    divisor = tape.Add(tape.Add(tape.Mul(square, tape.floats(2)), cubed), tape.floats(1e-6))
    share = tape.Div(tape.Mul(square, tape.Relu(gradient)), divisor)
    return sum_channels(tape, tape.Mul(tape.ReduceSum(share, [2, 3], keepdims=1), activation))


def _x_grad_cam(tape: Tape, activation: ir.Value, gradient: ir.Value) -> ir.Value:
    total = tape.Add(tape.ReduceSum(activation, [2, 3], keepdims=1), tape.floats(1e-7))
    weight = tape.ReduceSum(tape.Div(tape.Mul(gradient, activation), total), [2, 3], keepdims=1)
    return sum_channels(tape, tape.Mul(weight, activation))


def integrative_cam(source: Source, smooth: str = "identity", reading: str = "signed") -> Finished:
    """sum_l lambda_l minmax(up(ReLU(M_l))), lambda_l proportional to P_l / (P_l + N_l)."""
    del smooth, reading  # the program's
    tape, shares, resized = source.tape, [], []
    magnitudes = tape.Gather(
        source.outputs["magnitudes"], [i for i, t in enumerate(source.taps) if t in source.chosen], axis=1
    )
    for maps, grid in source.maps():
        flat = tape.Reshape(maps, [-1, grid[0] * grid[1]])
        total = tape.ReduceSum(tape.Abs(flat), [1], keepdims=1)
        positive = tape.ReduceSum(tape.Relu(flat), [1], keepdims=1)
        shares.append(tape.Concat(positive, total, axis=1))
        rectified = tape.Relu(maps)
        resized.append(minmax(tape, within_range(tape, resize(tape, rectified, [grid, source.size]), rectified)))
    stacked = tape.Concat(*[tape.Unsqueeze(s, [1]) for s in shares], axis=1)  # (batch, layers, 2)
    positive, total = (tape.Squeeze(p, [2]) for p in tape.Split(stacked, [1, 1], axis=2, outputs=2))
    counts = tape.Greater(total, tape.Mul(magnitudes, tape.floats(1e-3)))
    importance = tape.Where(counts, tape.Div(positive, tape.Where(counts, total, tape.floats(1))), tape.floats(0))
    whole = tape.ReduceSum(importance, [1], keepdims=1)
    weights = tape.Div(importance, tape.Where(tape.Greater(whole, tape.floats(0)), whole, tape.floats(1)))
    fused = None
    for i, layer in enumerate(resized):
        part = tape.Mul(layer, tape.Unsqueeze(tape.Gather(weights, [i], axis=1), [2]))
        fused = part if fused is None else tape.Add(fused, part)
    assert fused is not None
    return fused, weights


def _ratio(source: Source, smooth: str = "identity", **others: object) -> dict[str, ir.Value]:
    return {"ratio": source.tape.floats(np.full((1, 1), RATIOS[smooth]))}


def finer_cam(source: Source, alpha: float = 1.0, comparisons: int = 3) -> Finished:
    """Grad-CAM of the seed below."""
    del alpha, comparisons  # _finer_seed used them already
    return grad_cam(source)


def _finer_seed(source: Source, alpha: float = 1.0, comparisons: int = 3) -> dict[str, ir.Value]:
    """The gradient that runtime.cams.gradient.finer_seeds describes, in the graph."""
    classes = source.manifest.num_classes
    if classes < 2:
        raise UnknownMethod("finer_cam compares classes, and this network has one: use grad_cam")
    if not is_number(alpha) or isinstance(comparisons, bool) or not isinstance(comparisons, int) or comparisons < 1:
        raise InputError(f"finer_cam: alpha {alpha!r} must be a number, comparisons {comparisons!r} a whole one from 1")
    tape, z, target = source.tape, source.outputs["logits"], source.explained
    own = tape.ReduceSum(tape.Mul(z, target), [1], keepdims=1)
    distance = tape.Abs(tape.Sub(z, own))
    behind = tape.Add(tape.ReduceMax(distance, [1], keepdims=1), tape.floats(1))  # the class itself comes last
    apart = tape.Where(tape.Greater(target, tape.floats(0)), behind, distance)
    count = min(comparisons, classes - 1)
    _, nearest = tape.TopK(apart, [count], axis=1, largest=0, sorted=1, outputs=2)
    numbers = tape.constant(np.arange(classes, dtype=np.int64)[None, None])
    hits = tape.Cast(tape.Equal(tape.Unsqueeze(nearest, [2]), numbers), to=ir.DataType.FLOAT)
    p = tape.Softmax(z, axis=1)
    others = tape.Mul(p, tape.ReduceSum(hits, [1], keepdims=0))  # the probabilities of the other classes
    mass = tape.ReduceSum(others, [1], keepdims=1)
    total = tape.Add(mass, tape.floats(1e-9))
    gaps = tape.Sub(own, tape.Mul(z, tape.floats(alpha)))
    value = tape.Div(tape.ReduceSum(tape.Mul(others, gaps), [1], keepdims=1), total)
    pull = tape.Mul(tape.Sub(gaps, value), others)
    through_gaps = tape.Sub(tape.Mul(target, mass), tape.Mul(others, tape.floats(alpha)))
    through_p = tape.Sub(pull, tape.Mul(p, tape.ReduceSum(pull, [1], keepdims=1)))
    return {"seed": tape.Div(tape.Add(through_gaps, through_p), total)}


def full_grad(source: Source) -> Finished:
    """The scaled sum of the full_grad program's maps."""
    total = None
    for name, maps in source.outputs.items():
        if name.startswith("grid:"):
            height, width = map(int, name.removeprefix("grid:").split("x"))
            resized = resize(source.tape, maps, [(height, width), source.size])
            total = resized if total is None else source.tape.Add(total, resized)
    assert total is not None
    return scale(source.tape, total), source.even()


COMPILED: dict[str, Compiled] = {
    "winsor_cam": Compiled(
        Kind.LAYER_MAPS,
        winsor_cam,
        ("percentile",),
        ("layer_aggregation", "low", "high"),
        {"layer_aggregation": ("mean", "max")},
    ),
    "grad_cam": Compiled(Kind.LAYER_MAPS, grad_cam),
    "grad_cam_pp": Compiled(Kind.GRADIENTS, _of_gradients(_grad_cam_pp)),
    "x_grad_cam": Compiled(Kind.GRADIENTS, _of_gradients(_x_grad_cam)),
    "layer_cam": Compiled(
        Kind.GRADIENTS, _of_gradients(lambda tape, a, g: sum_channels(tape, tape.Mul(tape.Relu(g), a)))
    ),
    "hires_cam": Compiled(Kind.GRADIENTS, _of_gradients(lambda tape, a, g: sum_channels(tape, tape.Mul(g, a)))),
    "integrative_cam": Compiled(
        Kind.SIGNED_MAPS,
        integrative_cam,
        (),
        ("smooth", "reading"),
        {"smooth": tuple(RATIOS), "reading": ("signed",)},
        _ratio,
    ),
    "finer_cam": Compiled(Kind.LAYER_MAPS, finer_cam, (), ("alpha", "comparisons"), feeds=_finer_seed),
    "full_grad": Compiled(Kind.FULL_GRAD, full_grad),
    "recipro_cam": Compiled(
        Kind.TRUNK,
        recipro_cam,
        (),
        ("gaussian", "variant"),
        {"gaussian": (False, True), "variant": RECIPRO_CAM_VARIANTS},
    ),
    "score_cam_pp": Compiled(Kind.ACTIVATIONS, score_cam_pp, (), ("variant",), {"variant": VARIANTS}),
    "score_cam": Compiled(Kind.ACTIVATIONS, score_cam, (), ("variant",), {"variant": ("original",)}),
}
