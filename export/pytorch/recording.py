"""Every tensor of a PyTorch module's forward pass by name: in an eager run, while tracing, and as the reference.

Names are those of torchvision's feature extraction: a module's qualified name; for a function, the name of the module
that calls it, a dot and the function's name; and _1, _2 for further calls: layer4.2.relu, layer4.2.relu_1. Functions
that torch.nn's own modules call have no names; the modules have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.export.unflatten import InterpreterModule
from torch.overrides import TorchFunctionMode

from ...runtime.errors import ExportError
from .modules import unwrapped
from .stop_gradient import stop_gradient

Visit = Callable[[str, torch.Tensor], torch.Tensor]

_OPERATORS = {
    "iadd": "add",
    "radd": "add",
    "imul": "mul",
    "rmul": "mul",
    "isub": "sub",
    "rsub": "sub",
    "itruediv": "truediv",
}


@contextlib.contextmanager
def recording(model: nn.Module, visit: Visit, tracing: bool = False) -> Iterator[None]:
    """Inside the block, every tensor that a module or function of the model's forward pass returns is replaced by
    visit(name, tensor).

    Only single floating-point tensors are visited. tracing: for torch.export, which does not record .data and
    inference_mode: a StopGradient mark is put where they stop gradients. ExportError if the model assigns to .data.
    """
    model = unwrapped(model)
    stack: list[tuple[str, nn.Module]] = [("", model)]

    # torch.export makes one object per name of a shared module; these objects share one __dict__
    modules = {id(module.__dict__): (name, module) for name, module in reversed([*model.named_modules()])}
    reserved = {name for name, _ in modules.values()}
    taken: set[str] = set()

    def named(name: str, is_module: bool) -> str:
        n, free = 0, name
        while free in taken or (free in reserved and not (is_module and n == 0)):
            n += 1
            free = f"{name}_{n}"
        taken.add(free)
        return free

    def seen(name: str, output: object, is_module: bool = False) -> object:
        if isinstance(output, torch.Tensor) and output.is_floating_point() and ".parametrizations." not in f".{name}.":
            return visit(named(name, is_module), output)
        return output

    with contextlib.ExitStack() as exits:
        for name, module in modules.values():
            if not name:
                continue
            enter = module.register_forward_pre_hook(lambda m, _, name=name: stack.append((name, m)))

            def leave(module: nn.Module, args: object, output: object) -> object:
                return seen(stack.pop()[0], output, is_module=True)

            for handle in (enter, module.register_forward_hook(leave)):
                exits.callback(handle.remove)
        exits.enter_context(_Functions(stack, seen, tracing))
        yield


class _Functions(TorchFunctionMode):
    def __init__(
        self, stack: list[tuple[str, nn.Module]], seen: Callable[[str, object], object], tracing: bool
    ) -> None:
        super().__init__()
        self._stack = stack
        self._seen = seen
        self._tracing = tracing

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self._tracing and getattr(func, "__self__", None) is torch.Tensor.data:
            if func.__name__ != "__get__":
                raise ExportError(
                    "the model assigns to .data of a tensor, which torch.export does not record: assign to the tensor "
                    "itself"
                )
            return stop_gradient(args[0])
        output = func(*args, **(kwargs or {}))
        stopped = torch.is_inference_mode_enabled() and isinstance(output, torch.Tensor) and output.is_floating_point()
        if self._tracing and stopped:
            output = stop_gradient(output)
        scope, module = self._stack[-1]
        name = function_name(func)
        if _is_torchs_own(module) or name.startswith("get_") or not name:
            return output
        return self._seen(f"{scope}.{name}" if scope else name, output)


def function_name(func: object) -> str:
    """A function's plain name: "relu" for torch.relu, Tensor.relu_ and torch.ops.aten.relu.default; "add" for +=; ""
    for access to an attribute.
    """
    name = str(getattr(func, "__name__", "")).split(".")[0]
    if name in ("__get__", "__set__") or name.startswith("_has"):
        return ""
    name = name.strip("_")
    return _OPERATORS.get(name, name)


def _is_torchs_own(module: nn.Module) -> bool:
    """Whether a module is one of torch.nn's own, which count as single operators. Containers, and modules from a .pt2
    file, do not count.
    """
    return type(module).__module__.startswith(("torch.nn.modules", "torch.nn.utils")) and not isinstance(
        module, nn.Sequential | nn.ModuleList | nn.ModuleDict | InterpreterModule
    )
