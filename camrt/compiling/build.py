"""Continues a program of a bundle to one ONNX graph: image, target -> map, logits, layer weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from .. import __version__
from ..export.graph import tidy
from ..export.tape import Tape, output
from ..method_choice import MethodChoice, parse_method
from ..runtime.bundle.manifest import PRECISIONS, Manifest, Program, Tap
from ..runtime.bundle.reading import Bundle, read_bundle
from ..runtime.cams import method_named
from ..runtime.errors import BundleError, InputError, UnknownLayer, UnknownMethod, near
from .methods import COMPILED, Compiled, Source

LARGEST = 2**31 - 2**20  # bytes of a protocol buffer, with room for the graph


def compile_bundle(
    bundle: str | Path,
    out: str | Path,
    method: str | MethodChoice = "winsor_cam",
    layers: Sequence[str] | str | None = None,
    precision: str | None = None,
    batch: int | None = None,
) -> Path:
    """As `camrt.compile`."""
    opened, choice = read_bundle(bundle), parse_method(method) if isinstance(method, str) else method
    manifest, compiled = opened.manifest, _compiled(choice)
    if batch is not None and (batch < 1 or (manifest.batch == 1 and batch != 1)):
        raise InputError(f"batch {batch}: {'the bundle takes one image at a time' if batch > 1 else 'use 1 or more'}")
    chosen = _layers(manifest, choice.name, layers)
    if precision is not None and precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}: use {', '.join(PRECISIONS)}")
    if precision is not None and precision not in opened.precisions:
        raise InputError(f"{bundle} has no {precision} programs: export it with precision={precision!r}")
    program = opened.program(compiled.kind, [t.name for t in chosen], precision or opened.precisions[0])
    model = _continued(opened, program, compiled, choice, chosen)
    _describe(model, manifest, choice, [t.name for t in chosen], program.precision)
    if batch is not None:
        _fix_batch(model, batch)
    return _write(model, Path(out))


def _compiled(choice: MethodChoice) -> Compiled:
    """The row of a method. UnknownMethod for one that has none, or for an option or reading that a file cannot hold."""
    registered = method_named(choice.name)
    registered.check_options(choice.options)
    if choice.name not in COMPILED:
        raise UnknownMethod(f"{choice.name} cannot be compiled to one file: use {', '.join(COMPILED)}")
    compiled = COMPILED[choice.name]
    for option, value in choice.options.items():
        if option not in compiled.options or value not in compiled.values.get(option, (value,)):
            known = ", ".join(compiled.options) or "no options"
            raise UnknownMethod(f"{choice.name} in one file cannot have {option}={value!r}: it takes {known}")
    return compiled


def _layers(manifest: Manifest, method: str, layers: Sequence[str] | str | None) -> list[Tap]:
    wanted = method_named(method).layers if layers is None else layers
    if wanted is None:
        return []
    if wanted in ("conv", "last"):
        taps = [t for t in manifest.taps if wanted in t.roles]
        if not taps:
            raise UnknownLayer(f"{method} needs the layers {wanted!r}, which this bundle lacks: name layers")
        return taps
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    known = [t.name for t in manifest.taps]
    for name in names:
        if name not in known:
            raise UnknownLayer(f"the bundle has no layer {name!r}{near(name, known)}; 'camrt info' lists them")
    return [t for t in manifest.taps if t.name in names]


def _continued(
    bundle: Bundle, program: Program, compiled: Compiled, choice: MethodChoice, chosen: Sequence[Tap]
) -> ir.Model:
    model = ir.load(bundle.file(program))
    graph = model.graph
    for value in _values(graph):
        if value.shape is not None:  # one row of the seed for each image
            value.shape = ir.Shape("batch" if str(d) == "seeds" else d for d in value.shape)
    tape, manifest = Tape(graph), bundle.manifest
    inputs = {v.name: v for v in graph.inputs}
    target = _input("target", ir.DataType.INT64, inputs["image"])
    extra = {name: _input(name, ir.DataType.FLOAT, inputs["image"]) for name in compiled.inputs}
    classes = tape.constant(np.arange(manifest.num_classes, dtype=np.int64)[None])
    seed = tape.Cast(tape.Equal(tape.Unsqueeze(target, [1]), classes), to=ir.DataType.FLOAT)
    inputs["seed"].replace_all_uses_with(seed)  # no class is -1: a row of zeros, which means the top class
    if "ratio" in inputs:
        ratio = {"identity": 0.0, "exp": 1.0}[str(choice.options.get("smooth", "identity"))]
        inputs["ratio"].replace_all_uses_with(tape.floats(np.full((1, 1), ratio)))
    outputs = {str(v.name): v for v in graph.outputs}
    taps = [manifest.tap(name) for name in program.taps]
    size = manifest.input_shape[1:]
    source = Source(tape, outputs, taps, chosen, program.precision, extra, size)
    options = {name: value for name, value in choice.options.items() if name not in ("smooth", "reading")}
    maps, weights = compiled.build(source, **options)
    rows = inputs["image"].shape[0]  # type: ignore[index]
    rows = rows if isinstance(rows, int) else str(rows.value)
    finished = [output(tape, maps, "map", [rows, *size]), outputs["logits"]]
    if weights is not None:
        finished.append(output(tape, weights, "layer_weights", [rows, len(chosen)]))
    graph.inputs.clear()
    graph.inputs.extend([inputs["image"], target, *extra.values()])
    graph.outputs.clear()
    graph.outputs.extend(finished)
    return tidy(model)


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(y for node in graph for y in node.outputs)]


def _input(name: str, kind: ir.DataType, image: ir.Value) -> ir.Value:
    """One number for each image."""
    assert image.shape is not None
    return ir.Value(name=name, shape=ir.Shape([image.shape[0]]), type=ir.TensorType(kind))


def _fix_batch(model: ir.Model, batch: int) -> None:
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape(batch if str(d) == "batch" else d for d in value.shape)


def _describe(model: ir.Model, manifest: Manifest, choice: MethodChoice, layers: list[str], precision: str) -> None:
    """What a consumer must know: layers, classes, preprocessing, method, precision, version, as JSON."""
    recipe = json.loads(manifest.to_json())["preprocess"]
    described: dict[str, Any] = {
        "method": choice.name,
        "options": choice.options,
        "layers": layers,
        "classes": manifest.classes,
        "preprocess": recipe,
        "probabilities": manifest.probability,
        "model": manifest.name,
        "precision": precision,
        "version": __version__,
    }
    for name, value in described.items():
        model.metadata_props[f"camrt.{name}"] = json.dumps(value)
    model.producer_name, model.producer_version = "camrt", __version__


def _write(model: ir.Model, out: Path) -> Path:
    """In one step: a killed run leaves the old file or the new one."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    beside = out.with_name(f".{out.name}.new")
    try:
        if size > LARGEST:
            ir.save(model, beside, external_data=f"{out.name}.data")
        else:
            for name, value in model.graph.initializers.items():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value = ir.tensor(value.const_value.numpy(), name=name)
            ir.save(model, beside)
        beside.replace(out)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise BundleError(f"{out}: cannot be written ({error.strerror or error})") from None
    return out
