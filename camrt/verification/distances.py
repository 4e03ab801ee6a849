"""Comparisons that fail on shape, dtype, NaN and emptiness before they look at values."""

from __future__ import annotations

import numpy as np


def comparable(got: np.ndarray, want: np.ndarray) -> None:
    """ValueError unless both arrays are finite, not empty, and have the same shape and dtype."""
    if got.shape != want.shape:
        raise ValueError(f"shape {got.shape} instead of {want.shape}")
    if got.dtype != want.dtype:
        raise ValueError(f"dtype {got.dtype} instead of {want.dtype}")
    if not want.size:
        raise ValueError("nothing to compare")
    if not np.isfinite(want).all():
        raise ValueError("the reference holds NaN or infinity")
    if not np.isfinite(got).all():
        raise ValueError("NaN or infinity")


def relative_l2(got: np.ndarray, want: np.ndarray) -> float:
    """||got - want|| / ||want||; where the reference is zero, ||got||. ValueError as `comparable`."""
    comparable(got, want)
    norm = float(np.linalg.norm(want))
    return float(np.linalg.norm(got - want)) / (norm if norm > 0 else 1.0)


def largest_difference(got: np.ndarray, want: np.ndarray) -> float:
    """max |got - want|. ValueError as `comparable`."""
    comparable(got, want)
    return float(np.abs(got - want).max())


def cosine_distance(got: np.ndarray, want: np.ndarray) -> float:
    """The largest 1 - cosine of the rows along the first axis; 0 where both are zero, 1 where one is. ValueError as
    `comparable`.
    """
    comparable(got, want)
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (got, want))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.where(lengths > 0, (a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1), 0)
    neither = ~a.any(axis=1) & ~b.any(axis=1)
    return float(np.where(neither, 0, 1 - cosine).max())
