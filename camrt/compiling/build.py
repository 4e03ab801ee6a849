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
from ..method_choice import MethodChoice
from ..runtime.bundle.manifest import Manifest, Program, Tap
from ..runtime.bundle.reading import Bundle
from ..runtime.cams import method_named
from ..runtime.errors import BundleError, UnknownMethod
from .methods import COMPILED, Compiled, Source

LARGEST = 2**31 - 2**20  # bytes of a protocol buffer, with room for the graph


def compiled_method(choice: MethodChoice) -> Compiled:
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


def continued(
    bundle: Bundle, program: Program, compiled: Compiled, choice: MethodChoice, chosen: Sequence[Tap]
) -> ir.Model:
    """The program with the method's arithmetic behind it, and the finished map as its output. chosen: the layers."""
    model = ir.load(bundle.file(program))
    graph = model.graph
    rename_size(graph, "seeds", "batch")  # one row of the seed for each image
    tape, manifest = Tape(graph), bundle.manifest
    inputs = {str(v.name): v for v in graph.inputs}
    target = _input("target", ir.DataType.INT64, inputs["image"])
    extra = {name: _input(name, ir.DataType.FLOAT, inputs["image"]) for name in compiled.inputs}
    classes = tape.constant(np.arange(manifest.num_classes, dtype=np.int64)[None])
    seed = tape.Cast(tape.Equal(tape.Unsqueeze(target, [1]), classes), to=ir.DataType.FLOAT)
    inputs["seed"].replace_all_uses_with(seed)  # no class is -1: a row of zeros, which means the top class
    outputs = {str(v.name): v for v in graph.outputs}
    taps = [manifest.tap(name) for name in program.taps]
    size = manifest.input_shape[1:]
    source = Source(tape, inputs, outputs, taps, chosen, program.precision, extra, size)
    maps, weights = compiled.build(source, **choice.options)
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


def _input(name: str, kind: ir.DataType, image: ir.Value) -> ir.Value:
    """One number for each image."""
    assert image.shape is not None
    return ir.Value(name=name, shape=ir.Shape([image.shape[0]]), type=ir.TensorType(kind))


def rename_size(graph: ir.Graph, old: str, new: str | int) -> None:
    """Gives a symbolic size of all values another name, or a number."""
    for value in (*graph.inputs, *(y for node in graph for y in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(new if str(d) == old else d for d in value.shape)


def describe(model: ir.Model, manifest: Manifest, choice: MethodChoice, layers: Sequence[str], precision: str) -> None:
    """What a consumer must know: layers, classes, preprocessing, method, precision, version, as JSON."""
    recipe = json.loads(manifest.to_json())["preprocess"]
    described: dict[str, Any] = {
        "method": choice.name,
        "options": choice.options,
        "layers": [t.name for t in manifest.taps if t.name in layers],
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


def write(model: ir.Model, out: Path) -> Path:
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
