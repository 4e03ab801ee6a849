"""Smooth functions of a class's score, Y = f(S), whose derivatives Integrative CAM needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import InputError, UnknownMethod


@dataclass(frozen=True)
class Smooth:
    """A smooth function of the score, Y = f(S), with its first three derivatives: arrays (S,) float64 -> (S,)."""

    value: Callable[[np.ndarray], np.ndarray]
    first: Callable[[np.ndarray], np.ndarray]
    second: Callable[[np.ndarray], np.ndarray]
    third: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Terms:
    """The values of f that a map needs, (S,) each: Y / |f'(S)|, the sign of f'(S), and r = f'''(S) / f''(S)."""

    value: np.ndarray
    sign: np.ndarray
    ratio: np.ndarray


def _identity(score: np.ndarray, logits: np.ndarray, seeds: np.ndarray) -> Terms:
    return Terms(score, np.ones_like(score), np.zeros_like(score))


def _exp(score: np.ndarray, logits: np.ndarray, seeds: np.ndarray) -> Terms:
    return Terms(np.ones_like(score), np.ones_like(score), np.ones_like(score))


def _softplus(score: np.ndarray, logits: np.ndarray, seeds: np.ndarray) -> Terms:
    s = np.exp(-np.logaddexp(0, -score))  # the sigmoid, without overflow
    return Terms(np.logaddexp(0, score) / s, np.ones_like(score), 1 - 2 * s)


def _softmax(score: np.ndarray, logits: np.ndarray, seeds: np.ndarray) -> Terms:
    """f(S) = the class's softmax probability p, the other logits fixed: f' = p(1 - p)."""
    if logits.shape[1] < 2:
        raise InputError("integrative_cam: the softmax of one class is always 1: use smooth='identity'")
    if not (np.count_nonzero(seeds, axis=1) == 1).all() or not (seeds.max(axis=1) == 1).all():
        raise InputError("integrative_cam: smooth='softmax' explains classes, not seed arrays: pass class numbers")
    log_others = np.logaddexp.reduce(np.where(seeds == 1, -np.inf, logits), axis=1)
    log_p = score - np.logaddexp(score, log_others)
    p = np.exp(log_p)
    rest = np.exp(log_others - np.logaddexp(score, log_others))  # 1 - p, exact where p is nearly 1
    return Terms(1 / rest, np.ones_like(score), _ratio(1 - 6 * p + 6 * p * p, 1 - 2 * p))


SMOOTH: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], Terms]] = {
    "identity": _identity,
    "exp": _exp,
    "softmax": _softmax,
    "softplus": _softplus,
}
SCORE_FREE = ("identity", "exp")  # functions whose f'''/f'' and sign of f' are the same at every score


def _ratio(third: np.ndarray, second: np.ndarray) -> np.ndarray:
    """f'''/f'': 0 where both are 0 (the identity), infinite where only f'' is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((third == 0) & (second == 0), 0.0, third / second)


def terms(smooth: str | Smooth, logits: np.ndarray, seeds: np.ndarray) -> Terms:
    """The Terms of scores. smooth: a name in SMOOTH, or a Smooth; logits, seeds (S, classes).

    UnknownMethod for an unknown name; InputError if f'(S) is 0 or not finite, or another derivative is NaN.
    """
    logits = logits.astype(np.float64)
    score = (logits * seeds).sum(axis=1)
    if isinstance(smooth, Smooth):
        first = np.asarray(smooth.first(score), np.float64)
        if not (np.isfinite(first) & (first != 0)).all():
            raise InputError("integrative_cam: the smooth function's first derivative is zero or infinite at a score")
        value = np.asarray(smooth.value(score)) / np.abs(first)
        ratio = _ratio(np.asarray(smooth.third(score)), np.asarray(smooth.second(score)))
        if np.isnan(value).any() or np.isnan(ratio).any():
            raise InputError("integrative_cam: the smooth function or a derivative of it is not a number at a score")
        return Terms(*(np.broadcast_to(a, score.shape) for a in (value, np.sign(first), ratio)))
    if not isinstance(smooth, str) or smooth not in SMOOTH:
        raise UnknownMethod(f"smooth {smooth!r}: use {', '.join(SMOOTH)}, or camrt.Smooth with derivatives of your own")
    return SMOOTH[smooth](score, logits, seeds)
