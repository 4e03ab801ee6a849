"""From logits to probabilities."""

from __future__ import annotations

import numpy as np

from ..kernels import class_probabilities
from .manifest import Manifest


def probability_kind(manifest: Manifest) -> str:
    """The softmax, or each class's own sigmoid where the network ended in one, or has one class."""
    return "sigmoid" if manifest.final_activation == "Sigmoid" or manifest.num_classes == 1 else "softmax"


def probabilities(logits: np.ndarray, manifest: Manifest) -> np.ndarray:
    """(B, classes) -> the same, float32, by `probability_kind`."""
    return class_probabilities(logits, probability_kind(manifest)).astype(np.float32)
