"""From logits to probabilities."""

from __future__ import annotations

import numpy as np

from .manifest import Manifest


def probabilities(logits: np.ndarray, manifest: Manifest) -> np.ndarray:
    """(B, classes) -> the same, float32: the softmax, or each class's own sigmoid where the network ended in one, or has one
    class.
    """
    z = logits.astype(np.float64)
    if manifest.final_activation == "Sigmoid" or manifest.num_classes == 1:
        return (0.5 * (1 + np.tanh(z / 2))).astype(np.float32)  # the sigmoid, without overflow
    shifted = np.exp(z - z.max(axis=1, keepdims=True))
    return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)
