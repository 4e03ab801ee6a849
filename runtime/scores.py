"""From logits to probabilities."""

from __future__ import annotations

import numpy as np

from ..kernels import class_probabilities
from .bundle.manifest import Manifest


def probabilities(logits: np.ndarray, manifest: Manifest) -> np.ndarray:
    """Logits (B, classes) -> probabilities (B, classes) float32: softmax or sigmoid, as Manifest.probability says."""
    return class_probabilities(logits, manifest.probability).astype(np.float32)


def complements(seeds: np.ndarray) -> np.ndarray:
    """What to add to seed . p to get the explained probability: seeds (S, classes) -> (S,) float32.

    For a network with one class, the seed -1 means "not this class", with the probability 1 - p = seed . p + 1: the
    result is 1. With several classes a negative entry subtracts a class's probability, and the result is 0.
    """
    return np.maximum(-seeds[:, 0], 0) if seeds.shape[1] == 1 else np.zeros(len(seeds), np.float32)
