"""Each method in plain PyTorch: hooks, autograd and the formula. What everything else is checked against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Recorded:
    """logits (B, classes); per layer its activation and the gradient of the target's score, (B, K, h, w)."""

    logits: torch.Tensor
    activations: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def select(recorded: Recorded, layers: Sequence[str]) -> Recorded:
    """The same for some of the layers."""
    return Recorded(
        recorded.logits, {n: recorded.activations[n] for n in layers}, {n: recorded.gradients[n] for n in layers}
    )


def record(model: nn.Module, image: torch.Tensor, target: int | torch.Tensor, layers: Sequence[str]) -> Recorded:
    """One forward and one backward pass, in the precision of model and image.

    target: a class, or a seed (B, classes), the cotangent of the logits. A layer's activation is cloned as its module
    returns it, because an in-place ReLU behind it would change what the hook saw.
    """
    activations: dict[str, torch.Tensor] = {}

    class Keep(torch.autograd.Function):
        """The identity, whose output autograd may overwrite in place without touching the recorded tensor."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grad_outputs):
            return grad_outputs[0]

    def keep(name: str) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            output.retain_grad()
            activations[name] = output
            return Keep.apply(output)

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        with torch.enable_grad():
            logits = model(image)
    finally:
        for handle in handles:
            handle.remove()
    seed = torch.zeros_like(logits)
    if isinstance(target, int):
        seed[:, target] = 1
    else:
        seed[:] = target
    grads = torch.autograd.grad(logits, list(activations.values()), seed)
    return Recorded(
        logits.detach(),
        {n: a.detach() for n, a in activations.items()},
        dict(zip(activations, grads, strict=True)),
    )


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


def layer_cam_maps(recorded: Recorded) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per layer: alpha = mean over the grid of the gradient (B, K), and sum_k alpha_k A_k (B, h, w)."""
    alphas = [g.mean((2, 3)) for g in recorded.gradients.values()]
    maps = [(a[:, :, None, None] * x).sum(1) for a, x in zip(alphas, recorded.activations.values(), strict=True)]
    return alphas, maps


def winsor_weights(importance: torch.Tensor, percentile: float, low: float = 0.1, high: float = 1.0) -> torch.Tensor:
    """Importances (L,) -> weights (L,): clamped at the percentile of the positive ones, rescaled to [low, high]; else 0."""
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
    """Mean over channels (B, K) -> (B,); 0 where the channels cancel to rounding, as they do behind a layer norm."""
    mean = alpha.mean(1)
    return torch.where(mean.abs() > 1e-6 * alpha.abs().mean(1), mean, 0)


def winsor_cam(
    recorded: Recorded, size: Sequence[int], percentile: float = 90, layer_aggregation: str = "mean"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Winsor-CAM over the recorded layers (arXiv 2507.10846): map (B, *size), weights (B, L), importances (B, L)."""
    alphas, maps = layer_cam_maps(recorded)
    aggregate = {"mean": mean_of_alphas, "max": lambda a: a.amax(1)}[layer_aggregation]
    importance = torch.stack([aggregate(a) for a in alphas], 1).relu()
    weights = torch.stack([winsor_weights(row, percentile) for row in importance])
    largest = max(m.shape[-2] for m in maps), max(m.shape[-1] for m in maps)
    stack = torch.stack([resize(resize(minmax(m.relu()), largest), size) for m in maps], 1)
    return (weights[:, :, None, None] * stack).sum(1), weights, importance


def grad_cam(recorded: Recorded, size: Sequence[int]) -> torch.Tensor:
    """Grad-CAM, layers averaged, scaled as pytorch-grad-cam 1.5 does: (B, *size)."""

    def scale(x: torch.Tensor) -> torch.Tensor:
        x = x - x.amin((-2, -1), keepdim=True)
        return x / (1e-7 + x.amax((-2, -1), keepdim=True))

    _, maps = layer_cam_maps(recorded)
    return scale(torch.stack([resize(scale(m.relu()), size).clamp(min=0) for m in maps]).mean(0))
