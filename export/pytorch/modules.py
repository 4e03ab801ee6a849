"""PyTorch models as users bring them -> a module in float32 that returns one tensor."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...runtime.errors import ExportError, first_line


class OutputSelector(nn.Module):
    """One named part of what a model returns: an attribute, a key or a position."""

    def __init__(self, model: nn.Module, output: str | int) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return _part(self.model(image), self.output)


def module_of(name: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The module that returned a recorded tensor, by the tensor's name, without the suffix _1, _2 of later calls; None
    for a function.
    """
    return modules.get(name) or modules.get(name.rstrip("0123456789").removesuffix("_"))


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, without the OutputSelector around it."""
    return model.model if isinstance(model, OutputSelector) else model


def _part(model_output: Any, output: str | int) -> Any:
    if isinstance(model_output, Mapping) and output in model_output:
        return model_output[output]
    if isinstance(output, str) and not output.isdecimal():
        if not isinstance(model_output, torch.Tensor) and hasattr(model_output, output):
            return getattr(model_output, output)
    elif isinstance(model_output, Sequence) and int(output) < len(model_output):
        return model_output[int(output)]
    if isinstance(model_output, torch.Tensor):
        raise ExportError(
            f"the model returns one tensor {tuple(model_output.shape)}, without a part {output!r}: leave output=, "
            "--output out"
        )
    raise ExportError(
        f"the model returns a {type(model_output).__name__} of {_listed(model_output)}, without a part {output!r}"
    )


def prepare_module(model: Any, output: str | None = None) -> nn.Module:
    """Removes wrappers (DataParallel, torch.compile), copies a model of another precision to float32, and selects one
    output.

    ExportError for a model that torch.export cannot trace; it says what to pass instead.
    """
    if isinstance(model, torch.export.ExportedProgram):
        model = torch.export.unflatten(model)
    scripted = isinstance(model, nn.Module) and any(isinstance(m, torch.jit.ScriptModule) for m in model.modules())
    if scripted:
        raise ExportError(
            "the model is, or holds, TorchScript, which torch.export does not trace: pass the nn.Module that it was "
            "made from, or export it to ONNX with torch.onnx.export(..., dynamo=False) and pass the .onnx file"
        )
    if not isinstance(model, nn.Module):
        raise ExportError(f"export_model takes a torch.nn.Module, not {type(model).__name__}")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        else:
            break
    if getattr(model, "_compiled_call_impl", None) is not None:  # model.compile()
        model = copy.copy(model)
        model._compiled_call_impl = None
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        if compiled or hasattr(module.forward, "_torchdynamo_orig_callable"):
            raise ExportError(
                f"{f'layer {name!r}' if name else 'forward'} is compiled (torch.compile), which torch.export cannot "
                "trace: pass the model without torch.compile"
            )
    if any(torch.nn.parameter.is_lazy(p) for p in (*model.parameters(), *model.buffers())):
        raise ExportError("the model has lazy layers without weights yet: run it on an image once, then export it")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ExportError(
                f"layer {name!r} normalises each image by its whole batch (track_running_stats=False), so that one "
                "image's logits depend on the others: train with running statistics, or explain one image at a time "
                "from an ONNX file with batch 1"
            )
    kinds = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    if kinds - {torch.float32}:
        names = ", ".join(sorted(str(k).removeprefix("torch.") for k in kinds - {torch.float32}))
        warnings.warn(f"the model computes in {names}: it is read as float32", stacklevel=4)
        model = copy.deepcopy(model).float()
    return model if output is None else OutputSelector(model, output)


def check_output(model: nn.Module, input_shape: Sequence[int]) -> None:
    """ExportError if a model does not run on images (2, *input_shape), or does not return a single tensor; the message
    then lists the parts of its output.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            model_output = model(torch.zeros(2, *input_shape, device=device))
    except ExportError:
        raise
    except Exception as error:  # models check their input in many ways
        raise ExportError(
            f"the model does not run on images of shape {tuple(input_shape)}: {type(error).__name__}: "
            f"{first_line(error)[:300]}"
        ) from error
    finally:
        for module in training:
            module.training = True
    if isinstance(model_output, torch.Tensor):
        return
    raise ExportError(
        f"the model returns a {type(model_output).__name__} of {_listed(model_output)}: name the one that holds the "
        "logits with output=, --output"
    )


def _listed(model_output: Any) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in _tensors(model_output)) or "no tensors"


def _tensors(model_output: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(model_output, Mapping):
        items: Any = model_output.items()
    elif dataclasses.is_dataclass(model_output) and not isinstance(model_output, type):
        items = [(f.name, getattr(model_output, f.name)) for f in dataclasses.fields(model_output)]
    elif isinstance(model_output, tuple) and hasattr(model_output, "_fields"):
        items = zip(getattr(model_output, "_fields"), model_output, strict=True)  # noqa: B009
    elif isinstance(model_output, Sequence):
        items = enumerate(model_output)
    else:
        items = []
    for name, value in items:
        if isinstance(value, torch.Tensor):
            yield str(name), value


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """torch.autocast inside a model is left out: everything stays float32."""
    enter = torch.autocast.__enter__

    def disabled(self: torch.autocast) -> torch.autocast:
        self._enabled = False
        return enter(self)

    torch.autocast.__enter__ = disabled  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


def own_gradients(model: nn.Module, image: torch.Tensor) -> list[str]:
    """Names of the torch.autograd.Function classes (custom backward passes) that the gradient of a model's output
    passes, for images (B, C, H, W).
    """
    with torch.enable_grad():
        return backward_functions(model(image.detach().clone().requires_grad_()))


def backward_functions(output: torch.Tensor) -> list[str]:
    """As `own_gradients`, from what the model returned."""
    names = set()
    for node in backward_nodes(output):
        if isinstance(node, torch.autograd.function.BackwardCFunction) and not type(node).__name__.startswith(
            "Checkpoint"
        ):
            names.add(type(node).__name__.removesuffix("Backward"))
    return sorted(names)


def backward_nodes(output: torch.Tensor) -> set[Any]:
    """Everything that autograd's backward pass from the output goes through."""
    pending, nodes = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            pending += [n for n, _ in node.next_functions]
    return nodes
