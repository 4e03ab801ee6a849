"""PyTorch's own activations and gradients of a module, and a bundle's gradients held against them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ...runtime.bundle.manifest import Tap
from ...runtime.errors import ExportError, first_line
from ..check import Checker, check_gradients, relative_l2
from ..graph import TappedGraph
from .modules import own_gradients, without_autocast
from .recording import function_name, recording
from .stop_gradient import checkpoints_as_calls

TOKENS = ("tokens", "LND")


@dataclass(frozen=True)
class Record:
    """logits (B, classes); per layer its activation and the gradient of the target's score, as its module has them."""

    logits: torch.Tensor
    activations: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor]


def select(recorded: Record, layers: Sequence[str]) -> Record:
    """The same for some of the layers."""
    return Record(recorded.logits, _Selected(recorded.activations, layers), _Selected(recorded.gradients, layers))


class _Selected(Mapping[str, torch.Tensor]):
    """Some of a mapping's tensors. They are looked up one by one: `verify` keeps its tensors in files."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        self._tensors = tensors
        self._names = tuple(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def as_maps(recorded: Record, taps: Sequence[Tap]) -> Record:
    """The record with every tensor converted from its module's layout to (B, K, h, w); prefix tokens are dropped."""
    layouts = {t.name: t for t in taps}

    def convert(name: str, x: torch.Tensor) -> torch.Tensor:
        tap = layouts[name]
        if tap.layout == "NHWC":
            return x.permute(0, 3, 1, 2)
        x = x.transpose(0, 1) if tap.layout == "LND" else x
        if tap.layout in TOKENS:
            return x[:, tap.prefix :].transpose(1, 2).reshape(len(x), tap.channels, *tap.grid)
        return x

    return Record(
        recorded.logits,
        {n: convert(n, a) for n, a in recorded.activations.items()},
        {n: convert(n, g) for n, g in recorded.gradients.items()},
    )


def record(model: nn.Module, image: torch.Tensor, target: int | torch.Tensor, layers: Sequence[str]) -> Record:
    """One forward and one backward pass, in the precision of model and image.

    target: a class, or a seed (B, classes), the cotangent of the logits. A layer's activation is cloned as it is
    computed, because an in-place ReLU behind it would change it. Where no gradient reaches a layer its gradient is
    zero. ExportError where PyTorch cannot differentiate the model.
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

    def keep(name: str, output: torch.Tensor) -> torch.Tensor:
        if name not in layer_names:
            return output
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        activations[name] = output
        return Keep.apply(output)  # type: ignore[return-value]

    layer_names = set(layers)
    with torch.enable_grad(), without_autocast(), checkpoints_as_calls():
        with recording(model, keep), _NormsInOrder():
            logits = model(image)
        logits = logits.reshape(len(image), -1)
    seed = torch.zeros_like(logits)
    if isinstance(target, int):
        seed[:, target] = 1
    else:
        seed[:] = target
    named = {n: activations[n] for n in layers}
    try:
        grads = torch.autograd.grad(logits, list(named.values()), seed, allow_unused=True)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise ExportError(
            "PyTorch cannot differentiate the model, since an assignment in place overwrites what the gradient needs: "
            "write that step without it, or export the model to ONNX and pass the .onnx file "
            f"({first_line(error)[:200]})"
        ) from error
    return Record(
        logits.detach(),
        {n: a.detach() for n, a in named.items()},
        {n: torch.zeros_like(a) if g is None else g for (n, a), g in zip(named.items(), grads, strict=True)},
    )


class _NormsInOrder(TorchFunctionMode):
    """Makes the inputs and gradients of batch and instance norms contiguous: for channels-last gradients of a single
    image, PyTorch's backward passes confuse elements (PyTorch 2.13 on a CPU).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if function_name(func) not in ("batch_norm", "instance_norm") or not isinstance(args[0], torch.Tensor):
            return func(*args, **(kwargs or {}))
        output = func(args[0].contiguous(), *args[1:], **(kwargs or {}))
        if output.requires_grad:
            output.register_hook(lambda g: g.contiguous())
        return output


def eager_logits(model: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """A function that runs a float32 module in eval mode: image (1, C, H, W) -> its output."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def run(image: np.ndarray) -> np.ndarray:
        training = [m for m in model.modules() if m.training]
        model.eval()
        try:
            with torch.no_grad(), without_autocast():
                return model(torch.from_numpy(image).to(device)).cpu().numpy()
        finally:
            for module in training:
                module.training = True

    return run


def agreement(model: nn.Module, checker: Checker, graph: TappedGraph) -> None:
    """Compares the bundle's gradients of one image's top class with PyTorch's. ExportError if they differ; only a
    warning if the model has custom backward passes, which camrt does not use.
    """
    if not checker.gradients or checker.cotangent is None or checker.seed is None:
        return
    taps = [t for t, _ in graph.taps]
    names = [t.name for t in taps]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    cotangent, seed = (torch.from_numpy(a[:1]) for a in (checker.cotangent, checker.seed))
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with without_autocast():
            image = torch.from_numpy(checker.images[:1]).to(device)
            recorded = as_maps(record(model, image, cotangent.to(device), names), taps)
            pytorch_gradients = {n: g.cpu().numpy() for n, g in recorded.gradients.items()}
            check_gradients(
                checker.gradients,
                pytorch_gradients,
                own_gradients(model, image),
                lambda: _exact(model, image, cotangent.to(device), seed, graph),
            )
    finally:
        for module in training:
            module.training = True


def _exact(
    model: nn.Module, image: torch.Tensor, cotangent: torch.Tensor, seed: torch.Tensor, graph: TappedGraph
) -> dict[str, float]:
    """{layer: relative L2 distance} between the gradient program, run in float64, and PyTorch's autograd in float64;
    empty, with a warning, if the model does not run in float64. cotangent: of the model's scores; seed: of the logits.
    """
    from ..interpreter import Interpreter
    from ..programs import gradients

    taps = [t for t, _ in graph.taps]
    try:
        want = as_maps(record(model.double(), image.double(), cotangent.double(), [t.name for t in taps]), taps)
    except RuntimeError as error:  # code that casts to float32 by itself
        warnings.warn(
            "the model does not run in float64, so large differences of its float32 gradients were not checked "
            f"({first_line(error)})",
            stacklevel=6,
        )
        return {}
    finally:
        model.float()
    program = gradients(replace(graph, precision="float32"))
    names = [f"gradient:{t.name}" for t in taps]
    with torch.no_grad():
        program_gradients = Interpreter(program).run({"image": image.double().cpu(), "seed": seed.double()}, names)
    return {
        t.name: relative_l2(program_gradients[n].numpy(), want.gradients[t.name].cpu().numpy())
        for t, n in zip(taps, names, strict=True)
    }
