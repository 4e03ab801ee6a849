"""Integrative CAM, reconstructed from its abstract (arXiv 2412.01354): a weighted sum of every convolution's map."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...kernels import minmax, upsample, within_range
from .data import Gradients, SignedMaps
from .registry import Result, cam
from .smooth import Smooth, Terms, terms

CANCELLED = 1e-3  # sum |M| / sum |u_k y_k| of a layer whose channels cancel at every position
READINGS = {"signed": SignedMaps, "residual": Gradients}


@cam(
    "integrative_cam",
    needs=("reading", READINGS),
    layers="conv",
    source="a reconstruction from the abstract of Integrative CAM, arXiv 2412.01354",
)
def integrative_cam(
    layers: SignedMaps | Gradients, smooth: str | Smooth = "identity", reading: str = "signed"
) -> Result:
    """sum_l lambda_l minmax(up(ReLU(M_l))): a reconstruction, the paper's text is not public.

    Y = f(S) for a smooth f (identity, exp, softmax: the class's probability, softplus, or camrt.Smooth); r = f'''/f''.
    y_k are the outputs of a convolution, behind its norm if one follows, and G = dS/dy.

    reading="signed": M = sum_k u_k y_k with u = sign(f') alpha G and alpha = 1 / (2 + |r| |G| sum_mn |y_k,mn|) at each
    position. lambda_l is proportional to P / (P + N), the part of M's absolute sum that speaks for the class: P and N
    are the sums of max(M, 0) and of max(-M, 0). It is 0 for a layer whose channels cancel at every position, as those
    do that a layer norm over the channels reads: its map would be drawn by the norm's epsilon and by rounding. For
    G > 0, y >= 0 and r >= 0 alpha is Grad-CAM++'s. The abstract's bias is in y: with y = s A + b, M is the weighted
    activations sum_k u_k s_k A_k plus the bias term sum_k u_k b_k. It makes the map a property of the function:
    rescaling a layer or its channels, flipping signs of channels before a batch norm, or moving an offset between the
    norm's mean and the bias changes nothing. The weight at each position and the signed evidence depart from the
    abstract: they were chosen because the maps then show the class. Over all layers of a network the bias terms, with
    those of the input, of clips and of the classifier, sum to the score; the map of one layer does not.

    reading="residual", the first reconstruction: M = sum_k w_k A_k + b / (h w) with A the convolution's own output, g
    its gradient, w_k = f' sum_ij a ReLU(g), a = g^2 / (2 g^2 + r g^3 sum_ij A_k), 0 where g = 0, and b = Y - sum_k w_k
    sum_ij A_k: M sums to Y before its ReLU. lambda_l is proportional to mean|g_l| mean|A_l|. Its map changes if signs
    of channels are flipped before a batch norm, and shows the class weakly.

    InputError, UnknownMethod for a smooth function that does not fit, or another reading.
    """
    del reading  # it chose the class of `layers`
    if isinstance(layers, SignedMaps):
        maps, importance = list(layers.map_of_layers()), _shares_for(layers)
    else:
        maps, importance = list(_residual_maps(layers, terms(smooth, layers.logits, layers.seeds))), _products(layers)
    total = importance.sum(axis=1, keepdims=True)
    weights = (importance / np.where(total > 0, total, 1)).astype(np.float32)
    fused = np.zeros((len(weights), *layers.size), np.float32)
    for layer, weight in zip(maps, weights.T, strict=True):
        rectified = np.maximum(layer, 0).astype(np.float32)
        resized = within_range(upsample(rectified, layers.size), rectified)  # a constant map stays constant
        fused += weight[:, None, None] * minmax(resized)
    return Result(fused, weights)


def _shares_for(layers: SignedMaps) -> np.ndarray:
    """P / (P + N) of each layer, (S, L) float64; 0 where a layer's map is zero, or its channels cancel everywhere."""
    shares = []
    for layer, magnitude in zip(layers.map_of_layers(), layers.magnitudes.T, strict=True):
        total = np.abs(layer).sum(axis=(1, 2), dtype=np.float64)
        positive = np.maximum(layer, 0).sum(axis=(1, 2), dtype=np.float64)
        shares.append(np.where(total > CANCELLED * magnitude, positive / np.where(total > 0, total, 1), 0))
    return np.stack(shares, axis=1)


def _products(layers: Gradients) -> np.ndarray:
    """mean|g| mean|A| of each layer, (S, L) float64; 1 for all layers of a row where all are 0."""
    products = [np.abs(g).mean(axis=(1, 2, 3)) * np.abs(a).mean(axis=(1, 2, 3)) for a, g in layers.pairs()]
    stacked = np.stack(products, axis=1).astype(np.float64)
    return np.where(stacked.any(axis=1, keepdims=True), stacked, 1.0)


def _residual_maps(layers: Gradients, of_score: Terms) -> Iterator[np.ndarray]:
    """residual_map of each layer."""
    for activation, gradient in layers.pairs():
        yield residual_map(activation, gradient, of_score)


def residual_map(activation: np.ndarray, gradient: np.ndarray, of_score: Terms) -> np.ndarray:
    """(sum_k w_k A_k + b / (h w)) / |f'(S)|, before the ReLU. The sum over its pixels is Y / |f'(S)|.

    activation, gradient (S, K, h, w) -> (S, h, w) float64. w_k = sign sum_ij a ReLU(g),
    a = g^2 / (2 g^2 + r g^3 sum_ij A_k), 0 where g = 0.
    """
    total = activation.sum(axis=(2, 3), keepdims=True, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        bend = np.where(total == 0, 0, of_score.ratio[:, None, None, None] * total) * gradient
        a = np.where(gradient > 0, 1 / (2 + bend), 0)  # g^2 cancels; for g <= 0 ReLU(g) is 0
    a = np.where(np.isfinite(a), a, 0)
    weights = of_score.sign[:, None] * (a * gradient).sum(axis=(2, 3))
    weighted = np.einsum("sk,skhw->shw", weights, activation)
    bias = of_score.value - weighted.sum(axis=(1, 2))
    return weighted + bias[:, None, None] / (activation.shape[2] * activation.shape[3])
