"""ScoreCAM++ and Score-CAM: channels weighed by the score of the image seen through them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...kernels import accumulate_maps, gate, mask_batch, minmax, upsample
from ..errors import InputError
from .baseline import combined
from .data import Lane, MaskedRuns
from .registry import Result, cam, chosen

VARIANTS = ("tanh", "tanh_mask_only", "sigmoid_relu")
SCORE_CAM_VARIANTS = ("original", "pytorch_grad_cam")


@dataclass(frozen=True)
class _Scores:
    """scores (S, K) of the image seen through each mask; summed: sum_k score_k gate(up(A_k)), (S, H, W), if asked for."""

    scores: np.ndarray
    summed: np.ndarray


def _score(
    runs: MaskedRuns,
    activation: np.ndarray,
    live: np.ndarray,
    kind: str,
    interpolation: str = "bilinear",
    logits: bool = False,
    summed: bool = False,
    offset: np.ndarray | None = None,
) -> _Scores:
    """Runs the image through the masks of the live channels (indices); the others' scores stay 0.

    A score is seed . probabilities, or seed . logits, less the offset (S,) where there is one.
    """
    scores = np.zeros((len(runs.seeds), len(activation)), np.float32)
    totals: dict[int, np.ndarray] = {}

    def work(part: slice, lane: Lane) -> None:
        channels = activation[live[part]]
        masked, gates = lane.masked[: len(channels)], lane.gates[: len(channels)]
        mask_batch(runs.image, channels, kind, interpolation, out=masked, gates=gates)
        out = lane.run(masked)
        found = (runs.seeds @ (out if logits else runs.probabilities(out)).T).astype(np.float32)
        if offset is not None:
            found -= offset[:, None]
        scores[:, live[part]] = found
        if summed:
            total = totals.setdefault(lane.number, np.zeros((len(found), *runs.size), np.float32))
            accumulate_maps(total, found, channels, kind, interpolation, gates=gates)

    runs.batches(len(live), work)
    total = np.zeros((len(scores), *runs.size), np.float32)
    for number in sorted(totals):  # always in the same order, for the same bits
        total += totals[number]
    return _Scores(scores, total)


def _score_of_zeros(runs: MaskedRuns, logits: bool = False) -> np.ndarray:
    """Score (S,) of the all-zero input."""
    nothing = np.zeros((1, 1, 1), np.float32)
    return _score(runs, nothing, np.array([0]), "identity", logits=logits).scores[:, 0]


def _weighted(scores: np.ndarray, activation: np.ndarray) -> np.ndarray:
    """sum_k s_k A_k, (S, h, w)."""
    return np.einsum("sk,khw->shw", scores, activation)


def _averaged(per_layer: list[np.ndarray]) -> np.ndarray:
    return per_layer[0] if len(per_layer) == 1 else minmax(np.stack(per_layer).mean(axis=0, dtype=np.float32))


def _result(maps: np.ndarray, runs: MaskedRuns, masked_runs: int, error_bound: float = 0.0) -> Result:
    rows, layers = len(runs.seeds), len(runs.taps)
    details = {
        "channels": np.full(rows, sum(len(a) for a in runs.activations)),
        "masked_runs": np.full(rows, masked_runs),
        "error_bound": np.full(rows, error_bound, np.float32),
    }
    return Result(maps, np.full((rows, layers), 1 / layers, np.float32), details)


def _within(activation: np.ndarray, kind: str, candidates: np.ndarray, max_error: float) -> tuple[np.ndarray, float]:
    """Drops as many channels as the bound allows, the weakest first: (those left, the bound that holds).

    Leaving channel k out changes sum_k s_k H_k, |s_k| <= 1, nowhere by more than max |H_k|. Bilinear resizing does not leave
    the range of its input, and the gates grow with |A|.
    """
    if max_error == 0 or not len(candidates):
        return candidates, 0.0
    size = gate(np.abs(activation[candidates]), kind).max(axis=(1, 2)).astype(np.float64)
    order = np.argsort(size, kind="stable")
    dropped = np.cumsum(size[order]) <= max_error
    return np.sort(candidates[order[~dropped]]), float(size[order[dropped]].sum())


@cam("score_cam_pp", needs="masked_runs", layers="last", source="ScoreCAM++, arXiv 2404.19341")
def score_cam_pp(runs: MaskedRuns, variant: str = "tanh", baseline: str = "none", max_error: float = 0.0) -> Result:
    """minmax(ReLU(sum_k s_k H_k)), H_k = tanh(up(A_k)), s_k = the class's probability for the masked input x H_k.

    variant: tanh; tanh_mask_only sums up(A_k) in H_k's place; sigmoid_relu, H_k = sigmoid(ReLU(up(A_k) / 2)).
    baseline="zero": s_k minus the score of the all-zero input. x is the normalised input. Channels that add exactly nothing
    never run. max_error: leave out channels as long as the map before ReLU and minmax changes nowhere by more; the bound that
    held is details["error_bound"]. Several layers: the mean of their maps, minmax again. InputError, UnknownMethod.
    """
    chosen(variant, VARIANTS, "variant")
    chosen(baseline, ("none", "zero"), "baseline")
    if not isinstance(max_error, int | float) or not 0 <= max_error < np.inf:
        raise InputError(f"max_error {max_error!r}: use a number from 0")
    kind = "sigmoid_relu" if variant == "sigmoid_relu" else "tanh"
    raw = variant == "tanh_mask_only"
    reach = float(np.abs(runs.seeds).sum(axis=1).max())  # |s_k| <= reach: 1 for a class
    offset = _score_of_zeros(runs) if baseline == "zero" else None
    per_layer, count, bounds = [], 0, []
    for activation in runs.activations:
        still = np.logical_not(activation.any(axis=(1, 2)))
        candidates = np.arange(len(activation)) if kind == "sigmoid_relu" else np.flatnonzero(np.logical_not(still))
        candidates, bound = _within(activation, "identity" if raw else kind, candidates, max_error / reach)
        # sigmoid_relu makes one and the same mask, 1/2, of all channels that are zero everywhere: the first runs for all
        alike = candidates[still[candidates]]
        live = np.setdiff1d(candidates, alike[1:])
        found = _score(runs, activation, live, kind, summed=not raw, offset=offset)
        total = upsample(_weighted(found.scores, activation), runs.size) if raw else found.summed
        if len(alike) > 1:
            total = total + (len(alike) - 1) / 2 * found.scores[:, alike[0], None, None]
        per_layer.append(minmax(np.maximum(total, 0)))
        count += len(live)
        bounds.append(bound * reach)
    return _result(_averaged(per_layer), runs, count, max(bounds))


@cam("score_cam", needs="masked_runs", layers="last", source="Wang et al., Score-CAM, arXiv 1910.01279")
def score_cam(runs: MaskedRuns, variant: str = "original") -> Result:
    """minmax(ReLU(sum_k s_k up(A_k))), s_k = the class's probability for the input masked by minmax(up(A_k)).

    variant: original skips channels that are constant; pytorch_grad_cam aligns corners when it upsamples masks, takes logits,
    a softmax over the channels, sums at the tap's resolution and scales as that library does. UnknownMethod.
    """
    chosen(variant, SCORE_CAM_VARIANTS, "variant")
    original = variant == "original"
    per_layer, count = [], 0
    for activation in runs.activations:
        flat = activation.max(axis=(1, 2)) == activation.min(axis=(1, 2))
        live = np.flatnonzero(~flat)
        count += len(live)
        if original:
            scores = _score(runs, activation, live, "minmax").scores
            per_layer.append(minmax(np.maximum(upsample(_weighted(scores, activation), runs.size), 0)))
            continue
        scores = _score(runs, activation, live, "minmax", "align_corners", logits=True).scores
        if flat.any():  # a constant channel's mask is zero everywhere: one run stands for all of them
            scores[:, flat] = _score_of_zeros(runs, logits=True)[:, None]
            count += 1
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        per_layer.append(_weighted(scores / scores.sum(axis=1, keepdims=True), activation))
    maps = _averaged(per_layer) if original else combined(per_layer, runs.size).maps
    return _result(maps, runs, count)
