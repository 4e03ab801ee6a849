"""Baselines that read activations and gradients at chosen taps. g = dS/dA; maps are scaled as `baseline` says."""

from __future__ import annotations

import numpy as np

from ...kernels import upsample
from ..errors import InputError, warn
from .baseline import combined, scale
from .data import Activations, Gradients, GridMaps, LayerMaps
from .registry import Result, cam, is_number

_ROUNDING = 1e-4  # relative error of an activation that no float32 engine exceeds in ordinary networks


def _weighted(weights: np.ndarray, activation: np.ndarray) -> np.ndarray:
    """sum_k w_k A_k: weights (S, K), activation (S, K, h, w) -> (S, h, w)."""
    return np.einsum("sk,skhw->shw", weights, activation)


@cam("grad_cam", needs=LayerMaps, layers="last", source="Selvaraju et al., arXiv 1610.02391")
def grad_cam(layers: LayerMaps) -> Result:
    """ReLU(sum_k alpha_k A_k), alpha_k = mean over the grid of g."""
    return combined(layers.map_of_layers(), layers.size)


@cam("grad_cam_pp", needs=Gradients, layers="last", source="Chattopadhyay et al., Grad-CAM++, arXiv 1710.11063")
def grad_cam_pp(layers: Gradients) -> Result:
    """ReLU(sum_k w_k A_k), w_k = sum ReLU(g) a, a = g^2 / (2 g^2 + g^3 sum(A_k) + 1e-6), 0 where g = 0."""

    def layer(activation: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        square = gradient**2
        total = activation.sum(axis=(2, 3), keepdims=True)
        a = np.where(gradient != 0, square / (2 * square + total * square * gradient + 1e-6), 0)
        return _weighted((np.maximum(gradient, 0) * a).sum(axis=(2, 3)), activation)

    return combined([layer(a, g) for a, g in layers.pairs()], layers.size)


@cam("x_grad_cam", needs=Gradients, layers="last", source="Fu et al., XGrad-CAM, arXiv 2008.02312")
def x_grad_cam(layers: Gradients) -> Result:
    """ReLU(sum_k w_k A_k), w_k = sum(g A_k) / (sum(A_k) + 1e-7)."""

    def layer(activation: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        total = activation.sum(axis=(2, 3), keepdims=True)
        return _weighted((gradient * activation / (total + 1e-7)).sum(axis=(2, 3)), activation)

    return combined([layer(a, g) for a, g in layers.pairs()], layers.size)


@cam("layer_cam", needs=Gradients, layers="last", source="Jiang et al., LayerCAM, IEEE TIP 2021")
def layer_cam(layers: Gradients) -> Result:
    """ReLU(sum_k ReLU(g) A_k)."""
    return combined([(np.maximum(g, 0) * a).sum(axis=1) for a, g in layers.pairs()], layers.size)


@cam("hires_cam", needs=Gradients, layers="last", source="Draelos and Carin, HiResCAM, arXiv 2011.08891")
def hires_cam(layers: Gradients) -> Result:
    """ReLU(sum_k g A_k)."""
    return combined([(g * a).sum(axis=1) for a, g in layers.pairs()], layers.size)


@cam("eigen_cam", needs=Activations, layers="last", source="Muhammad and Yeasin, Eigen-CAM, arXiv 2008.00299")
def eigen_cam(layers: Activations) -> Result:
    """ReLU(X v), X the centred (h w, K) activations, v their first right singular vector; the class has no influence.

    A singular vector's sign is arbitrary. Here the map correlates with the mean activation over channels; where that is
    constant within rounding, as behind a layer norm, with the activations' squared distance from their mean.
    """

    def layer(activation: np.ndarray) -> np.ndarray:
        rows = activation.reshape(*activation.shape[:2], -1).transpose(0, 2, 1).astype(np.float64)
        centred = rows - rows.mean(axis=1, keepdims=True)
        other = centred.transpose(0, 2, 1)
        if rows.shape[1] <= rows.shape[2]:  # X X^T and X^T X have the same nonzero eigenvalues: take the smaller
            values, vectors = np.linalg.eigh(centred @ other)
            projection = vectors[:, :, -1] * np.sqrt(np.maximum(values[:, -1:], 0))
        else:
            projection = (centred @ np.linalg.eigh(other @ centred)[1][:, :, -1:])[:, :, 0]
        signed = projection * _sign(projection, centred)
        return signed.astype(np.float32).reshape(-1, *activation.shape[2:])

    return combined([layer(a) for a in layers.activations], layers.size)


def _sign(projection: np.ndarray, centred: np.ndarray) -> np.ndarray:
    """The sign of EigenCAM's maps: projection (S, h w), centred activations (S, h w, K) -> (S, 1) of 1 and -1."""
    sign, decided = np.ones((len(projection), 1)), np.zeros((len(projection), 1), bool)
    size = np.abs(centred)
    for told, largest in ((centred, size), (centred**2, size**2)):
        values = told.mean(axis=2)
        agreement = (projection * (values - values.mean(axis=1, keepdims=True))).sum(axis=1, keepdims=True)
        bound = np.linalg.norm(projection, axis=1) * np.linalg.norm(largest.mean(axis=2), axis=1)
        sign = np.where(decided, sign, np.where(agreement < 0, -1.0, 1.0))
        decided |= np.abs(agreement) > _ROUNDING * bound[:, None]
        if decided.all():
            return sign
    if projection[~decided[:, 0]].any():
        warn(
            "eigen_cam: for some image rounding decides the sign of the map, so that another machine may draw the "
            "opposite one"
        )
    return sign


@cam("full_grad", needs=GridMaps, layers=None, source="Srinivas and Fleuret, FullGrad, arXiv 1905.00780")
def full_grad(grids: GridMaps) -> Result:
    """sum_c minmax|x_c g_c| + sum over biases b of sum_k up(minmax|b_k g_k|), over the image x and every convolution
    and batch norm that adds a constant. Biases of linear and layer norm layers have no grid: they are not included.
    """
    total = np.zeros((len(grids.seeds), *grids.size), np.float32)
    for maps in grids.maps:
        total += upsample(maps, grids.size)
    return Result(scale(total), np.zeros((len(total), 0), np.float32))


def finer_seeds(logits: np.ndarray, seeds: np.ndarray, alpha: float = 1.0, comparisons: int = 3) -> np.ndarray:
    """Gradient, by the logits z, of sum_i p_i (z_t - alpha z_i) / (sum_i p_i + 1e-9): p is the softmax of z, t the
    target, i the `comparisons` classes whose logits are nearest to z_t.

    logits (S, classes); seeds (S, classes), one-hot -> (S, classes) float32. InputError for other seeds, for a network
    with one class, for options out of range, and if the result is zero.
    """
    classes = logits.shape[1]
    if classes < 2:
        raise InputError("finer_cam compares classes, and this network has one: use grad_cam")
    if not (np.count_nonzero(seeds, axis=1) == 1).all() or not (seeds.max(axis=1) == 1).all():
        raise InputError("finer_cam explains classes, not seed arrays: pass class numbers")
    if not isinstance(comparisons, int) or comparisons < 1:
        raise InputError(f"comparisons {comparisons!r}: use a whole number from 1")
    if not is_number(alpha):
        raise InputError(f"alpha {alpha!r}: use a number")
    result = np.empty(logits.shape, np.float64)
    for row, (z, seed) in enumerate(zip(logits.astype(np.float64), seeds, strict=True)):
        t = int(seed.argmax())
        distance = np.abs(z - z[t])
        distance[t] = -1
        others = np.argsort(distance, kind="stable")[1 : 1 + comparisons]
        p = np.exp(z - z.max())
        p /= p.sum()
        total = p[others].sum() + 1e-9
        gaps = z[t] - alpha * z[others]
        value = (p[others] * gaps).sum() / total
        slope = np.zeros(classes)  # d value / d z through the gaps, then through p
        slope[t] += p[others].sum()
        slope[others] -= alpha * p[others]
        pull = (gaps - value) * p[others]
        slope[others] += pull
        slope -= p * pull.sum()
        result[row] = slope / total
    new_seeds = result.astype(np.float32)
    if not new_seeds.any(axis=1).all():  # a seed of zeros would mean the top class
        raise InputError("finer_cam: the other classes' probabilities are 0, so there is no difference: use grad_cam")
    return new_seeds


@cam(
    "finer_cam",
    needs=LayerMaps,
    layers="last",
    source="Zhang et al., Finer-CAM, arXiv 2501.11309",
    seeds=finer_seeds,
)
def finer_cam(layers: LayerMaps, alpha: float = 1.0, comparisons: int = 3) -> Result:
    """Grad-CAM of how the class differs from the `comparisons` classes with the nearest logits, z_t - alpha z_i,
    weighed by their probabilities.
    """
    del alpha, comparisons  # finer_seeds used them already
    return combined(layers.map_of_layers(), layers.size)
