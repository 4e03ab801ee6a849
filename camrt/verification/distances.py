"""Comparisons that fail on shape, dtype, NaN and emptiness before they look at values, and their limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ACTIVATION_LIMIT = 1e-5  # relative L2 from float64
MAP_LIMIT = 1e-3  # largest difference after min-max
HALF_LIMIT = 1e-3  # 1 - cosine of maps after min-max, of programs in float16
CLASS_LIMIT = 0.02  # classes count as tied in float16 if their logits differ by less, as a fraction of the range


@dataclass(frozen=True)
class Row:
    """One comparison. distance: of the bundle from the float64 reference; torch_float32: of PyTorch float32 from it;
    limit: the largest distance that passes; problem: why the comparison could not be made.

    If the input of a rectifier (ReLU) is nearly 0, rounding decides whether the rectifier is on or off. One such change
    moves early gradients by 1e-3 or more, and it is chance which rectifiers change. So for gradients and maps,
    torch_float32 is the largest distance of several runs, whose images differ in their last bits. If a quantised
    network fails this comparison, it is compared again with images that differ by about 1e-3 of each number, because
    engines with integer arithmetic round at other places. No error can hide behind chance: PyTorch's operators also run
    the gradient program itself in float64, where the rectifiers are as in the reference.
    """

    program: str
    subject: str
    distance: float
    torch_float32: float
    limit: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.distance <= self.limit


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


def row_distance(got: np.ndarray, want: np.ndarray) -> float:
    """The largest `relative_l2` of the rows along the first axis. ValueError as `comparable`."""
    comparable(got, want)
    return max(relative_l2(a, b) for a, b in zip(got, want, strict=True))


def class_distance(got: np.ndarray, want: np.ndarray) -> float:
    """Of logits (B, classes): want's top logit minus its logit of got's top class, as a fraction of its range."""
    short = want.max(axis=1) - want[np.arange(len(want)), got.argmax(axis=1)]
    span = np.ptp(want, axis=1)
    return float((short / np.where(span > 0, span, 1)).max())


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
