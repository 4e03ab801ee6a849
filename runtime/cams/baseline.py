"""What the baselines share: they scale and combine maps as pytorch-grad-cam 1.5 does."""

from __future__ import annotations

import numpy as np

from ...kernels import upsample
from .registry import Result

_EPSILON = 1e-7


def scale(maps: np.ndarray) -> np.ndarray:
    """(x - min) / (1e-7 + max(x - min)) per map."""
    shifted = maps - maps.min(axis=(-2, -1), keepdims=True)
    return shifted / (_EPSILON + shifted.max(axis=(-2, -1), keepdims=True))


def combined(per_layer: list[np.ndarray], size: tuple[int, int]) -> Result:
    """Layers' maps (S, h, w) -> (S, *size): rectified, scaled, upsampled, clipped at 0, averaged, scaled again."""
    resized = [np.maximum(upsample(scale(np.maximum(m, 0)), size), 0) for m in per_layer]
    maps = scale(resized[0] if len(resized) == 1 else np.stack(resized).mean(axis=0, dtype=np.float32))
    count = len(per_layer)
    return Result(maps, np.full((len(maps), count), 1 / count, np.float32))
