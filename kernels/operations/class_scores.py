"""Scores of classes: cuda/class_scores.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..call import Stream, prepared
from ..checks import expect, expect_choice
from ..gpu.queue import NOTHING, THREADS, Launch, blocks, int32s

PROBABILITIES = ("softmax", "sigmoid", "logits")


def class_scores(
    logits: Any, seeds: Any, kind: str = "softmax", offset: Any = None, weights: Any = None, *, stream: Stream = None
) -> Any:
    """weights[n] (sum_c seeds[s, c] p(logits)[n, c] - offset[s]); kind: p is the softmax, the sigmoid, or the identity.

    logits (N, classes), seeds (S, classes), offset (S,), weights (N,), float32 -> (S, N) float32. kind: "softmax",
    "sigmoid" or "logits". Without offset and weights they are 0 and 1. ValueError for what does not fit; DeviceError.
    """
    with prepared("class_scores", stream, logits=logits, seeds=seeds, offset=offset, weights=weights) as (
        queue,
        (logits, seeds, offset, weights),
    ):
        expect_choice("class_scores", "probability", kind, PROBABILITIES)
        expect("class_scores", "logits", logits, ("N", "C"))
        expect("class_scores", "seeds", seeds, ("S", logits.shape[1]))
        if logits.shape[1] < 1:
            raise ValueError("class_scores: logits of no classes")
        if offset is not None:
            expect("class_scores", "offset", offset, (seeds.shape[0],))
        if weights is not None:
            expect("class_scores", "weights", weights, (logits.shape[0],))
        if queue is None:
            return _by_numpy(logits, seeds, kind, offset, weights)
        (rows, classes), count = logits.shape, seeds.shape[0]
        scores = queue.empty((count, rows))
        if rows == 0 or count == 0:
            return scores
        sizes = int32s("class_scores", rows=rows, seeds=count, classes=classes)
        optional = (NOTHING if offset is None else offset), (NOTHING if weights is None else weights)
        arguments = (logits, seeds, *optional, scores, *sizes, np.int32(PROBABILITIES.index(kind)))
        queue.launch(Launch("class_scores", "class_scores", (blocks(rows, 1), 1), THREADS, 0, arguments))
        return scores


def _by_numpy(
    logits: np.ndarray,
    seeds: np.ndarray,
    kind: str,
    offset: np.ndarray | None,
    weights: np.ndarray | None,
) -> np.ndarray:
    scores = seeds.astype(np.float64) @ class_probabilities(logits, kind).T
    if offset is not None:
        scores -= offset[:, None]
    return (scores if weights is None else scores * weights).astype(np.float32)


def class_probabilities(logits: np.ndarray, kind: str) -> np.ndarray:
    """Logits (N, classes) -> (N, classes) float64: their softmax, their sigmoid, or the logits (kind "logits")."""
    z = logits.astype(np.float64)
    if kind == "logits":
        return z
    if kind == "sigmoid":
        return 0.5 * (1 + np.tanh(z / 2))  # without overflow
    shifted = np.exp(z - z.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
