"""Winsor-CAM's importance of layers: cuda/layer_importance.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..call import Stream, prepared
from ..checks import expect, expect_choice
from ..gpu.queue import THREADS, Launch, blocks, int32s

AGGREGATIONS = ("mean", "max", "min", "absmean", "absmax", "l2")
CANCELLED = 1e-6  # if |mean| / mean magnitude is below this, the mean is rounding noise (about 1e-8 in float32)


def layer_importance(alphas: Any, channels: Sequence[int], kind: str = "mean", *, stream: Stream = None) -> Any:
    """ReLU(aggregate_k alpha_k) of each layer.

    alphas (B, sum K) float32, layers concatenated; channels: K of each layer -> (B, L) float32. kind: mean, max, min,
    absmean, absmax, l2. The mean is exactly 0 if the channels cancel. They do if a layer norm follows the layer
    (ConvNeXt): gradients before a layer norm sum to zero over channels, and rounding would decide the sign of the mean,
    and so the layers that Winsor-CAM keeps. ValueError for what does not fit; DeviceError.
    """
    with prepared("layer_importance", stream, alphas=alphas) as (queue, (alphas,)):
        expect_choice("layer_importance", "aggregation", kind, AGGREGATIONS)
        if len(channels) == 0 or min(channels) < 1:
            raise ValueError(
                f"layer_importance: channels is {list(channels)}, needed at least one layer, each with a channel"
            )
        expect("layer_importance", "alphas", alphas, ("B", sum(channels)))
        if queue is None:
            return _by_numpy(alphas, channels, kind)
        importance = queue.empty((alphas.shape[0], len(channels)))
        if alphas.shape[0] == 0:
            return importance
        images, layers, _ = int32s(
            "layer_importance", images=alphas.shape[0], layers=len(channels), channels=sum(channels)
        )
        offsets = queue.constant(np.cumsum([0, *channels], dtype=np.int32))
        settings = np.int32(AGGREGATIONS.index(kind)), np.float64(CANCELLED)
        arguments = (alphas, offsets, importance, images, layers, *settings)
        grid = blocks(int(images) * int(layers), 1), 1
        queue.launch(Launch("layer_importance", "layer_importance", grid, THREADS, 0, arguments))
        return importance


def _by_numpy(alphas: np.ndarray, channels: Sequence[int], kind: str) -> np.ndarray:
    parts = np.split(alphas.astype(np.float64), np.cumsum(channels)[:-1], axis=1)
    return np.maximum(np.stack([_aggregated(part, kind) for part in parts], axis=1), 0).astype(np.float32)


def _aggregated(alphas: np.ndarray, kind: str) -> np.ndarray:
    if kind == "mean":
        mean = alphas.mean(axis=1)
        return np.where(np.abs(mean) <= CANCELLED * np.abs(alphas).mean(axis=1), 0, mean)
    if kind in ("max", "min"):
        return getattr(alphas, kind)(axis=1)
    if kind in ("absmean", "absmax"):
        return getattr(np.abs(alphas), kind.removeprefix("abs"))(axis=1)
    return np.sqrt((alphas * alphas).sum(axis=1))
