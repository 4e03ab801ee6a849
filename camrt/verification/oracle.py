"""The reference for a bundle: the model that it was made from, run by PyTorch in float64 and float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.bundle.kinds import Kind
from ..runtime.bundle.manifest import Tap
from ..runtime.bundle.reading import Bundle
from ..runtime.errors import CamrtError, ExportError

if TYPE_CHECKING:
    from ..export.pytorch.autograd import Record


@dataclass(frozen=True)
class Oracle:
    """The reference, in float64 (precise) or float32.

    record: (image (B, C, H, W), seed (B, classes), layers, precise) -> logits, activations and gradients; full_grad:
    (image, seed, precise) -> maps (B, H, W); norms: (image, taps with a norm behind them) -> {layer: the norm's output,
    as a tap under a name that `record` takes}, None if one was not found; own_backward: image -> names of the model's
    parts whose backward pass is not the derivative of their forward pass.
    """

    name: str
    record: Callable[[np.ndarray, np.ndarray, Sequence[str], bool], Record]
    full_grad: Callable[[np.ndarray, np.ndarray, bool], np.ndarray]
    norms: Callable[[np.ndarray, Sequence[Tap]], dict[str, Tap] | None]
    own_backward: Callable[[np.ndarray], Sequence[str]] = lambda _: ()


def module_oracle(model: Any, name: str) -> Oracle:
    """The reference from a float32 PyTorch module, with hooks and autograd.

    The module is cast to float64 and back to float32, which changes no weight.
    """
    import torch

    from ..export.pytorch.autograd import record
    from ..export.pytorch.modules import own_gradients
    from .method_runs import biases_of_module, norms_of_module
    from .method_runs import full_grad as full_grad_of

    model.eval()

    def in_precision(precise: bool, compute: Callable[..., Any], *arrays: np.ndarray) -> Any:
        kind = torch.float64 if precise else torch.float32
        try:
            return compute(model.to(kind), *(torch.from_numpy(a).to(kind) for a in arrays))
        finally:
            model.float()

    def run(image: np.ndarray, seed: np.ndarray, layers: Sequence[str], precise: bool) -> Record:
        return in_precision(precise, lambda m, x, s: record(m, x, s, layers), image, seed)

    def full(image: np.ndarray, seed: np.ndarray, precise: bool) -> np.ndarray:
        return in_precision(precise, lambda m, x, s: full_grad_of(x, *biases_of_module(m, x, s)).numpy(), image, seed)

    def norms(image: np.ndarray, taps: Sequence[Tap]) -> dict[str, Tap] | None:
        return in_precision(False, lambda m, x: norms_of_module(m, x, taps), image)

    return Oracle(name, run, full, norms, lambda image: own_gradients(model, torch.from_numpy(image)))


def graph_oracle(graph: Any, logits: str, taps: dict[str, str], name: str) -> Oracle:
    """The reference from an ONNX graph, run by PyTorch operators with autograd. taps: layer -> name of its value."""
    import torch

    from ..export.interpreter import Interpreter
    from ..export.pytorch.autograd import Record
    from .method_runs import full_grad as full_grad_of

    interpreters = {kind: Interpreter(graph, kind) for kind in (torch.float64, torch.float32)}
    behind = norms_in_graph(interpreters[torch.float64].model.graph, taps)
    values_by_name = taps | {_behind_norm(layer): str(value.name) for layer, (value, _) in behind.items()}

    def run(image: np.ndarray, seed: np.ndarray, layers: Sequence[str], precise: bool) -> Record:
        kind = torch.float64 if precise else torch.float32
        entry = str(interpreters[kind].model.graph.inputs[0].name)
        x = torch.from_numpy(image).to(kind).requires_grad_()
        names = [values_by_name[layer] for layer in layers]
        values = interpreters[kind].run({entry: x}, [logits, *names])
        tensors = [values[n] for n in names]
        grads = torch.autograd.grad(values[logits], tensors, torch.from_numpy(seed).to(kind))
        return Record(
            values[logits].detach(),
            dict(zip(layers, (t.detach() for t in tensors), strict=True)),
            dict(zip(layers, grads, strict=True)),
        )

    def full(image: np.ndarray, seed: np.ndarray, precise: bool) -> np.ndarray:
        kind = torch.float64 if precise else torch.float32
        interpreter = interpreters[kind]
        x = torch.from_numpy(image).to(kind).requires_grad_()
        points = interpreter.biased()
        values = interpreter.run({str(interpreter.model.graph.inputs[0].name): x}, [logits, *points])
        # leave out biases whose output does not depend on the image
        points = {n: b for n, b in points.items() if values[n].requires_grad}
        tensors = [values[n] for n in points]
        grads = torch.autograd.grad(values[logits], [x, *tensors], torch.from_numpy(seed).to(kind), allow_unused=True)
        biased = [(b, g) for b, g in zip(points.values(), grads[1:], strict=True) if g is not None]
        return full_grad_of(x.detach(), grads[0], biased).numpy()

    def norms(image: np.ndarray, taps: Sequence[Tap]) -> dict[str, Tap] | None:
        if not all(tap.name in behind for tap in taps):
            return None
        outputs = {}
        for tap in taps:
            layout = behind[tap.name][1]
            outputs[tap.name] = replace(tap, name=_behind_norm(tap.name), layout=layout.kind, prefix=layout.prefix)
        return outputs

    return Oracle(name, run, full, norms)


def norms_in_graph(graph: Any, taps: dict[str, str]) -> dict[str, tuple[Any, Any]]:
    """{layer: the output of the norm that alone reads it, and its layout}. taps: layer -> name of its value."""
    from ..export.graph import named_values
    from ..export.layers.layouts import layouts
    from ..export.layers.norms import behind_norm

    layout_by_value, values = layouts(graph), named_values(graph)
    outputs = {layer: behind_norm(values[name], layout_by_value) for layer, name in taps.items()}
    return {layer: (value, layout_by_value[value]) for layer, value in outputs.items() if value is not None}


def _behind_norm(layer: str) -> str:
    return f"{layer}, behind its norm"


def open_oracle(bundle: Bundle, source: str | None) -> Oracle:
    """The reference for a bundle: the model that it was made from, or the bundle's own forward graph.

    The own graph is used if the model is not available; if a PyTorch model ends in a Softmax or Sigmoid, because no
    module then returns the logits; or if the model does not run in float64. source: as for `camrt export`, by default
    what the bundle records. CamrtError if the source's weights are not those of the bundle; ExportError if there is no
    such file.
    """
    manifest = bundle.manifest
    spec = source or manifest.source.get("spec")
    if manifest.source["kind"] == "torch" and spec and (source or manifest.final_activation is None):
        from ..export.pytorch.from_torch import weights_digest
        from ..export.pytorch.modules import prepare_module
        from ..export.pytorch.sources import open_source

        model = prepare_module(open_source(spec).model, manifest.source.get("output"))
        if weights_digest(model) != manifest.source["weights_sha256"]:
            raise CamrtError(f"{spec} has other weights than the bundle: name the model that was exported")
        if manifest.final_activation is None and _runs_in_float64(model, manifest.input_shape):
            return module_oracle(model, f"{spec} in PyTorch")
    if manifest.source["kind"] == "onnx" and spec and Path(spec).is_file():
        from ..export.files.from_onnx import read_graph
        from ..export.graph import Attempt

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the export already gave these warnings
            layers, output = [t.name for t in manifest.taps], manifest.source["output"]
            graph = read_graph(spec, manifest.input_shape, layers, output, attempt=Attempt(manifest.batch == 1))
        taps = {tap.name: value for tap, value in graph.taps}
        return graph_oracle(graph.model, graph.logits, taps, f"{spec}, its operators run by PyTorch")
    if source and manifest.source["kind"] == "onnx":
        raise ExportError(f"{source}: no such file")
    return own_graph(bundle)


def _runs_in_float64(model: Any, shape: Sequence[int]) -> bool:
    """Whether the model runs in float64: its code may require float32."""
    import torch

    try:
        with torch.no_grad():
            model.eval().double()(torch.zeros(2, *shape, dtype=torch.float64))
        return True
    except RuntimeError:
        return False
    finally:
        model.float()


def own_graph(bundle: Bundle) -> Oracle:
    """The reference from the bundle's own forward graph."""
    model, taps = own_forward(bundle)
    name = "the bundle's own forward graph, its operators run by PyTorch"
    return graph_oracle(model, "logits", taps, name)


def own_forward(bundle: Bundle) -> tuple[Any, dict[str, str]]:
    """The bundle's forward graph with every layer, and the names of the layers' values."""
    import onnx_ir as ir

    program = max((p for p in bundle.manifest.programs if p.kind == Kind.ACTIVATIONS), key=lambda p: len(p.taps))
    model = ir.load(bundle.file(program))
    behind = {str(n.outputs[0].name): str(n.inputs[0].name) for n in model.graph if n.op_type == "Identity"}  # type: ignore[union-attr]
    producers = {str(y.name): n for n in model.graph for y in n.outputs}
    taps = {}
    for name in program.taps:
        tap, value = bundle.manifest.tap(name), behind[f"activation:{name}"]
        for _ in range({"NCHW": 0, "NHWC": 1, "tokens": 2, "LND": 3}[tap.layout] + bool(tap.prefix)):
            value = str(producers[value].inputs[0].name)  # type: ignore[union-attr]  # back through the change of layout
        taps[name] = value
    return model, taps
