"""PyTorch module or exported program -> tapped ONNX graph."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import nn
from torch.export.unflatten import InterpreterModule

from ..runtime.errors import ExportError, first_line
from .graph import (
    OPSET,
    TappedGraph,
    batch_norm_after,
    check_logits,
    check_static,
    fix_sizes,
    modernise,
    named_values,
    strip_final_activation,
)
from .layouts import TAPPABLE, Layout, layouts, read_by_prefix_only, refuse_unread, tap_at
from .taps import check_names, choose

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


@dataclass(frozen=True)
class Modules:
    """Submodules whose output may hold a feature map, in the order in which they finish.

    outputs: name -> "" or why it cannot be tapped; blocks: those that may be the last block: the last module with children
    whose output is an image-like grid, and every layer norm over channels (transformers are tapped there).
    """

    outputs: dict[str, str]
    convolutions: list[str]
    blocks: list[str]


def spatial_modules(model: nn.Module, image: torch.Tensor) -> Modules:
    """Finds them in one forward pass. Pooling is no block."""
    outputs: dict[str, list[torch.Tensor]] = {}
    finished: list[str] = []

    def record(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.dim() in (3, 4):
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
    convolutions = [n for n in known if is_a(modules[n], _CONVOLUTIONS)]
    once = [n for n in finished if not known[n]]
    grids = [n for n in once if outputs[n][0].dim() == 4 and outputs[n][0].shape[2:].numel() > 1]
    parents = [n for n in grids if any(True for _ in modules[n].children())]
    blocks = [n for n in once if is_a(modules[n], (nn.LayerNorm,))]
    if not parents and not blocks:
        parents = [n for n in grids if not is_a(modules[n], _POOLING)]
    if parents:
        final = outputs[parents[-1]][0]
        blocks.append(next(n for n in parents if outputs[n][0] is final))
    return Modules(known, convolutions, [n for n in known if n in blocks])


def is_a(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
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
            modules = spatial_modules(model, image)
        except Exception as error:  # models check their input in many ways
            raise ExportError(
                f"the model does not run on an image of shape {tuple(input_shape)}: {first_line(error)}"
            ) from error
        by_role = modules.convolutions if layers in ("conv", "default") else []
        wanted = {*check_names(layers, modules.outputs), *by_role, *modules.blocks}
        traced = [n for n, problem in modules.outputs.items() if n in wanted and not problem]
        progress(f"tracing the model with {len(traced)} taps")
        exported = _to_onnx(_Recorder(model, traced), image)
    finally:
        for module in was_training:
            module.training = True
    progress("preparing the graph")
    return tap_outputs(exported, layers, modules, traced)


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


def tap_outputs(model: ir.Model, layers: str | Sequence[str], modules: Modules, traced: Sequence[str]) -> TappedGraph:
    """From a graph whose outputs are the model's and then those of the traced modules."""
    for i, output in enumerate(model.graph.outputs):
        output.name = f"camrt_output_{i}"
    model = modernise(model)
    fix_sizes(model, None)
    check_static(model.graph)
    output, *values = [_behind_identity(v) for v in model.graph.outputs]
    model.graph.outputs.clear()
    logits, final_activation = strip_final_activation(output)
    check_logits(logits)
    known = layouts(model.graph)
    blind = read_by_prefix_only(model.graph, known, logits)
    tensors = dict(zip(traced, values, strict=True))
    order = {y: i for i, node in enumerate(model.graph) for y in node.outputs}
    last = _last_block([n for n in modules.blocks if n in tensors], tensors, known, blind, order)
    named, left_out = check_names(layers, modules.outputs), []
    taps = []
    for name, roles in choose(layers, modules.convolutions, last, modules.outputs).items():
        if modules.outputs[name]:
            raise ExportError(f"layer {name!r} cannot be tapped: {modules.outputs[name]}; name the layers to explain")
        value = tensors[name]
        if value not in known or known[value].kind not in TAPPABLE:
            if name not in named:
                left_out.append(name)
                continue
            raise ExportError(
                f"layer {name!r} has output {value.shape}, which is not known to be a feature map "
                "(batch, channels, height, width), channels-last, or tokens of a grid: name other layers"
            )
        refuse_unread(name, value, blind)
        norm = "after" if batch_norm_after(value) else "none"
        taps.append((tap_at(name, roles, value, known[value], norm), str(value.name)))
    if left_out:
        warnings.warn(f"left out, because they are not known to be feature maps: {', '.join(left_out)}", stacklevel=4)
    if not taps:
        raise ExportError(f"layers={layers!r} finds no feature map in this model: name the layers to explain")
    assert logits.name in named_values(model.graph)
    return TappedGraph(model, str(logits.name), tuple(taps), final_activation)


def _last_block(
    blocks: Sequence[str],
    tensors: dict[str, ir.Value],
    known: dict[ir.Value, Layout],
    unread: set[ir.Value],
    order: dict[ir.Value, int],
) -> str | None:
    """The last of the blocks in the graph whose grid is larger than 1 x 1 and is read.

    None, with a warning, if a later block is not known to be a feature map: an earlier one would pass for the last.
    """

    def usable(name: str) -> bool:
        layout = known.get(tensors[name])
        return layout is not None and layout.kind in TAPPABLE and layout.grid != (1, 1)

    read = sorted((n for n in blocks if tensors[n] not in unread), key=lambda n: order.get(tensors[n], -1))
    for name in reversed(read):
        if usable(name):
            return name
        if tensors[name] not in known or known[tensors[name]].kind not in TAPPABLE:
            warnings.warn(
                f"the last block, {name!r}, is not known to be a feature map, so the bundle has no layer for the methods that "
                "explain it: name one",
                stacklevel=5,
            )
            return None
    return None


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
