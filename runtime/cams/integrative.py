"""Integrative CAM, reconstructed from its abstract (arXiv 2412.01354): a weighted sum of every convolution's map, each
with a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...kernels import minmax, upsample
from ..errors import InputError, UnknownMethod
from .data import Gradients
from .registry import Result, cam


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
    s = 1 / (1 + np.exp(-score))
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


def _ratio(third: np.ndarray, second: np.ndarray) -> np.ndarray:
    """f'''/f'': 0 where both are 0 (the identity), infinite where only f'' is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((third == 0) & (second == 0), 0.0, third / second)


def terms(smooth: str | Smooth, score: np.ndarray, logits: np.ndarray, seeds: np.ndarray) -> Terms:
    """The Terms of scores (S,). smooth: a name in SMOOTH, or a Smooth; logits, seeds (S, classes).

    UnknownMethod for an unknown name; InputError if f'(S) is 0 or not finite.
    """
    if isinstance(smooth, Smooth):
        first = np.asarray(smooth.first(score), np.float64)
        if not (np.isfinite(first) & (first != 0)).all():
            raise InputError("integrative_cam: the smooth function's first derivative is zero or infinite at a score")
        ratio = _ratio(np.asarray(smooth.third(score)), np.asarray(smooth.second(score)))
        return Terms(np.asarray(smooth.value(score)) / np.abs(first), np.sign(first), ratio)
    if not isinstance(smooth, str) or smooth not in SMOOTH:
        raise UnknownMethod(f"smooth {smooth!r}: use {', '.join(SMOOTH)}, or camrt.Smooth with derivatives of your own")
    return SMOOTH[smooth](score, logits, seeds)


def layer_map(activation: np.ndarray, gradient: np.ndarray, smooth: Terms) -> np.ndarray:
    """(sum_k w_k A_k + b / (h w)) / |f'(S)|, before the ReLU. The sum over its pixels is Y / |f'(S)|.

    activation, gradient (S, K, h, w) -> (S, h, w) float64. w_k = sign sum_ij a ReLU(g),
    a = g^2 / (2 g^2 + r g^3 sum_ij A_k), 0 where g = 0.
    """
    total = activation.sum(axis=(2, 3), keepdims=True, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        bend = np.where(total == 0, 0, smooth.ratio[:, None, None, None] * total) * gradient
        a = np.where(gradient > 0, 1 / (2 + bend), 0)  # g^2 cancels; for g <= 0 ReLU(g) is 0
    a = np.where(np.isfinite(a), a, 0)
    weights = smooth.sign[:, None] * (a * gradient).sum(axis=(2, 3))
    weighted = np.einsum("sk,skhw->shw", weights, activation)
    bias = smooth.value - weighted.sum(axis=(1, 2))
    return weighted + bias[:, None, None] / (activation.shape[2] * activation.shape[3])


@cam(
    "integrative_cam",
    needs=Gradients,
    layers="conv",
    source="a reconstruction from the abstract of Integrative CAM, arXiv 2412.01354",
)
def integrative_cam(layers: Gradients, smooth: str | Smooth = "identity") -> Result:
    """sum_l lambda_l minmax(up(ReLU(sum_k w_k A_k + b_l / (h w)))): a reconstruction, the paper's text is not public.

    Y = f(S) for a smooth f (identity, exp, softmax: the class's probability, softplus, or camrt.Smooth); r = f'''/f'';
    w_k = f' sum_ij a ReLU(g), a = g^2 / (2 g^2 + r g^3 sum_ij A_k), 0 where g = 0; b_l = Y - sum_k w_k sum_ij A_k: a
    map's pixels sum to Y before its ReLU; lambda_l is proportional to mean|g_l| mean|A_l|, which stays the same if a
    layer is rescaled. InputError, UnknownMethod for a smooth function that does not fit.
    """
    score = (layers.logits.astype(np.float64) * layers.seeds).sum(axis=1)
    of_score = terms(smooth, score, layers.logits.astype(np.float64), layers.seeds)
    importance = np.stack(
        [np.abs(g).mean(axis=(1, 2, 3)) * np.abs(a).mean(axis=(1, 2, 3)) for a, g in layers.pairs()], axis=1
    ).astype(np.float64)
    total = importance.sum(axis=1, keepdims=True)
    weights = np.where(total > 0, importance / np.where(total > 0, total, 1), 1 / len(layers.taps)).astype(np.float32)
    maps = np.zeros((len(score), *layers.size), np.float32)
    for (activation, gradient), weight in zip(layers.pairs(), weights.T, strict=True):
        rectified = np.maximum(layer_map(activation, gradient, of_score), 0).astype(np.float32)
        maps += weight[:, None, None] * minmax(upsample(rectified, layers.size))
    return Result(maps, weights)
