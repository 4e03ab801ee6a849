"""References in plain PyTorch for the methods that run the network several times, or differentiate all of it. Each call
takes one image and one target.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from ..export.layers.layouts import Layout
from ..export.pytorch.autograd import TOKENS, as_maps, record
from ..export.pytorch.from_torch import is_a
from ..export.pytorch.modules import OutputSelector, module_of, unwrapped
from ..export.pytorch.recording import recording
from ..export.pytorch.stop_gradient import checkpoints_as_calls
from ..runtime.bundle.manifest import Tap
from .methods import combined, minmax, resize, weighted


@contextmanager
def _replaced(model: nn.Module, layer: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """A context in which `change` is applied to the layer's output."""
    with recording(model, lambda name, output: change(output) if name == layer else output):
        yield


def _activation(model: nn.Module, image: torch.Tensor, target: int, tap: Tap) -> torch.Tensor:
    """(K, h, w)."""
    recorded = as_maps(record(model, image, target, [tap.name]), [tap])
    return recorded.activations[tap.name][0]


def _probability(model: nn.Module, images: torch.Tensor, target: int) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part).softmax(1)[:, target] for part in images.split(16)])


def score_cam_pp(
    model: nn.Module, image: torch.Tensor, target: int, tap: Tap, variant: str = "tanh", baseline: str = "none"
) -> torch.Tensor:
    """ScoreCAM++ (arXiv 2404.19341) of one image (1, C, H, W): (H, W)."""
    raised = resize(_activation(model, image, target, tap), image.shape[2:])
    masks = torch.sigmoid((raised / 2).relu()) if variant == "sigmoid_relu" else torch.tanh(raised)
    scores = _probability(model, image * masks[:, None], target)
    if baseline == "zero":
        scores = scores - _probability(model, torch.zeros_like(image), target)
    added = raised if variant == "tanh_mask_only" else masks
    return minmax((scores[:, None, None] * added).sum(0).relu())


def score_cam(model: nn.Module, image: torch.Tensor, target: int, tap: Tap, variant: str = "original") -> torch.Tensor:
    """Score-CAM (arXiv 1910.01279): (H, W)."""
    activation = _activation(model, image, target, tap)
    if variant == "original":
        raised = resize(activation, image.shape[2:])
        varies = raised.amax((1, 2)) > raised.amin((1, 2))
        scores = _probability(model, image * minmax(raised)[:, None], target) * varies
        return minmax((scores[:, None, None] * raised).sum(0).relu())
    raised = nn.functional.interpolate(activation[None], image.shape[2:], mode="bilinear", align_corners=True)[0]
    low, high = raised.amin((1, 2), keepdim=True), raised.amax((1, 2), keepdim=True)
    masked = image * ((raised - low) / (high - low + 1e-8))[:, None]
    with torch.no_grad():
        logits = torch.cat([model(part)[:, target] for part in masked.split(16)])
    return combined([weighted(logits.softmax(0)[None], activation[None])], image.shape[2:])[0]


def ablation_cam(model: nn.Module, image: torch.Tensor, target: int, tap: Tap) -> torch.Tensor:
    """Ablation-CAM (WACV 2020), channels set to zero: (H, W)."""
    channel_axis = Layout(tap.layout, tap.grid).channel_axis
    activation = _activation(model, image, target, tap)
    scores = []
    with torch.no_grad():
        whole = model(image)[0, target]
        for k in range(tap.channels):

            def without(output: torch.Tensor, k: int = k) -> torch.Tensor:
                changed = output.clone()
                grid = _batch_first(changed, tap)
                grid = grid[:, tap.prefix :] if tap.layout in TOKENS else grid
                grid.select(channel_axis, k).zero_()
                return changed

            with _replaced(model, tap.name, without):
                scores.append(model(image)[0, target])
    weights = (whole - torch.stack(scores)) / whole
    return combined([weighted(weights[None], activation[None])], image.shape[2:])[0]


def recipro_cam(
    model: nn.Module, image: torch.Tensor, target: int, tap: Tap, gaussian: bool = False, variant: str = "original"
) -> torch.Tensor:
    """Recipro-CAM (arXiv 2209.14074): (H, W). variant="openvino_xai": logits minus the lowest, not probabilities."""
    height, width = tap.grid
    line = torch.tensor([0.25, 0.5, 0.25], dtype=image.dtype)
    scores = []
    for position in range(height * width):
        y, x = divmod(position, width)

        def single_position(output: torch.Tensor, y: int = y, x: int = x) -> torch.Tensor:
            output = _batch_first(output, tap)
            grid = output[:, tap.prefix :].reshape(1, height, width, -1) if tap.layout in TOKENS else output
            grid = grid.permute(0, 2, 3, 1) if tap.layout == "NCHW" else grid
            masked_grid = torch.zeros_like(grid)
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    share = line[dy + 1] * line[dx + 1] if gaussian else float(dy == dx == 0)
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        masked_grid[:, y + dy, x + dx] = share * grid[:, y, x]
            if tap.layout == "NCHW":
                return masked_grid.permute(0, 3, 1, 2).contiguous()
            if tap.layout in TOKENS:
                return _batch_first(
                    torch.cat([output[:, : tap.prefix], masked_grid.reshape(1, height * width, -1)], 1), tap
                )
            return masked_grid

        with _replaced(model, tap.name, single_position), torch.no_grad():
            scores.append(model(image)[:, target] if variant == "openvino_xai" else _probability(model, image, target))
    position_scores = torch.cat(scores)
    position_scores = position_scores - position_scores.min() if variant == "openvino_xai" else position_scores
    return combined([position_scores.reshape(1, height, width)], image.shape[2:])[0]


def _batch_first(output: torch.Tensor, tap: Tap) -> torch.Tensor:
    """A view that swaps the first two axes of an LND tensor (to tokens, or back); other layouts as they are."""
    return output.transpose(0, 1) if tap.layout == "LND" else output


Biased = tuple[torch.Tensor, torch.Tensor]  # a constant (K,) and the gradient where it is added, (B, K, h, w)


def biases_of_module(model: nn.Module, image: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, list[Biased]]:
    """(gradient of the image, (constant, gradient of the output) for every 2-d convolution and batch norm that depends
    on the image and has a nonzero constant).

    The constant (K,) of a module is its output for an input of zeros. seed: the cotangent of the logits.
    """
    constants: dict[str, torch.Tensor] = {}

    def measure(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if name not in constants and args[0].dim() == 4:
                constants[name] = torch.zeros(0)  # the hook's own call below must not run the hook again
                forward = (
                    module
                    if _is_alone(module)
                    else functools.partial(nn.BatchNorm2d.forward, cast(nn.BatchNorm2d, module))
                )
                constants[name] = forward(torch.zeros_like(args[0][:1]))[0, :, 0, 0]  # type: ignore[arg-type]

        return hook

    modules = {n: m for n, m in model.named_modules() if is_a(m, (nn.Conv2d, nn.BatchNorm2d))}
    handles = [module.register_forward_hook(measure(name)) for name, module in modules.items()]
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    named = {module: constants[name] for name, module in modules.items() if name in constants and constants[name].any()}
    biased: dict[str, torch.Tensor] = {}
    inner = dict(unwrapped(model).named_modules())

    def visit(name: str, output: torch.Tensor) -> torch.Tensor:
        scope, _, function = name.rpartition(".")
        module, inside = module_of(name, inner), False
        if module is None and function.startswith("batch_norm"):
            module, inside = module_of(scope, inner), True
        computes = module is not None and module in named and _is_alone(module) != inside
        if computes and output.dim() == 4 and output.requires_grad:
            biased[name] = named[module]
        return output

    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad = False
        # now exactly the tensors that are computed from the image require gradients
        with torch.enable_grad(), checkpoints_as_calls(), recording(model, visit):
            model(image.detach().clone().requires_grad_())
    finally:
        for parameter in trained:
            parameter.requires_grad = True
    entry = nn.Sequential(nn.Identity(), model)  # the image is then the output of a module, which `record` can record
    prefix = "1.model." if isinstance(model, OutputSelector) else "1."
    recorded = record(entry, image, seed, ["0", *(prefix + name for name in biased)])
    return recorded.gradients["0"], [(constant, recorded.gradients[prefix + name]) for name, constant in biased.items()]


def norms_of_module(model: nn.Module, image: torch.Tensor, taps: Sequence[Tap]) -> dict[str, Tap] | None:
    """{layer: the output of the batch norm module that reads it, as a tap}; None if a layer has no such module."""
    outputs: dict[str, torch.Tensor] = {}
    norms: dict[str, Tap] = {}
    by_name = {tap.name: tap for tap in taps}

    def visit(name: str, output: torch.Tensor) -> torch.Tensor:
        if name in by_name:
            outputs[name] = output
        return output

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            for layer, output in outputs.items():
                if args and args[0] is output:
                    behind = name if _is_alone(module) else f"{name}.batch_norm"
                    norms[layer] = replace(by_name[layer], name=behind)

        return hook

    modules = [(n, m) for n, m in unwrapped(model).named_modules() if is_a(m, (nn.BatchNorm2d,))]
    handles = [module.register_forward_pre_hook(look(name)) for name, module in modules]
    try:
        with torch.no_grad(), checkpoints_as_calls(), recording(model, visit):
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return norms if set(norms) == set(by_name) else None


def _is_alone(module: nn.Module) -> bool:
    """False for a batch norm that also computes an activation, as timm's do; True for every other module."""
    return not isinstance(module, nn.BatchNorm2d) or type(module).forward is nn.BatchNorm2d.forward


def full_grad(image: torch.Tensor, image_gradient: torch.Tensor, biased: list[Biased]) -> torch.Tensor:
    """FullGrad (arXiv 1905.00780) as pytorch-grad-cam sums it: (B, H, W)."""
    size = image.shape[2:]

    def scaled(x: torch.Tensor) -> torch.Tensor:
        x = x - x.amin((-2, -1), keepdim=True)
        return x / (1e-7 + x.amax((-2, -1), keepdim=True))

    def summed(x: torch.Tensor) -> torch.Tensor:
        return resize(scaled(x.abs()).sum(1), size)  # the sum of the resized maps: resizing is linear

    total = summed(image * image_gradient)
    for bias, gradient in biased:
        total = total + summed(bias[:, None, None] * gradient)
    return scaled(total)
