"""Methods that change the activation and run the rest of the network: no gradient, no full run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from ..errors import InputError
from ..scores import complements
from .baseline import combined
from .data import Heads
from .registry import Result, cam, chosen

RECIPRO_CAM_VARIANTS = ("original", "openvino_xai")
_WINDOW = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], np.float32) / 16


@functools.lru_cache(maxsize=16)
def _spread(height: int, width: int, gaussian: bool) -> np.ndarray:
    """(h w, 1, h, w): over which positions, and with which weights, the activation of each position is spread."""
    alone = np.eye(height * width, dtype=np.float32).reshape(-1, 1, height, width)
    if gaussian:
        padded = np.pad(alone, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
        alone = np.einsum("pcyxij,ij->pcyx", windows, _WINDOW)
    alone.flags.writeable = False
    return alone


def _scores(heads: Heads, index: int, changed: Callable[[slice], np.ndarray], count: int, logits: bool) -> np.ndarray:
    """Scores (S, count) of changed activations: seed . logits, or seed . probabilities.

    changed: a slice of 0..count -> what the head of layer `index` reads.
    """
    out = np.concatenate(heads.in_lanes(lambda part: heads.heads[index](changed(part)), heads.parts(index, count)))
    if logits:
        return heads.seeds @ out.T
    return heads.seeds @ heads.probabilities(out).T + complements(heads.seeds)[:, None]


@cam("ablation_cam", needs=Heads, layers="last", source="Desai and Ramaswamy, Ablation-CAM, WACV 2020")
def ablation_cam(heads: Heads) -> Result:
    """ReLU(sum_k w_k A_k), w_k = (S - S_k) / S, S_k the logit when channel k is set to zero.

    Runs only the part of the network after the tap, and only for channels that are not zero everywhere. As in the
    paper, an ablated channel is zero; pytorch-grad-cam subtracts 1e7 where activations are negative. If S is 0,
    w_k = S - S_k. For the class "not" of a single score, with S the score of the class, w_k = (S_k - S) / S.
    """
    per_layer = []
    score = (heads.logits.astype(np.float64) * heads.seeds).sum(axis=1)
    over = np.where(score == 0, 1, score)
    if heads.seeds.shape[1] == 1:
        over = np.where(heads.seeds[:, 0] < 0, -over, over)  # its own sign would give "not" the class's map
    for index, activation in enumerate(heads.activations):
        live = np.flatnonzero(activation.any(axis=(1, 2)))

        means = heads.means[index]
        read = activation if means is None else means

        def without(part: slice, read: np.ndarray = read, live: np.ndarray = live) -> np.ndarray:
            channels = live[part]
            changed = np.repeat(read[None], len(channels), axis=0)
            changed[np.arange(len(channels)), channels] = 0
            return changed

        weights = np.zeros((len(heads.seeds), len(activation)), np.float32)
        if len(live):
            scores = _scores(heads, index, without, len(live), logits=True)
            weights[:, live] = (score[:, None] - scores) / over[:, None]
        per_layer.append(np.einsum("sk,khw->shw", weights, activation))
    return combined(per_layer, heads.size)


@cam("recipro_cam", needs=Heads, layers="last", source="Byun and Lee, Recipro-CAM, arXiv 2209.14074")
def recipro_cam(heads: Heads, gaussian: bool = False, variant: str = "original") -> Result:
    """M_ij = the class's probability when the tap keeps its activation only at position (i, j) and is zero elsewhere.

    gaussian: the position's activation is spread over 3 x 3 positions with weights 1/4 (centre), 1/8 and 1/16, an
    option of the paper. Tokens before the grid (a class token) keep their values. variant="openvino_xai": M_ij is the
    logit minus the lowest logit, as in that library. InputError, UnknownMethod for options that do not fit.
    """
    chosen(variant, RECIPRO_CAM_VARIANTS, "variant")
    if not isinstance(gaussian, bool):
        raise InputError(f"gaussian {gaussian!r}: use True or False")
    per_layer = []
    for index, activation in enumerate(heads.activations):
        height, width = activation.shape[1:]
        spread = _spread(height, width, gaussian)
        vectors = np.ascontiguousarray(activation.reshape(len(activation), -1).T)  # of each position
        if heads.means[index] is None:
            vectors = vectors[:, :, None, None]
        else:
            spread = spread.mean(axis=(2, 3))

        def single_positions(part: slice, vectors: np.ndarray = vectors, spread: np.ndarray = spread) -> np.ndarray:
            return np.multiply(vectors[part], spread[part], order="C")

        scores = _scores(heads, index, single_positions, height * width, logits=variant == "openvino_xai")
        if variant == "openvino_xai":
            scores = scores - scores.min(axis=1, keepdims=True)
        per_layer.append(scores.reshape(-1, height, width).astype(np.float32))
    return combined(per_layer, heads.size)
