"""From logits to probabilities."""

from __future__ import annotations

import numpy as np

from ..kernels import class_probabilities
from .bundle.manifest import Manifest


def probabilities(logits: np.ndarray, manifest: Manifest) -> np.ndarray:
    """(B, classes) -> the same, float32, by the manifest's `probability`."""
    return class_probabilities(logits, manifest.probability).astype(np.float32)


def complements(seeds: np.ndarray) -> np.ndarray:
    """(S, 1) -> (S,): what a score of a single class lacks where its seed is negative, float32.

    A negative seed means the class "not this", whose probability is 1 - p: with the seed -1, seed . p + 1. Of several
    classes a negative entry takes a class's probability off, and nothing is lacking.
    """
    return np.maximum(-seeds[:, 0], 0) if seeds.shape[1] == 1 else np.zeros(len(seeds), np.float32)
