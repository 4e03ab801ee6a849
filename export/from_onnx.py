"""Any ONNX classifier -> tapped graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from ..runtime.errors import ExportError, first_line
from .autodiff import on_path
from .graph import (
    TappedGraph,
    batch_norm_after,
    channels_first,
    check_logits,
    check_static,
    check_windows,
    fix_sizes,
    modernise,
    strip_final_activation,
)
from .layouts import TAPPABLE, layouts, read_by_prefix_only, refuse_unread, tap_at
from .taps import choose

_POOLING = {"AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "Pad", "Dropout"}


def read_graph(
    path: str | Path,
    input_shape: Sequence[int] | None = None,
    layers: str | Sequence[str] = "default",
    output: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> TappedGraph:
    """Reads an ONNX file. Layers are named by node, or by the tensor that a node computes.

    ExportError if the file is not ONNX, has several outputs and none was chosen, or does not fit; UnknownLayer.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    progress(f"reading {path.name}")
    try:
        model = ir.load(path)
    except Exception as error:
        raise ExportError(f"{path}: not readable as ONNX ({first_line(error)})") from error
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            _check_beside(path, str(value.const_value.location))
        try:
            assert value.const_value is not None
            value.const_value.numpy()
        except Exception as error:
            raise ExportError(
                f"{path}: its tensor {value.name!r:.100} is damaged ({first_line(error)[:100]})"
            ) from error
    _keep_output(model, output)
    names = _layer_names(model.graph)
    model = modernise(model)
    channels_first(model)
    fix_sizes(model, input_shape)
    check_static(model.graph)
    check_windows(model.graph)
    logits, final_activation = strip_final_activation(model.graph.outputs[0])
    check_logits(logits)
    model.graph.outputs.clear()

    known = layouts(model.graph)
    blind = read_by_prefix_only(model.graph, known, logits)
    reachable = on_path(model.graph, list(model.graph.inputs), logits)
    spatial = {}
    for node in model.graph:
        y = node.outputs[0]
        if y in reachable and y in known and known[y].kind in TAPPABLE:
            spatial[names.get(str(y.name), str(y.name))] = y
    convolutions = [n for n, y in spatial.items() if _producer(y) == "Conv"]
    grids = [
        n for n, y in spatial.items() if known[y].grid != (1, 1) and y not in blind and _producer(y) not in _POOLING
    ]
    last = grids[-1] if grids else None
    if last is not None and known[spatial[last]].kind == "tokens":  # a transformer is tapped at a layer norm
        last = next((n for n in reversed(grids) if _producer(spatial[n]) == "LayerNormalization"), last)
    aliases = {str(y.name): n for n, y in spatial.items()}
    wanted = layers if isinstance(layers, str) else [aliases.get(n, n) if n not in spatial else n for n in layers]
    roles = choose(wanted, convolutions, last, spatial)
    taps = []
    for name, roles_of_tap in roles.items():
        y = spatial[name]
        refuse_unread(name, y, blind)
        norm = "after" if batch_norm_after(y) else "none"
        taps.append((tap_at(name, roles_of_tap, y, known[y], norm), str(y.name)))
    return TappedGraph(model, str(logits.name), tuple(taps), final_activation)


def refuse_invalid(path: Path) -> None:
    """ExportError if the file is not a model by ONNX's own checker, which does not accept all that can be exported."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"{path}: not a valid ONNX model ({first_line(error)[:200]})") from error


def _check_beside(path: Path, location: str) -> None:
    """ExportError unless weights lie in a file beside the ONNX file, or below."""
    place = Path(location)
    if place.is_absolute() or ".." in place.parts:
        raise ExportError(f"{path}: its weights lie in {location!r}, outside its folder: move them beside it")
    if not (path.parent / place).is_file():
        raise ExportError(f"{path}: its weights lie in {location!r}, which is missing beside it")


def _producer(value: ir.Value) -> str:
    node = value.producer()
    return node.op_type if node is not None else ""


def _keep_output(model: ir.Model, output: str | None) -> None:
    outputs = model.graph.outputs
    names = [str(v.name) for v in outputs]
    if output is None and len(outputs) != 1:
        raise ExportError(
            f"the model has {len(outputs)} outputs ({', '.join(names)}): choose the logits with output=, --output"
        )
    if output is not None and output not in names:
        raise ExportError(f"the model has no output {output!r}: it has {', '.join(names)}")
    kept = outputs[names.index(output)] if output is not None else outputs[0]
    outputs.clear()
    outputs.append(kept)


def _layer_names(graph: ir.Graph) -> dict[str, str]:
    """Tensor name -> the name of the node that computes it, where that is set and unique."""
    count: dict[str, int] = {}
    for node in graph:
        if node.name:
            count[node.name] = count.get(node.name, 0) + 1
    return {str(n.outputs[0].name): n.name for n in graph if n.name and count[n.name] == 1}
