"""CAM methods in plain PyTorch, from recorded activations and gradients: the references for camrt's methods."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..export.pytorch.autograd import Record


def in_float64(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode."""
    return copy.deepcopy(model).double().eval()


def minmax(x: torch.Tensor) -> torch.Tensor:
    """(x - min) / (max - min) over the last two axes; a constant map becomes zeros."""
    low = x.amin((-2, -1), keepdim=True)
    span = x.amax((-2, -1), keepdim=True) - low
    return torch.where(span > 0, (x - low) / torch.where(span > 0, span, 1), 0)


def resize(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(B, h, w) -> (B, *size), bilinear, half-pixel centres, no antialiasing."""
    return F.interpolate(x[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def layer_cam_maps(recorded: Record) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per layer: alpha = mean over the grid of the gradient (B, K), and sum_k alpha_k A_k (B, h, w)."""
    alphas = [g.mean((2, 3)) for g in recorded.gradients.values()]
    maps = [(a[:, :, None, None] * x).sum(1) for a, x in zip(alphas, recorded.activations.values(), strict=True)]
    return alphas, maps


def winsor_weights(importance: torch.Tensor, percentile: float, low: float = 0.1, high: float = 1.0) -> torch.Tensor:
    """Importances (L,) -> weights (L,): positive ones are clamped at their percentile and rescaled to [low, high];
    others become 0.
    """
    positive = importance > 0
    weights = torch.zeros_like(importance)
    values = importance[positive]
    if not values.numel():
        return weights
    values = values.clamp(max=torch.quantile(values, percentile / 100))
    span = values.max() - values.min()
    scaled = low + (values - values.min()) / span * (high - low) if span > 0 else torch.full_like(values, high)
    weights[positive] = torch.full_like(values, high) if percentile == 0 else scaled
    return weights


def mean_of_alphas(alpha: torch.Tensor) -> torch.Tensor:
    """Mean over channels (B, K) -> (B,); 0 if the channels cancel up to rounding, as they do before a layer norm."""
    mean = alpha.mean(1)
    return torch.where(mean.abs() > 1e-6 * alpha.abs().mean(1), mean, 0)


def winsor_cam(
    recorded: Record, size: Sequence[int], percentile: float = 90, layer_aggregation: str = "mean"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Winsor-CAM over the recorded layers (arXiv 2507.10846): map (B, *size), weights (B, L), importances (B, L)."""
    alphas, maps = layer_cam_maps(recorded)
    aggregate = {"mean": mean_of_alphas, "max": lambda a: a.amax(1)}[layer_aggregation]
    importance = torch.stack([aggregate(a) for a in alphas], 1).relu()
    weights = torch.stack([winsor_weights(row, percentile) for row in importance])
    largest = max(m.shape[-2] for m in maps), max(m.shape[-1] for m in maps)
    stack = torch.stack([resize(resize(minmax(m.relu()), largest), size) for m in maps], 1)
    return (weights[:, :, None, None] * stack).sum(1), weights, importance


def combined(maps: Sequence[torch.Tensor], size: Sequence[int]) -> torch.Tensor:
    """Layers' maps (B, h, w) -> (B, *size), rectified, resized, averaged and scaled as pytorch-grad-cam 1.5 does."""

    def scale(x: torch.Tensor) -> torch.Tensor:
        x = x - x.amin((-2, -1), keepdim=True)
        return x / (1e-7 + x.amax((-2, -1), keepdim=True))

    return scale(torch.stack([resize(scale(m.relu()), size).clamp(min=0) for m in maps]).mean(0))


def weighted(weights: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
    """sum_k w_k A_k: (B, K) and (B, K, h, w) -> (B, h, w)."""
    return (weights[:, :, None, None] * activation).sum(1)


def grad_cam(recorded: Record, size: Sequence[int]) -> torch.Tensor:
    """Grad-CAM (arXiv 1610.02391), layers averaged: (B, *size)."""
    return combined(layer_cam_maps(recorded)[1], size)


def _of_layers(layer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A method that treats each layer's (activation, gradient) by itself."""
    return lambda recorded, size: combined(
        [layer(a, g) for a, g in zip(recorded.activations.values(), recorded.gradients.values(), strict=True)], size
    )


def _grad_cam_pp(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    total = activation.sum((2, 3), keepdim=True)
    share = gradient**2 / (2 * gradient**2 + total * gradient**3 + 1e-6)
    return weighted((torch.where(gradient != 0, share, 0) * gradient.relu()).sum((2, 3)), activation)


def _x_grad_cam(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return weighted((gradient * activation).sum((2, 3)) / (activation.sum((2, 3)) + 1e-7), activation)


def _eigen_cam(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    maps = []
    for image in activation:
        rows = image.flatten(1).T
        centred = rows - rows.mean(0)
        projection = centred @ torch.linalg.svd(centred, full_matrices=False)[2][0]
        agreements = [
            torch.linalg.vecdot(projection, told.mean(1) - told.mean()) / projection.norm() / told.abs().mean(1).norm()
            for told in (centred, centred**2)
        ]
        decided = next((a for a in agreements if abs(a) > 1e-4), agreements[-1])  # below: rounding, in float32
        maps.append((-projection if decided < 0 else projection).reshape(image.shape[1:]))
    return torch.stack(maps)


Smooth = Callable[[torch.Tensor], torch.Tensor]


def derivatives(recorded: Record, seed: torch.Tensor, smooth: Smooth) -> tuple[torch.Tensor, ...]:
    """Y = smooth(S) of the target's score S, f'(S), and f'''(S) / f''(S), 0 where both are: (B,) each, by autograd."""
    score = (recorded.logits * seed).sum(1).requires_grad_()
    with torch.enable_grad():
        found = [smooth(score)]
        for _ in range(3):
            last = found[-1]
            step = torch.autograd.grad(last.sum(), score, create_graph=True)[0] if last.requires_grad else last * 0
            found.append(step)
    y, first, second, third = (d.detach() for d in found)
    return y, first, torch.where((second == 0) & (third == 0), 0, third / second)


def _resized_within_range(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """A constant map, as every map of a grid of 1 x 1 is, stays constant: min-max would draw the rounding."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.minimum(torch.maximum(resize(maps, size), low), high)


def fused(
    maps: Sequence[torch.Tensor], importance: Sequence[torch.Tensor], size: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Layers' maps (B, h, w) and importances (B,) -> the weighted sum of the rectified, resized and scaled maps
    (B, *size), and the weights (B, L), which sum to 1 or are all 0.
    """
    shares = torch.stack(list(importance), 1)
    total = shares.sum(1, keepdim=True)
    shares = shares / torch.where(total > 0, total, 1)
    scaled = torch.stack([minmax(_resized_within_range(m.relu(), size)) for m in maps], 1)
    return (shares[:, :, None, None] * scaled).sum(1), shares


def integrative_cam(
    behind_norms: Record, seed: torch.Tensor, size: Sequence[int], smooth: Smooth = lambda s: s
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integrative CAM, reconstructed (arXiv 2412.01354), reading "signed": maps (B, *size) and layer weights (B, L).

    behind_norms: per convolution the output of the norm behind it, or its own where there is none. smooth: score
    (B,) -> Y (B,); its derivatives are autograd's.
    """
    _, first, ratio = (d[:, None, None, None] for d in derivatives(behind_norms, seed, smooth))
    maps, importance = [], []
    for y, g in zip(behind_norms.activations.values(), behind_norms.gradients.values(), strict=True):
        alpha = 1 / (2 + ratio.abs() * g.abs() * y.abs().sum((2, 3), keepdim=True))
        signed = (first.sign() * alpha * g * y).sum(1)
        for_class, all_evidence = signed.relu().sum((1, 2)), signed.abs().sum((1, 2))
        cancelled = all_evidence <= 1e-3 * (alpha * g * y).abs().sum((1, 2, 3))
        maps.append(signed)
        importance.append(torch.where(cancelled, 0, for_class / torch.where(all_evidence > 0, all_evidence, 1)))
    return fused(maps, importance, size)


def integrative_residual(
    recorded: Record, seed: torch.Tensor, size: Sequence[int], smooth: Smooth = lambda s: s
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, reading "residual". recorded: the convolutions' own outputs."""
    y, first, ratio = (d[:, None, None, None] for d in derivatives(recorded, seed, smooth))
    maps, importance = [], []
    for activation, gradient in zip(recorded.activations.values(), recorded.gradients.values(), strict=True):
        total = activation.sum((2, 3), keepdim=True)
        share = torch.where(gradient != 0, 1 / (2 + ratio * gradient * total), 0)  # g^2 / (2 g^2 + ratio g^3 total)
        weights = first[:, 0, 0] * (share * gradient.relu()).sum((2, 3))
        bias = y[:, 0, 0, 0] - (weights * total[:, :, 0, 0]).sum(1)
        pixels = activation.shape[2] * activation.shape[3]
        maps.append(weighted(weights, activation) + (bias / pixels)[:, None, None])
        importance.append(gradient.abs().mean((1, 2, 3)) * activation.abs().mean((1, 2, 3)))
    if not torch.stack(importance).any():
        importance = [torch.ones_like(i) for i in importance]
    return fused(maps, importance, size)


def finer_seed(logits: torch.Tensor, target: int, alpha: float = 1.0, comparisons: int = 3) -> torch.Tensor:
    """Gradient, (1, classes), of Finer-CAM's score (arXiv 2501.11309) by the logits (1, classes)."""
    z = logits.detach().clone().requires_grad_()
    nearest = (z[0] - z[0, target]).abs().argsort(stable=True)
    others = [int(i) for i in nearest if int(i) != target][:comparisons]
    with torch.enable_grad():
        p = z.softmax(1)[0, others]
        score = (p * (z[0, target] - alpha * z[0, others])).sum() / (p.sum() + 1e-9)
        return torch.autograd.grad(score, z)[0]


LAYER_METHODS: dict[str, Callable[[Record, Sequence[int]], torch.Tensor]] = {
    "grad_cam": grad_cam,
    "grad_cam_pp": _of_layers(_grad_cam_pp),
    "x_grad_cam": _of_layers(_x_grad_cam),
    "layer_cam": _of_layers(lambda a, g: (g.relu() * a).sum(1)),
    "hires_cam": _of_layers(lambda a, g: (g * a).sum(1)),
    "eigen_cam": _of_layers(_eigen_cam),
}  # baselines that read one activation and gradient per layer
