"""Methods that weigh channels by gradients at chosen taps."""

from __future__ import annotations

import numpy as np

from ...kernels import upsample
from .registry import LayerMaps, Result, cam

_EPSILON = 1e-7


def _scaled(maps: np.ndarray) -> np.ndarray:
    """(x - min) / (1e-7 + max(x - min)) per map, the baselines' normalisation."""
    shifted = maps - maps.min(axis=(-2, -1), keepdims=True)
    return shifted / (_EPSILON + shifted.max(axis=(-2, -1), keepdims=True))


def combine(per_layer: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Layers' maps (S, h, w), rectified -> (S, *size): scaled, upsampled, clipped at 0, averaged, scaled again.

    The conventions of pytorch-grad-cam 1.5, which people compare with.
    """
    resized = [np.maximum(upsample(_scaled(m), size), 0) for m in per_layer]
    return _scaled(np.stack(resized).mean(axis=0, dtype=np.float32))


@cam("grad_cam", needs="layer_maps", layers="last")
def grad_cam(layers: LayerMaps) -> Result:
    """ReLU(sum_k alpha_k A_k), alpha_k = mean over the grid of dS/dA_k; layers averaged. Selvaraju et al., arXiv 1610.02391."""
    maps = combine([np.maximum(m, 0) for m in layers.map_of_layers()], layers.size)
    count = len(layers.taps)
    return Result(maps, np.full((len(maps), count), 1 / count, np.float32))
