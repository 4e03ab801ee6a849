"""Winsor-CAM's importance of layers: cuda/layer_importance.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..call import Stream, prepared
from ..checks import expect, expect_choice
from ..gpu.queue import THREADS, Launch, blocks, int32s

AGGREGATIONS = ("mean", "max", "min", "absmean", "absmax", "l2")


def layer_importance(
    alphas: Any,
    channels: Sequence[int],
    kind: str = "mean",
    zero: Sequence[float] | np.ndarray | None = None,
    *,
    stream: Stream = None,
) -> tuple[Any, Any]:
    """(ReLU(aggregate_k alpha_k), aggregate_k alpha_k / mean_k |alpha_k|) of each layer, (B, L) float32 each.

    The second is infinite where all alphas are 0.

    alphas (B, sum K) float32, layers concatenated; channels: K of each layer. kind: mean, max, min, absmean, absmax,
    l2. zero: for each layer the largest |mean_k alpha_k| / mean_k |alpha_k| that counts as 0, by default 0: at 1 every
    mean does, and at 2 all alphas. Gradients in front of a layer norm sum to zero over the channels (ConvNeXt):
    rounding would decide the sign of the mean, and so the layers that Winsor-CAM keeps. ValueError for what does not
    fit; DeviceError.
    """
    with prepared("layer_importance", stream, alphas=alphas) as (queue, (alphas,)):
        expect_choice("layer_importance", "aggregation", kind, AGGREGATIONS)
        if len(channels) == 0 or min(channels) < 1:
            raise ValueError(
                f"layer_importance: channels is {list(channels)}, needed at least one layer, each with a channel"
            )
        expect("layer_importance", "alphas", alphas, ("B", sum(channels)))
        limits = np.zeros(len(channels)) if zero is None else np.asarray(zero, np.float64)
        if limits.shape != (len(channels),):
            raise ValueError(f"layer_importance: zero is {limits.shape}, needed one number for each layer")
        if queue is None:
            return _by_numpy(alphas, channels, kind, limits)
        importance, relative = (queue.empty((alphas.shape[0], len(channels))) for _ in range(2))
        if alphas.shape[0] == 0:
            return importance, relative
        images, layers, _ = int32s(
            "layer_importance", images=alphas.shape[0], layers=len(channels), channels=sum(channels)
        )
        offsets = queue.constant(np.cumsum([0, *channels], dtype=np.int32))
        arguments = (alphas, offsets, queue.constant(limits), importance, relative, images, layers)
        arguments += (np.int32(AGGREGATIONS.index(kind)),)
        grid = blocks(int(images) * int(layers), 1), 1
        queue.launch(Launch("layer_importance", "layer_importance", grid, THREADS, 0, arguments))
        return importance, relative


def _by_numpy(
    alphas: np.ndarray, channels: Sequence[int], kind: str, limits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    alphas, counts = alphas.astype(np.float64), np.asarray(channels)
    starts = np.cumsum([0, *channels[:-1]])
    magnitude = np.abs(alphas)
    aggregates = _aggregated(alphas, magnitude, starts, counts, kind)
    magnitudes = np.add.reduceat(magnitude, starts, axis=1) / counts
    cancelled = (np.abs(aggregates) <= limits * magnitudes) if kind == "mean" else np.zeros(aggregates.shape, bool)
    relative = np.where(magnitudes == 0, np.inf, aggregates / np.where(magnitudes == 0, 1, magnitudes))
    aggregates = np.where(cancelled | (limits >= 2), 0, aggregates)
    return np.maximum(aggregates, 0).astype(np.float32), relative.astype(np.float32)


def _aggregated(
    alphas: np.ndarray, magnitude: np.ndarray, starts: np.ndarray, counts: np.ndarray, kind: str
) -> np.ndarray:
    """(B, L) of alphas and their magnitudes (B, sum K). starts, counts: of each layer's channels."""
    if kind in ("mean", "absmean"):
        return np.add.reduceat(alphas if kind == "mean" else magnitude, starts, axis=1) / counts
    if kind == "min":
        return np.minimum.reduceat(alphas, starts, axis=1)
    if kind in ("max", "absmax"):
        return np.maximum.reduceat(alphas if kind == "max" else magnitude, starts, axis=1)
    return np.sqrt(np.add.reduceat(alphas * alphas, starts, axis=1))
