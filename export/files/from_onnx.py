"""Any ONNX classifier -> tapped graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ...runtime.backends.one_file import Run, open_file
from ...runtime.errors import BundleError, ExportError, first_line
from ..check import Logits
from ..graph import FIRST, Attempt, TappedGraph, batch_norm_after
from ..layers.layouts import tap_at
from ..layers.logits import find_logits
from ..layers.normalized import normalized_image
from ..layers.reads import refuse_unread
from ..layers.taps import ROLES, choose, feature_maps, is_finished, not_a_map, warn_of_no_last
from ..tape import dims, made_by
from .onnx_file import computes_in_half, modernise, read_model
from .prepare import channels_first, settle, take_numbers_as_float


def read_graph(
    path: str | Path,
    input_shape: Sequence[int] | None = None,
    layers: str | Sequence[str] = "default",
    output: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
    attempt: Attempt = FIRST,
) -> TappedGraph:
    """Reads an ONNX file into a tapped graph. layers: a role, or names of nodes or of the tensors that they compute.

    input_shape: (channels, height, width), for a file whose sizes are dynamic; output: the name of the output that
    holds the logits; attempt: what earlier attempts showed. ExportError if the file is not ONNX, is no classifier of
    images, or has several outputs and none was chosen. UnknownLayer.
    """
    path = Path(path)
    progress(f"reading {path.name}")
    model = read_model(path)
    _keep_output(model, output)
    names = _layer_names(model.graph)
    rounded = computes_in_half(model)
    model = modernise(model)
    _leave_unused_inputs(model.graph)
    channels_first(model, input_shape)
    whole_numbers = take_numbers_as_float(model)
    batch = settle(model, input_shape, attempt.pinned)
    rounded = rounded or any("QuantizeLinear" in n.op_type for n in model.graph)
    logits, final_activation = find_logits(model.graph)
    model.graph.outputs.clear()

    maps = feature_maps(model.graph, logits, attempt.without_gradient or ())
    layouts, last = maps.known, maps.last
    spatial = {names.get(str(y.name), str(y.name)): y for y in maps.reachable if y in layouts}
    by_value = {y: n for n, y in spatial.items()}
    aliases = {str(y.name): n for n, y in spatial.items()}
    convolutions = [n for n, y in spatial.items() if made_by(y, "Conv")]
    others = {n: y for y in maps.reachable if y not in by_value for n in (str(y.name), names.get(str(y.name)))}
    for name in [layers] if isinstance(layers, str) else layers:
        if name in others and name not in {*spatial, *aliases, *ROLES}:
            raise not_a_map(name, others[name])
    resolved_layers = (
        layers if isinstance(layers, str) else [aliases.get(n, n) if n not in spatial else n for n in layers]
    )
    last_name = None if last is None else by_value[last]
    deeper = by_value.get(maps.deeper) if maps.deeper is not None else None
    roles = choose(
        resolved_layers, convolutions, last_name, spatial, lambda n: is_finished(spatial[n]), maps.without_last, deeper
    )
    taps = []
    for name, roles_of_tap in roles.items():
        y = spatial[name]
        refuse_unread(name, y, maps.unread)
        norm = "after" if batch_norm_after(y) else "none"
        taps.append((tap_at(name, roles_of_tap, y, layouts[y], norm), str(y.name)))
    warn_of_no_last(layers, last_name, maps.without_last)
    normalized = normalized_image(model.graph, layouts, logits)
    return TappedGraph(
        model, str(logits.name), tuple(taps), final_activation, last_name, normalized, batch, whole_numbers, rounded
    )


def source_logits(path: Path, output: str | None, graph: TappedGraph) -> Logits:
    """A function that runs the untouched file with ONNX Runtime: image (1, C, H, W) -> its output (1, ...), or None,
    with a warning, if ONNX Runtime cannot run the file.
    """
    model = onnx.load(str(path), load_external_data=False).graph
    constants = {t.name for t in model.initializer}
    inputs = [v for v in model.input if v.name not in constants]
    used = {name for node in model.node for name in node.input}
    entry = next((v for v in inputs if v.name in used), inputs[0])
    others = {v.name: _zeros(v) for v in inputs if v is not entry}  # which nothing reads, but ONNX Runtime asks for
    shape = [d.dim_value if d.dim_value > 0 else None for d in entry.type.tensor_type.shape.dim]
    kind = onnx.helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
    image_shape = dims(graph.model.graph.inputs[0])
    turned = [d for d in shape[1:] if d is not None] != [
        d for d, s in zip(image_shape[1:], shape[1:], strict=True) if s is not None
    ]
    output_name = output or model.output[0].name
    opened: list[Run | None] = []

    def run(image: np.ndarray) -> np.ndarray | None:
        if turned:
            image = image.transpose(0, 2, 3, 1)
        fed = np.repeat(image, shape[0] or 1, axis=0).astype(kind)
        try:
            if not opened:
                opened.append(open_file(path))
            if opened[0] is None:
                return None
            scores = opened[0]({entry.name: fed, **others})[output_name]
            return scores.reshape(1, -1) if len(fed) == 1 else scores[:1]
        except BundleError as error:
            opened[:] = [None]
            warnings.warn(
                f"ONNX Runtime cannot run the source, so its logits were not compared ({error})", stacklevel=2
            )
            return None

    return run


def refuse_invalid(path: Path) -> None:
    """ExportError if ONNX's own checker rejects the file. For use after a failure: the checker also rejects files that
    can be exported.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"{path}: not a valid ONNX model ({first_line(error)[:200]})") from error


def _zeros(value: onnx.ValueInfoProto) -> np.ndarray:
    kind = value.type.tensor_type
    sizes = [d.dim_value if d.dim_value > 0 else 1 for d in kind.shape.dim]
    return np.zeros(sizes, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))


def _leave_unused_inputs(graph: ir.Graph) -> None:
    """Removes the inputs that no node reads, if at least one input is read."""
    unused = [v for v in graph.inputs if not v.uses() and not v.is_graph_output()]
    if len(unused) < len(graph.inputs):
        for value in unused:
            graph.inputs.remove(value)


def _keep_output(model: ir.Model, output: str | None) -> None:
    outputs = model.graph.outputs
    listed = ", ".join(f"{v.name} {'' if v.shape is None else v.shape}".strip() for v in outputs)
    names = [str(v.name) for v in outputs]
    if output is None and len(outputs) != 1:
        raise ExportError(f"the model has {len(outputs)} outputs ({listed}): choose the logits with output=, --output")
    if output is not None and output not in names:
        raise ExportError(f"the model has no output {output!r}: it has {listed}")
    logits = outputs[names.index(output)] if output is not None else outputs[0]
    outputs.clear()
    outputs.append(logits)


def _layer_names(graph: ir.Graph) -> dict[str, str]:
    """Tensor name -> the name of the node that computes it, where that is set and unique."""
    count: dict[str, int] = {}
    for node in graph:
        if node.name:
            count[node.name] = count.get(node.name, 0) + 1
    return {str(n.outputs[0].name): n.name for n in graph if n.name and n.outputs and count[n.name] == 1}
