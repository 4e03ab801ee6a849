"""PyTorch module or exported program -> tapped ONNX graph."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import optimizer, rewriter
from torch import nn
from torch.export.unflatten import InterpreterModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...runtime.errors import ExportError, UnsupportedOperator, first_line
from ..files.onnx_file import OPSET, modernise
from ..files.prepare import settle
from ..graph import FIRST, Attempt, TappedGraph, batch_norm_after, run_passes
from ..layers.layouts import tap_at
from ..layers.logits import find_logits
from ..layers.normalized import normalized_image
from ..layers.reads import refuse_unread
from ..layers.taps import check_names, choose, feature_maps, is_finished, not_a_map, nothing_to_tap, warn_of_no_last
from ..tape import made_by
from .modules import backward_functions, backward_nodes, module_of, unwrapped, without_autocast
from .readings import Reading, ReadingsGiven, ReadingsNoted
from .recording import recording
from .rewrites import rewrite_operators
from .stop_gradient import MARK, checkpoints_as_calls, mark, symbolic_len, to_onnx

_CONVOLUTIONS = (nn.Conv2d,)
_NEAR_THE_END = 24  # the last tensor on a grid is first searched among this many tensors at the end of the pass


class _Recorder(nn.Module):
    """Runs a model and returns (output, *tensors of the given names), each cloned when it was computed. readings: the
    numbers that an eager run read (see readings.py).
    """

    def __init__(self, model: nn.Module, names: Sequence[str], readings: Sequence[Reading]):
        super().__init__()
        self.model = model
        self.names = list(names)
        self.readings = list(readings)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen: dict[str, torch.Tensor] = {}
        names = set(self.names)

        def visit(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name in names:
                seen[name] = tensor.clone()
            return tensor

        with recording(self.model, visit, tracing=True), ReadingsGiven(self.readings):
            output = self.model(image)
        return (output, *(seen[name] for name in self.names))


@dataclass
class Forward:
    """What an eager run of a model computes.

    shapes: of every tensor that may hold a feature map, by name, in the order in which they are computed;
    convolutions: those of modules and calls that convolve; modules: those that a module returns; blocks: those that a
    module with children returns; read: those that the output's gradient reaches; own_gradients: classes of
    torch.autograd.Function with a backward pass of their own; readings: the numbers that its code read (see
    readings.py).
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    convolutions: list[str] = field(default_factory=list)
    blocks: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    own_gradients: list[str] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)


def run_forward(model: nn.Module, image: torch.Tensor) -> Forward:
    """Runs the model once; it returns a single tensor."""
    forward, modules = Forward(), dict(unwrapped(model).named_modules())
    functions = {}

    def visit(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() in (3, 4):
            forward.shapes[name] = tuple(tensor.shape)
            functions[name] = tensor.grad_fn
            module = module_of(name, modules)
            if module is not None:
                forward.modules.add(name)
                if any(True for _ in module.children()):
                    forward.blocks.add(name)
            is_call = module is None and name.split(".")[-1].startswith(("conv2d", "convolution"))
            if is_call or (module is not None and is_a(module, _CONVOLUTIONS)):
                forward.convolutions.append(name)
        return tensor

    image = image.detach().clone().requires_grad_()
    noted = ReadingsNoted([*model.parameters(), *model.buffers()])
    with torch.enable_grad(), recording(model, visit), noted:
        output = model(image)
    assert isinstance(output, torch.Tensor)
    forward.readings = noted.readings
    forward.own_gradients = backward_functions(output)
    reached = backward_nodes(output)
    forward.read = {name for name, function in functions.items() if function in reached}
    return forward


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
    attempt: Attempt = FIRST,
) -> TappedGraph:
    """Traces a module, in eval mode and float32, into a tapped graph. input_shape: (channels, height, width); attempt:
    what earlier attempts showed.

    ExportError if the output is not (batch, classes), or a layer is not a feature map; NotTraced if PyTorch cannot
    export the model; UnsupportedOperator if no gradient reaches a named layer; UnknownLayer.
    """
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        image = torch.zeros(1 if attempt.pinned else 2, *input_shape, device=device)
        with without_autocast():
            forward = run_forward(model, image)
        for name in forward.own_gradients:
            warnings.warn(
                f"{name} has a backward pass of its own: camrt differentiates its forward pass; where those differ, "
                "as in a straight-through estimator, so do the maps (camrt verify shows it)",
                stacklevel=4,
            )
        check_names(layers, forward.shapes)
        for near_the_end in (_NEAR_THE_END, len(forward.shapes)):
            names = _to_trace(forward, layers, near_the_end)
            progress("tracing the model")
            exported = _to_onnx(_Recorder(model, names, forward.readings), image, attempt.pinned)
            progress("preparing the graph")
            graph = tap_outputs(exported, layers, forward, names, attempt)
            if graph is not None:
                return graph
    finally:
        for module in was_training:
            module.training = True
    raise AssertionError("with every tensor traced, the last on a grid is among them")


def _to_trace(forward: Forward, layers: str | Sequence[str], near_the_end: int) -> list[str]:
    """Tensors that are named, convolutions, and those near the end, in the order in which they are computed."""
    grids = [n for n, shape in forward.shapes.items() if len(shape) == 3 or shape[2] * shape[3] > 1]
    traced_names = {*check_names(layers, forward.shapes), *forward.convolutions, *grids[-near_the_end:]}
    return [n for n in forward.shapes if n in traced_names]


def _to_onnx(recorder: _Recorder, image: torch.Tensor, pinned: bool) -> ir.Model:
    # attention by the math kernel: other decompositions fail under a free batch
    with quiet(), without_autocast(), checkpoints_as_calls(), sdpa_kernel(SDPBackend.MATH):
        try:
            shapes = None if pinned else [{0: torch.export.Dim("batch")}]
            with symbolic_len():
                program = torch.export.export(recorder.eval(), (image,), dynamic_shapes=shapes, strict=False)
            rewrite_operators(program)
            mark(program)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["image"],
                opset_version=OPSET,
                verbose=False,
                optimize=False,
                custom_translation_table={MARK: to_onnx},
            )
            assert exported is not None
            return _simplified(exported.model)
        except ExportError:
            raise
        except Exception as error:  # the exporter raises errors of many kinds
            cause = error.__cause__ or error
            message, way = first_line(cause), "export it to ONNX by other means and pass the .onnx file"
            if "data-dependent" in message:
                message = f"an if, a loop or a size depends on computed numbers: {message}"
                way = "write that part with torch.where, or take it out of the model"
            raise NotTraced(f"PyTorch could not export the model ({message}): {way}") from error


def _simplified(model: ir.Model) -> ir.Model:
    """Optimises as the exporter does, but does not merge equal nodes: two calls of one module on one tensor have
    separate gradients.
    """
    optimizer.inline(model)
    for _ in range(2):
        optimizer.fold_constants(model)
        rewriter.rewrite(model)
    return model


class NotTraced(ExportError):
    """torch.export or torch.onnx could not follow the model."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporter's progress lines and deprecation notices from a user who can do nothing about them."""
    names = ("torch.onnx", "torch.export", "torch.fx", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def tap_outputs(
    model: ir.Model, layers: str | Sequence[str], forward: Forward, traced: Sequence[str], attempt: Attempt
) -> TappedGraph | None:
    """Makes the tapped graph of a model whose outputs are the model's own output and then the tensors `traced`. None if
    the last tensor on a grid was not traced.
    """
    _name_nodes(model.graph)
    taken = {v.name for v in (*model.graph.inputs, *model.graph.initializers.values())}
    for output, name in zip(model.graph.outputs, ("logits", *traced), strict=True):
        if name not in taken and not output.is_initializer():
            output.name = name  # for messages
    run_passes(model, passes.NameFixPass())
    model = modernise(model)
    for node in model.graph:
        node.domain = ""  # StopGradient's
    stops = [n for n in model.graph if n.op_type == "StopGradient" and not n.inputs[0].is_initializer()]  # type: ignore[union-attr]
    if stops:
        warnings.warn(
            f"the model stops gradients (detach, no_grad or .data) in {len(stops)} places: camrt's gradients stop "
            "there as PyTorch's do",
            stacklevel=4,
        )
    batch = settle(model, None, attempt.pinned)
    output, *values = [_behind_identity(v) for v in model.graph.outputs]
    model.graph.outputs.clear()
    model.graph.outputs.append(output)
    logits, final_activation = find_logits(model.graph)
    model.graph.outputs.clear()
    maps = feature_maps(model.graph, logits, attempt.without_gradient or ())
    layouts, last = maps.known, maps.last
    tensors = dict(zip(traced, values, strict=True))
    named = check_names(layers, forward.shapes)
    last_name = _name_of(last, tensors, forward) if last is not None else None
    if last is not None and last_name is None and len(traced) < len(forward.shapes):
        return None
    read = {tensors[n] for n in forward.convolutions if n in tensors and n in forward.read}
    convolved = [
        n for n in forward.convolutions if n in tensors and (n in forward.read or n in named or tensors[n] not in read)
    ]
    of_modules = {tensors[n] for n in convolved if n in forward.modules}
    convolutions = [n for n in convolved if n in forward.modules or tensors[n] not in of_modules]
    left_out, without_gradient, taps = [], [], []
    deeper = _name_of(maps.deeper, tensors, forward) if maps.deeper is not None else None
    unread = last is not None and (made_by(last, "StopGradient") or any(v is last for v in tensors.values()))
    without_last = maps.without_last or (
        "no gradient reaches the last tensor on a grid, which the logits read only through detach or no_grad"
        if unread
        else "the last tensor on a grid has no name in the model"
    )
    roles = choose(
        layers, convolutions, last_name, forward.shapes, lambda n: is_finished(tensors[n]), without_last, deeper
    )
    for name, of_tap in roles.items():
        value = tensors[name]
        if value not in layouts:
            if name not in named:
                left_out.append(name)
                continue
            raise not_a_map(name, value)
        if value not in maps.reachable or name not in forward.read:
            if name in named:
                raise UnsupportedOperator(
                    f"no gradient reaches layer {name!r}: the logits do not read it, or only through detach or "
                    "no_grad: choose another layer"
                )
            without_gradient.append(name)
            continue
        refuse_unread(name, value, maps.unread)
        norm = "after" if batch_norm_after(value) else "none"
        taps.append((tap_at(name, of_tap, value, layouts[value], norm), str(value.name)))
    if left_out:
        warnings.warn(f"skipped, because they are not known to be feature maps: {', '.join(left_out)}", stacklevel=4)
    if without_gradient:
        warnings.warn(
            "skipped, because no gradient reaches them (the logits read them only through detach or no_grad): "
            f"{', '.join(without_gradient)}",
            stacklevel=4,
        )
    if not taps:
        raise nothing_to_tap(layers, without_last)
    warn_of_no_last(layers, last_name, without_last)
    normalized = normalized_image(model.graph, layouts, logits)
    return TappedGraph(model, str(logits.name), tuple(taps), final_activation, last_name, normalized, batch)


def _name_nodes(graph: ir.Graph) -> None:
    """Names nodes by the module that they belong to, for messages: layer1.0.conv1, layer1.0.add."""
    for node in graph:
        with contextlib.suppress(ValueError, SyntaxError):
            scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
            modules = [s for s in scopes[:-1] if s]
            if scopes:
                node.name = ".".join([*modules[-1:], scopes[-1]]).removeprefix("model.")


def _name_of(value: ir.Value, tensors: Mapping[str, ir.Value], forward: Forward) -> str | None:
    """What PyTorch calls a tensor: the first block that returns it, else the first module, else the first function."""
    names = [n for n, v in tensors.items() if v is value and n in forward.read]
    for preferred in (forward.blocks, forward.modules, forward.shapes):
        name = next((n for n in names if n in preferred), None)
        if name is not None:
            return name
    return None


def _behind_identity(value: ir.Value) -> ir.Value:
    node = value.producer()
    while node is not None and node.op_type == "Identity":
        value = node.inputs[0]  # type: ignore[assignment]
        node = value.producer()
    return value


def weights_digest(model: nn.Module) -> str:
    """sha256 over the names and bytes of a module's parameters and buffers, and of whatever else its state holds."""
    digest = hashlib.sha256()
    for name, value in sorted(unwrapped(model).state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            data = value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
            digest.update(data.contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(pickle.dumps(value))
    return digest.hexdigest()
