"""Keeps the places where a PyTorch model stops gradients (detach, no_grad, .data): PyTorch's ONNX exporter drops them.

A custom operator marks the places in the exported program. It becomes a node camrt::StopGradient of the ONNX graph,
which the autodiff does not pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from onnxscript import values
from torch import library
from torch.utils.checkpoint import CheckpointFunction

from ...runtime.errors import ExportError


@library.custom_op("camrt::stop_gradient", mutates_args=())
def stop_gradient(x: torch.Tensor) -> torch.Tensor:
    """x, whose gradient ends here."""
    return x.detach().clone()


@stop_gradient.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


MARK = torch.ops.camrt.stop_gradient.default
_Parameter = onnx.defs.OpSchema.FormalParameter
_SCHEMA = onnx.defs.OpSchema(
    "StopGradient",
    "camrt",
    1,
    inputs=[_Parameter("x", "T")],
    outputs=[_Parameter("y", "T")],
    type_constraints=[("T", ["tensor(float)"], "")],
)


def to_onnx(x: Any) -> Any:
    """How torch.onnx writes the mark."""
    return values.Op(values.Opset("camrt", 1), "StopGradient", _SCHEMA)(x)


def mark(program: torch.export.ExportedProgram) -> None:
    """Puts the mark behind every detach of what depends on the image, and behind what leaves a no_grad region.

    ExportError for a model that writes to a detached tensor in place: this changes the original, which an ONNX graph
    cannot represent.
    """
    module, aten = program.graph_module, torch.ops.aten
    graph = module.graph
    entries = {s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
    dependent = set()

    def mark_behind(node: torch.fx.Node) -> None:
        with graph.inserting_after(node):
            new = graph.call_function(MARK, (node,))
        new.meta.update(
            {k: v for k, v in node.meta.items() if k in ("val", "tensor_meta", "stack_trace", "nn_module_stack")}
        )
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        dependent.add(new)

    for node in list(graph.nodes):
        if node.op == "placeholder":
            if node.name in entries:
                dependent.add(node)
            continue
        if not any(x in dependent for x in node.all_input_nodes):
            continue
        dependent.add(node)
        if node.target in (aten.detach.default, aten.detach_.default):
            _refuse_writes(node)
            mark_behind(node)
        elif _is_without_gradient(node):
            _refuse_writes_inside(module, node)
            for user in list(node.users):
                value = user.meta.get("val")
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    mark_behind(user)
    graph.lint()
    module.recompile()


def _is_without_gradient(node: torch.fx.Node) -> bool:
    return node.target is torch.ops.higher_order.wrap_with_set_grad_enabled and node.args[0] is False


def _writes(node: torch.fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target is torch.ops.aten.detach_.default:
        return False
    return target._schema.is_mutable and target.__name__.split(".")[0].endswith("_")


def _refuse_writes(node: torch.fx.Node) -> None:
    for user in node.users:
        if _writes(user) and user.args[0] is node:
            raise ExportError(
                f"the model writes in place ({user.target}) to a tensor that it detached, and so changes the original "
                "unseen by autograd: write to a copy (.detach().clone()), or remove the write"
            )


def _refuse_writes_inside(module: torch.fx.GraphModule, node: torch.fx.Node) -> None:
    body = getattr(module, str(node.args[1].target))  # type: ignore[union-attr]
    for inner in body.graph.nodes:
        first = inner.args[0] if inner.args else None
        if _writes(inner) and isinstance(first, torch.fx.Node) and first.op == "placeholder":
            raise ExportError(
                f"the model writes in place ({inner.target}), in a no_grad block, to a tensor from outside it: write "
                "to a copy, or remove the write"
            )


@contextlib.contextmanager
def checkpoints_as_calls() -> Iterator[None]:
    """Inside the block, torch.utils.checkpoint's reentrant form is a plain call; otherwise it runs the forward pass
    under no_grad.
    """
    CheckpointFunction.apply = staticmethod(lambda function, preserve, *args: function(*args))  # type: ignore[method-assign]
    try:
        yield
    finally:
        del CheckpointFunction.apply


@contextlib.contextmanager
def symbolic_len() -> Iterator[None]:
    """Inside the block, len(tensor) returns the tensor's first size, which may be the symbolic batch."""
    import builtins

    plain = builtins.len

    def length(x: Any) -> Any:
        return x.shape[0] if isinstance(x, torch.Tensor) and x.dim() else plain(x)

    builtins.len = length  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.len = plain
