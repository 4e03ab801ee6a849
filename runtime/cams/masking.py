"""ScoreCAM++ and Score-CAM: a channel's weight is the class's score for the image that is masked by the channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...kernels import accumulate_maps, class_scores, fuse_layers, gate, mask_batch, take_channels
from ..errors import InputError, warn
from ..scores import complements
from .baseline import combined
from .data import Lane, MaskedRuns
from .registry import Result, cam, chosen, is_number
from .sampled_error import LARGE_ERROR, chances, map_error, taken

VARIANTS = ("tanh", "tanh_mask_only", "sigmoid_relu")
SCORE_CAM_VARIANTS = ("original", "pytorch_grad_cam")


@dataclass(frozen=True)
class _Scores:
    """Scores of masked images. parts: number of a batch's first mask -> its scores (S, n), in the runs' memory.

    summed: sum_k score_k gate(up(A_k)), (S, H, W), if it was asked for, else zeros.
    """

    parts: dict[int, Any]
    summed: Any

    def on_host(self, runs: MaskedRuns) -> np.ndarray:
        """(S, number of masks)."""
        rows = runs.memory.get(*(self.parts[start] for start in sorted(self.parts)))
        return np.concatenate([np.zeros((len(runs.seeds), 0), np.float32), *rows], axis=1)


@dataclass(frozen=True)
class _Ask:
    """How masks are made and scored: score = weight (seed . probabilities - offset).

    kind, interpolation: of the masks. summed_gate: the gate of the sum of scores and maps, if one is wanted.
    probability: the kind of kernels.class_scores, the network's own by default. offset (S,): 0 by default. weights: one
    per mask, 1 by default.
    """

    kind: str
    interpolation: str = "bilinear"
    summed_gate: str | None = None
    probability: str | None = None
    offset: Any = None
    weights: np.ndarray | None = None


def _score(runs: MaskedRuns, activation: Any, live: np.ndarray, ask: _Ask) -> _Scores:
    """Runs the network on the image under the mask of each live channel. live: channel numbers."""
    on_device = _score_on_host if runs.memory.stream is None else _score_on_gpu
    return on_device(runs, activation, live, _complemented(runs, ask))


def _complemented(runs: MaskedRuns, ask: _Ask) -> _Ask:
    """For the class "not" of a single score the probability is 1 - p; a difference of two needs no complement."""
    lacking = complements(runs.seeds)
    if ask.offset is None and ask.probability != "logits" and lacking.any():
        return replace(ask, offset=runs.memory.put(-lacking))
    return ask


def _exact_scores(runs: MaskedRuns, activation: Any, channels: np.ndarray, ask: _Ask) -> Any:
    """(S, n), in the runs' memory: the scores under a few masks, from the network in float32."""
    ask, memory = _complemented(runs, ask), runs.memory
    logits = runs.exact_logits(activation, channels, ask.kind, ask.interpolation)
    weights = None if ask.weights is None else memory.put(ask.weights)
    probability = ask.probability or runs.probability
    return class_scores(logits, memory.put(runs.seeds), probability, ask.offset, weights, stream=memory.stream)


def _map_error(
    runs: MaskedRuns,
    activation: Any,
    live: np.ndarray,
    ask: _Ask,
    scores: _Scores,
    weighed: Callable[[np.ndarray], np.ndarray] = lambda scores: scores,
) -> np.ndarray:
    """(S,): `map_error` of a layer's map, from a sample of masks that run in float32; zeros where all masks did.

    scores: of the live channels. weighed: scores (S, any) -> what the maps are weighed with.
    """
    if runs.exact is None or not len(live):
        return np.zeros(len(runs.seeds))
    (channels,) = runs.memory.get(activation)
    maps = gate(channels[live], ask.summed_gate or "identity").astype(np.float64)
    weights = weighed(scores.on_host(runs).astype(np.float64))
    chance = chances(weights, maps)
    sample = taken(chance)
    if ask.weights is not None:
        ask = replace(ask, weights=ask.weights[sample])
    (exact,) = runs.memory.get(_exact_scores(runs, activation, live[sample], ask))
    return map_error(weights, maps, sample, weighed(exact.astype(np.float64)), chance)


def _score_on_gpu(runs: MaskedRuns, activation: Any, live: np.ndarray, ask: _Ask) -> _Scores:
    """Queues everything; waits for nothing."""
    memory, stream = runs.memory, runs.memory.stream
    total = memory.zeros((len(runs.seeds), *runs.size))
    if not len(live):
        return _Scores({}, total)
    logits = runs.logits_under_masks(activation, live, ask.kind, ask.interpolation)
    weights = None if ask.weights is None else memory.put(ask.weights)
    probability = ask.probability or runs.probability
    scores = class_scores(logits, memory.put(runs.seeds), probability, ask.offset, weights, stream=stream)
    if ask.summed_gate is not None:
        channels = take_channels(activation, memory.put(live.astype(np.int32)), stream=stream)
        accumulate_maps(total, scores, channels, ask.summed_gate, ask.interpolation, stream=stream)
    return _Scores({0: scores}, total)


def _score_on_host(runs: MaskedRuns, activation: np.ndarray, live: np.ndarray, ask: _Ask) -> _Scores:
    """Batch after batch, in the lanes of the backend."""
    probability = ask.probability or runs.probability

    def in_lane(lane: Lane) -> tuple[dict[int, Any], Any]:
        """(scores of each batch, by the number of its first mask; the lane's weighted sum of gates, or None)."""
        parts, total = {}, None if ask.summed_gate is None else np.zeros((len(runs.seeds), *runs.size), np.float32)
        for masks in lane.batches:
            channels = take_channels(activation, live[masks].astype(np.int32))
            masked = lane.masked[: len(channels)]
            gates = None if lane.gates is None else lane.gates[: len(channels)]
            mask_batch(runs.image, channels, ask.kind, ask.interpolation, out=masked, gates=gates)
            weights = None if ask.weights is None else ask.weights[masks]
            scores = class_scores(lane.run(masked), runs.seeds, probability, ask.offset, weights)
            parts[masks.start] = scores
            if ask.summed_gate is not None:
                same = gates if ask.summed_gate == ask.kind else None
                accumulate_maps(total, scores, channels, ask.summed_gate, ask.interpolation, gates=same)
        return parts, total

    lanes = runs.share(len(live), in_lane)
    parts = {start: scores for own, _ in lanes for start, scores in own.items()}
    totals = [total for _, total in lanes if total is not None]
    if not totals:
        return _Scores(parts, np.zeros((len(runs.seeds), *runs.size), np.float32))
    first, *others = totals  # always summed in the same order: every run gives the same bits
    for other in others:
        first += other
    return _Scores(parts, first)


def _score_of_zeros(runs: MaskedRuns, probability: str | None = None, exact: bool = False) -> Any:
    """seed . probabilities (S,) of the all-zero input, in the runs' memory. exact: from the network in float32."""
    nothing, as_it_is = runs.memory.zeros((1, 1, 1)), runs.memory.zeros((len(runs.seeds),))
    ask, first = _Ask("identity", probability=probability, offset=as_it_is), np.array([0])
    scores = _exact_scores(runs, nothing, first, ask) if exact else _score(runs, nothing, first, ask).parts[0]
    return scores.reshape(len(runs.seeds))


def _finished(runs: MaskedRuns, totals: list[Any]) -> Any:
    """Sums (S, H, W), one per layer -> maps (S, H, W): rectified and min-max scaled; several are averaged, then scaled
    again.
    """
    sizes, count = [runs.size] * len(totals), len(totals)

    def scaled(maps: Any, layers: int) -> Any:
        weights = runs.memory.put(np.full((len(runs.seeds), layers), 1 / layers, np.float32))
        grids = sizes[:layers]
        return fuse_layers(maps, grids, weights, runs.size, normalize=True, stream=runs.memory.stream)

    maps = scaled(runs.memory.side_by_side(totals), count)
    return maps if count == 1 else scaled(runs.memory.side_by_side([maps]), 1)


def _result(
    maps: Any, runs: MaskedRuns, masked_runs: int, errors: Sequence[np.ndarray], error_bound: float = 0.0
) -> Result:
    """errors: of each layer's maps (S,), in int8 or bf16."""
    rows, layers = len(runs.seeds), len(runs.taps)
    details = {
        "channels": np.full(rows, sum(len(a) for a in runs.activations)),
        "masked_runs": np.full(rows, masked_runs),
        "error_bound": np.full(rows, error_bound, np.float32),
    }
    if runs.exact is not None:
        details["map_error"] = np.max(errors, axis=0).astype(np.float32)
        if (worst := details["map_error"].max(initial=0)) > LARGE_ERROR:
            warn(
                f"{runs.precision} moves this map by about {worst:.1g} (1 - cosine, estimated from a sample of masks): "
                "use another precision"
            )
    return Result(maps, np.full((rows, layers), 1 / layers, np.float32), details)


def error_bounds(activations: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(channels (K,), the weakest first; (K,): how far a pixel of sum_k s_k H_k, |s_k| <= 1, can move without the first
    1, 2, ... K of them).

    activations (K, h, w), float32; H_k = gate(up(A_k)) of `kind`. A pixel lies between at most four points of the grid,
    so |H_k| there is at most the gate of the largest |A_k| of the four; the bound is the largest sum of these.
    """
    padded = np.pad(np.abs(activations), ((0, 0), (0, 1), (0, 1)), mode="edge")
    rows = np.maximum(padded[:, :-1], padded[:, 1:])
    sizes = gate(np.maximum(rows[:, :, :-1], rows[:, :, 1:]), kind).astype(np.float64).reshape(len(activations), -1)
    order = np.argsort(sizes.max(axis=1), kind="stable")
    return order, np.cumsum(sizes[order], axis=0).max(axis=1)


def _within(
    runs: MaskedRuns, activation: Any, kind: str, candidates: np.ndarray, max_error: float
) -> tuple[np.ndarray, float]:
    """Drops as many channels as max_error allows, the weakest first: (channels left, bound on the error)."""
    if max_error == 0 or not len(candidates):
        return candidates, 0.0
    order, bounds = error_bounds(runs.memory.get(activation)[0][candidates], kind)
    dropped = int(np.searchsorted(bounds, max_error, side="right"))
    return np.sort(candidates[order[dropped:]]), float(bounds[dropped - 1]) if dropped else 0.0


@cam("score_cam_pp", needs=MaskedRuns, layers="last", source="ScoreCAM++, arXiv 2404.19341", on_gpu=True)
def score_cam_pp(runs: MaskedRuns, variant: str = "tanh", baseline: str = "none", max_error: float = 0.0) -> Result:
    """minmax(ReLU(sum_k s_k H_k)), H_k = tanh(up(A_k)), s_k = the class's probability for the masked input x H_k.

    variant: tanh; tanh_mask_only sums up(A_k) instead of H_k; sigmoid_relu has H_k = sigmoid(ReLU(up(A_k) / 2)).
    baseline="zero": s_k minus the score of the all-zero input. x is the normalised input. Channels that add exactly
    nothing never run. max_error: skip weak channels, while no pixel of the map before ReLU and minmax changes by more
    than this; details["error_bound"] is the bound that holds. In int8 and bf16 details["map_error"] is an estimate of
    1 - cosine from the map in float32, by a sample of masks. Several layers: the mean of their maps, minmax again.
    InputError, UnknownMethod for options that do not fit.
    """
    chosen(variant, VARIANTS, "variant")
    chosen(baseline, ("none", "zero"), "baseline")
    if not is_number(max_error) or not 0 <= max_error < np.inf:
        raise InputError(f"max_error {max_error!r}: use a number from 0")
    kind = "sigmoid_relu" if variant == "sigmoid_relu" else "tanh"
    summed_gate = "identity" if variant == "tanh_mask_only" else kind
    reach = float(np.abs(runs.seeds).sum(axis=1).max())  # |s_k| <= reach: 1 for a class
    offset = _score_of_zeros(runs) if baseline == "zero" else None
    exact_offset = offset if offset is None or runs.exact is None else _score_of_zeros(runs, exact=True)
    totals, count, bounds, errors = [], 0, [], []
    for activation, extremes in zip(runs.activations, runs.extremes, strict=True):
        still = np.logical_not(extremes.any(axis=1))
        candidates = np.arange(len(activation)) if kind == "sigmoid_relu" else np.flatnonzero(np.logical_not(still))
        candidates, bound = _within(runs, activation, summed_gate, candidates, max_error / reach)
        # sigmoid_relu makes the same mask, 1/2, of every channel that is zero everywhere: only the first of them runs
        alike = candidates[still[candidates]]
        live, weights = np.setdiff1d(candidates, alike[1:]), None
        if len(alike) > 1:
            weights = np.where(live == alike[0], len(alike), 1).astype(np.float32)
        ask = _Ask(kind, summed_gate=summed_gate, offset=offset, weights=weights)
        scores = _score(runs, activation, live, ask)
        totals.append(scores.summed)
        exact_ask = replace(ask, offset=exact_offset)
        errors.append(_map_error(runs, activation, live, exact_ask, scores))
        count += len(live)
        bounds.append(bound * reach)
    return _result(_finished(runs, totals), runs, count, errors, max(bounds))


@cam("score_cam", needs=MaskedRuns, layers="last", source="Wang et al., Score-CAM, arXiv 1910.01279", on_gpu=True)
def score_cam(runs: MaskedRuns, variant: str = "original") -> Result:
    """minmax(ReLU(sum_k s_k up(A_k))), s_k = the class's probability for the input masked by minmax(up(A_k)).

    variant: original skips channels that are constant; pytorch_grad_cam aligns corners when it upsamples masks, takes
    logits, a softmax over the channels, sums at the tap's resolution and scales as that library does. UnknownMethod.
    """
    chosen(variant, SCORE_CAM_VARIANTS, "variant")
    totals, count, errors = [], 0, []
    for activation, extremes in zip(runs.activations, runs.extremes, strict=True):
        flat = extremes[:, 0] == extremes[:, 1]
        live = np.flatnonzero(~flat)
        count += len(live)
        if variant == "original":
            ask = _Ask("minmax", summed_gate="identity")
            found = _score(runs, activation, live, ask)
            totals.append(found.summed)
            errors.append(_map_error(runs, activation, live, ask, found))
            continue
        scores = np.zeros((len(runs.seeds), len(flat)), np.float32)
        ask = _Ask("minmax", "align_corners", probability="logits")
        found = _score(runs, activation, live, ask)
        scores[:, live] = found.on_host(runs)
        if flat.any():  # a constant channel's mask is zero everywhere: one run stands for all of them
            scores[:, flat] = runs.memory.get(_score_of_zeros(runs, "logits"))[0][:, None]
            count += 1
        highest = scores.max(axis=1, keepdims=True)
        errors.append(_map_error(runs, activation, live, ask, found, lambda s, highest=highest: np.exp(s - highest)))
        scores = np.exp(scores - highest)
        (channels,) = runs.memory.get(activation)
        totals.append(np.einsum("sk,khw->shw", scores / scores.sum(axis=1, keepdims=True), channels))
    maps = _finished(runs, totals) if variant == "original" else combined(totals, runs.size).maps
    return _result(maps, runs, count, errors)
