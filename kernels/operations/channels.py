"""Range and selection of channels: cuda/channels.cu."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..call import Stream, prepared
from ..checks import expect, expect_sides
from ..gpu.queue import THREADS, Launch, blocks, int32s


def channel_extremes(activations: Any, *, stream: Stream = None) -> Any:
    """Lowest and highest value of each channel: (K, h, w) float32 -> (K, 2) float32. ValueError; DeviceError."""
    with prepared("channel_extremes", stream, activations=activations) as (queue, (activations,)):
        expect("channel_extremes", "activations", activations, ("K", "h", "w"))
        expect_sides("channel_extremes", activations=activations.shape[1:])
        if queue is None:
            return np.stack([activations.min(axis=(1, 2)), activations.max(axis=(1, 2))], axis=1)
        count, h, w = activations.shape
        extremes = queue.empty((count, 2))
        if count == 0:
            return extremes
        arguments = (activations, extremes, *int32s("channel_extremes", channels=count), np.int64(h * w))
        queue.launch(Launch("channels", "channel_extremes", (blocks(count, 1), 1), THREADS, 0, arguments))
        return extremes


def take_channels(activations: Any, index: Any, *, stream: Stream = None) -> Any:
    """activations[index]: (K, h, w) float32, index (n,) int32, within range -> (n, h, w). ValueError; DeviceError."""
    with prepared("take_channels", stream, activations=activations, index=index) as (queue, (activations, index)):
        expect("take_channels", "activations", activations, ("K", "h", "w"))
        expect_sides("take_channels", activations=activations.shape[1:])
        expect("take_channels", "index", index, ("n",), ("int32",))
        if queue is None:
            return activations[index]
        _, h, w = activations.shape
        taken = queue.empty((index.shape[0], h, w))
        entries = math.prod(taken.shape)
        if entries:
            arguments = (activations, index, taken, np.int64(entries), np.int64(h * w))
            queue.launch(Launch("channels", "take_channels", (blocks(entries, THREADS), 1), THREADS, 0, arguments))
        return taken
