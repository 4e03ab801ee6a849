"""`export_model` and `export_onnx`: from a model to a bundle on disk."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import CamrtError, ExportError, InputError
from ..runtime.manifest import INTERPOLATIONS, PRECISIONS, Manifest, Preprocess

if TYPE_CHECKING:
    import torch

    from .graph import TappedGraph

Progress = Callable[[str], None]


def _silent(_: str) -> None:
    pass


def export_model(
    model: torch.nn.Module | torch.export.ExportedProgram,
    path: str | Path,
    input_shape: Sequence[int],
    layers: str | Sequence[str] = "default",
    *,
    precision: str | Sequence[str] = "fp32",
    name: str | None = None,
    classes: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    source: str | None = None,
    overwrite: bool = False,
    progress: Progress = _silent,
) -> Path:
    """Exports a PyTorch classifier, in eval mode and float32, and returns the bundle's path.

    input_shape: (channels, height, width). layers: "default" (every convolution and the last block), "conv", "last", or
    module names. precision: "fp32", "fp16" (mixed: see export/precision.py) or both, then a runtime chooses. classes: names in
    logit order. preprocess: how a picture becomes the input; without it the bundle takes preprocessed arrays only. progress is
    called with a line for every stage.

    ExportError: the output is not (batch, classes), or PyTorch cannot export the model. UnsupportedOperator: no gradient
    rule. UnknownLayer. BundleError: `path` exists or cannot be written.
    """
    check_packages("torch", "onnx", "onnxscript")
    import torch

    from .from_torch import trace_module, weights_digest

    shape = _shape(input_shape)
    if isinstance(model, torch.export.ExportedProgram):
        model = torch.export.unflatten(model)
    if not isinstance(model, torch.nn.Module):
        raise ExportError(f"export_model takes a torch.nn.Module, not {type(model).__name__}")
    _check_path(path, overwrite)
    _check_preprocess(preprocess, shape)
    precisions = _precisions(precision)
    graph = trace_module(model, shape, layers, progress)
    origin = {"kind": "torch", "spec": source, "weights_sha256": weights_digest(model)}
    label = name or type(model).__name__.lower()
    tools = ("torch", "onnx", "onnxscript")
    return _write(graph, precisions, path, label, origin, tools, classes, preprocess, overwrite, progress)


def export_onnx(
    model: str | Path,
    path: str | Path,
    layers: str | Sequence[str] = "default",
    *,
    input_shape: Sequence[int] | None = None,
    precision: str | Sequence[str] = "fp32",
    output: str | None = None,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    overwrite: bool = False,
    progress: Progress = _silent,
) -> Path:
    """Exports an ONNX classifier (opset 11 or later) and returns the bundle's path. PyTorch is not needed.

    layers: "default", "conv", "last", or names of nodes or tensors. input_shape: (channels, height, width), for a file
    whose sizes are dynamic. output: which of several outputs holds the logits. A final Softmax or Sigmoid is set aside:
    gradients are of the logits before it. Other arguments and errors as export_model.
    """
    check_packages("onnx", "onnxscript")
    from .from_onnx import read_graph, refuse_invalid

    _check_path(path, overwrite)
    precisions = _precisions(precision)
    origin = {"kind": "onnx", "spec": str(model), "output": output}
    label, tools = name or Path(model).stem, ("onnx", "onnxscript")
    try:
        graph = read_graph(model, None if input_shape is None else _shape(input_shape), layers, output, progress)
        return _write(graph, precisions, path, label, origin, tools, classes, preprocess, overwrite, progress)
    except CamrtError:
        raise
    except Exception:
        refuse_invalid(Path(model))
        raise


def _precisions(given: str | Sequence[str]) -> list[str]:
    """As programs record them. InputError for another."""
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if name not in PRECISIONS:
            raise InputError(f"precision {name!r}: use {', '.join(PRECISIONS)}")
    if not names:
        raise InputError(f"no precision was given: use {', '.join(PRECISIONS)}")
    return list(dict.fromkeys(PRECISIONS[name] for name in names))


def _write(
    graph: TappedGraph,
    precisions: Sequence[str],
    path: str | Path,
    name: str,
    source: dict[str, Any],
    packages: Sequence[str],
    classes: Sequence[str] | None,
    preprocess: Preprocess | None,
    overwrite: bool,
    progress: Progress,
) -> Path:
    from .bundle import write_bundle
    from .graph import check_logits, named_values
    from .programs import build_programs, seeds_share_image
    from .tape import static_dims

    values = named_values(graph.model.graph)
    count = check_logits(values[graph.logits])
    if classes is not None and len(classes) != count:
        raise ExportError(f"{len(classes)} class names for a network with {count} classes")
    shape = _shape(static_dims(graph.model.graph.inputs[0]))
    _check_preprocess(preprocess, shape)
    batch = values[graph.logits].shape
    assert batch is not None
    manifest = Manifest(
        name=name,
        source=source,
        tools={p: importlib.metadata.version(p) for p in ("camrt", *packages)},
        input_shape=shape,
        num_classes=count,
        taps=tuple(t for t, _ in graph.taps),
        programs=(),
        weights={},
        batch="dynamic" if not isinstance(batch[0], int) else 1,
        seeds_share_image=seeds_share_image(graph),
        final_activation=graph.final_activation,
        classes=None if classes is None else tuple(map(str, classes)),
        preprocess=preprocess,
    )
    programs = {}
    for precision in precisions:
        for built in build_programs(replace(graph, precision=precision), progress):
            programs.setdefault(built.file, built)
    return write_bundle(path, manifest, list(programs.values()), overwrite, progress)


def check_packages(*packages: str) -> None:
    """CamrtError names the packages of the export extra that are missing."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise CamrtError(f"export needs {', '.join(missing)}: pip install 'camrt[export]'")


def _shape(values: Sequence[int]) -> tuple[int, int, int]:
    shape = tuple(values)
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(f"input_shape {shape}: pass (channels, height, width)")
    return shape  # type: ignore[return-value]


def _check_path(path: str | Path, overwrite: bool) -> None:
    """Refuses an existing path before the long work starts."""
    from .bundle import check_target

    check_target(Path(path), overwrite)


def _check_preprocess(preprocess: Preprocess | None, shape: tuple[int, int, int]) -> None:
    """InputError if the recipe cannot give the network's input."""
    if preprocess is None:
        return
    for field in ("mean", "std"):
        if len(getattr(preprocess, field)) != shape[0]:
            raise InputError(
                f"preprocess {field} has {len(getattr(preprocess, field))} numbers for {shape[0]} channels"
            )
    if any(s == 0 for s in preprocess.std):
        raise InputError("preprocess std holds a zero")
    resize = preprocess.resize if isinstance(preprocess.resize, tuple) else (preprocess.resize,) * 2
    if any(not isinstance(n, int) or n < 1 for n in resize):
        raise InputError(f"preprocess resize {preprocess.resize}: sizes are whole numbers from 1")
    if preprocess.crop is not None and any(c > r for c, r in zip(preprocess.crop, resize, strict=True)):
        raise InputError(f"preprocess crop {preprocess.crop} is larger than resize {preprocess.resize}")
    if preprocess.interpolation not in INTERPOLATIONS:
        raise InputError(f"preprocess interpolation {preprocess.interpolation!r}: use {', '.join(INTERPOLATIONS)}")
    given = preprocess.crop if preprocess.crop is not None else preprocess.resize
    if isinstance(given, int) or tuple(given) != shape[1:]:
        raise InputError(f"preprocess gives {given}, the network takes {shape[1:]}: set crop, or resize without a crop")
