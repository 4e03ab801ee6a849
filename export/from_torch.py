"""PyTorch module or exported program -> tapped ONNX graph."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir
import torch
from torch import nn
from torch.export.unflatten import InterpreterModule

from ..runtime.errors import ExportError, first_line
from ..runtime.manifest import Tap
from .graph import (
    OPSET,
    TappedGraph,
    batch_norm_after,
    check_logits,
    check_static,
    feature_maps,
    fix_sizes,
    grid_of,
    modernise,
    named_values,
    strip_final_activation,
)
from .taps import choose

_CONVOLUTIONS = (nn.Conv2d,)
_POOLING = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.Dropout,
)


class _Recorder(nn.Module):
    """Runs a model and returns (output, *outputs of the named submodules), each as it was when its module returned it."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        self.model = model
        self.names = list(names)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in self.names}
        with hooked(self.model, self.names, lambda name, output: seen[name].append(output.clone())):
            output = self.model(image)
        return (output, *(seen[name][0] for name in self.names))


@contextlib.contextmanager
def hooked(model: nn.Module, names: Sequence[str], seen: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Calls seen(name, output) whenever a named submodule returns."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen(name, output)

    modules = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for name in names:
            handle = modules[name].register_forward_hook(hook(name))
            stack.callback(handle.remove)
        yield


def spatial_modules(model: nn.Module, image: torch.Tensor) -> tuple[dict[str, str], list[str], str | None]:
    """One forward pass: (every submodule with one (B, C, h, w) output -> "" or why it cannot be tapped,
    the convolutions, the last block).

    The last block is the innermost module with children whose output is the last with a grid larger than 1 x 1; pooling
    does not count.
    """
    outputs: dict[str, list[torch.Tensor]] = {}
    finished: list[str] = []

    def record(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.dim() == 4:
            outputs.setdefault(name, []).append(output)
            finished.append(name)

    names = [n for n, _ in model.named_modules() if n]
    with torch.no_grad(), hooked(model, names, record):
        output = model(image)
    if not isinstance(output, torch.Tensor):
        raise ExportError(
            f"the model returns a {type(output).__name__}: camrt explains classifiers, whose output is one (batch, classes) tensor"
        )
    known = {
        n: "" if len(outputs[n]) == 1 else f"it runs {len(outputs[n])} times in one forward pass"
        for n in dict.fromkeys(finished)
    }
    modules = dict(model.named_modules())
    convolutions = [n for n in known if _is_a(modules[n], _CONVOLUTIONS)]
    grids = [n for n in finished if outputs[n][0].shape[2:].numel() > 1 and not known[n]]
    blocks = [n for n in grids if any(True for _ in modules[n].children())]
    if not blocks:
        blocks = [n for n in grids if not _is_a(modules[n], _POOLING)]
    last = None
    if blocks:
        final = outputs[blocks[-1]][0]
        last = next(n for n in blocks if outputs[n][0] is final)
    return known, convolutions, last


def _is_a(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is of one of the types, or stands for one in an unflattened torch.export program."""
    if isinstance(module, InterpreterModule):
        return module.type_name() in {f"{t.__module__}.{t.__qualname__}" for t in types}
    return isinstance(module, types)


def trace_module(
    model: nn.Module,
    input_shape: Sequence[int],
    layers: str | Sequence[str] = "default",
    progress: Callable[[str], None] = lambda _: None,
) -> TappedGraph:
    """Exports a module, in eval mode and float32, with hooks on the tapped layers.

    ExportError if its output is not (batch, classes) or a tapped module runs more than once; UnknownLayer.
    """
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        image = torch.zeros(2, *input_shape, device=device)
        try:
            known, convolutions, last = spatial_modules(model, image)
        except Exception as error:  # models check their input in many ways
            raise ExportError(
                f"the model does not run on an image of shape {tuple(input_shape)}: {first_line(error)}"
            ) from error
        roles = choose(layers, convolutions, last, known)
        for name in roles:
            if known[name]:
                raise ExportError(f"layer {name!r} cannot be tapped: {known[name]}; name the layers to explain")
        progress(f"tracing the model with {len(roles)} taps")
        exported = _to_onnx(_Recorder(model, list(roles)), image)
    finally:
        for module in was_training:
            module.training = True
    return tap_outputs(exported, roles, progress)


def _to_onnx(recorder: _Recorder, image: torch.Tensor) -> ir.Model:
    with quiet():
        try:
            batch = torch.export.Dim("batch")
            program = torch.export.export(recorder.eval(), (image,), dynamic_shapes=[{0: batch}], strict=False)
            _pool_by_mean(program)
            exported = torch.onnx.export(
                program, dynamo=True, input_names=["image"], opset_version=OPSET, verbose=False
            )
        except Exception as error:  # the exporter raises errors of many kinds
            cause = error.__cause__ or error
            raise ExportError(
                f"PyTorch could not export the model ({first_line(cause)}): "
                "export it to ONNX by other means and pass the .onnx file"
            ) from error
    assert exported is not None
    return exported.model


def _pool_by_mean(program: torch.export.ExportedProgram) -> None:
    """Writes global average pooling as the mean that it is.

    PyTorch's own decomposition adds an as_strided for channels-last tensors (ConvNeXt), which mixes the batch with the
    channels in the ONNX graph.
    """
    aten = torch.ops.aten
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target == aten.adaptive_avg_pool2d.default and all(n == 1 for n in node.args[1]):
            with graph.inserting_before(node):
                mean = graph.call_function(aten.mean.dim, (node.args[0], [-2, -1], True))
            mean.meta.update(node.meta)
            node.replace_all_uses_with(mean)
            graph.erase_node(node)
    program.graph_module.recompile()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporter's progress lines and deprecation notices from a user who can do nothing about them."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def tap_outputs(model: ir.Model, roles: dict[str, tuple[str, ...]], progress: Callable[[str], None]) -> TappedGraph:
    """A graph whose outputs are the logits and then the taps, in the order of `roles`."""
    progress("preparing the graph")
    for i, output in enumerate(model.graph.outputs):
        output.name = f"camrt_output_{i}"
    model = modernise(model)
    fix_sizes(model, None)
    check_static(model.graph)
    outputs = [_behind_identity(v) for v in model.graph.outputs]
    model.graph.outputs.clear()
    logits, final_activation = strip_final_activation(outputs[0])
    check_logits(logits)
    taps = []
    maps = feature_maps(model.graph)
    for (name, roles_of_tap), value in zip(roles.items(), outputs[1:], strict=True):
        grid = grid_of(value)
        if grid is None or value not in maps:
            raise ExportError(
                f"layer {name!r} has output {value.shape}, which is not known to be (batch, channels, height, width): "
                "name other layers"
            )
        taps.append((Tap(name, roles_of_tap, *grid, "after" if batch_norm_after(value) else "none"), str(value.name)))
    assert logits.name in named_values(model.graph)
    return TappedGraph(model, str(logits.name), tuple(taps), final_activation)


def _behind_identity(value: ir.Value) -> ir.Value:
    node = value.producer()
    while node is not None and node.op_type == "Identity":
        value = node.inputs[0]  # type: ignore[assignment]
        node = value.producer()
    return value


def weights_digest(model: nn.Module) -> str:
    """sha256 over the names and bytes of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
