"""Continues a program of a bundle to one ONNX graph: image, target -> map, logits, layer weights."""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from .. import __version__
from ..export.graph import tidy
from ..export.tape import Tape, output
from ..method_choice import MethodChoice
from ..runtime.bundle.kinds import Kind
from ..runtime.bundle.manifest import Manifest, Tap
from ..runtime.bundle.reading import Bundle
from ..runtime.cams import method_named
from ..runtime.errors import BundleError, InputError, UnknownMethod
from .inlining import Inliner
from .methods import COMPILED
from .opset import convert
from .pictures import Picture, network_input, overlay_of_input, overlay_of_picture, picture_of
from .source import Compiled, Source, top_class

WHY_NOT = {
    "eigen_cam": "it decomposes a matrix, for which ONNX has no operator",
    "ablation_cam": "it runs the network once for each channel that is not zero, and a file would run it for all",
}
OPSET, IR_VERSION = 18, 10  # of what follows a network
LARGEST = 2**31 - 2**20  # bytes of a protocol buffer, with room for the graph


def compiled_method(choice: MethodChoice) -> Compiled:
    """The row of a method. UnknownMethod for one that has none, or for an option or reading that a file cannot hold."""
    registered = method_named(choice.name)
    registered.check_options(choice.options)
    if choice.name not in COMPILED:
        why = f": {WHY_NOT[choice.name]}" if choice.name in WHY_NOT else ""
        raise UnknownMethod(f"{choice.name} cannot be compiled to one file{why}: use {', '.join(COMPILED)}")
    compiled = COMPILED[choice.name]
    for option, value in choice.options.items():
        if option not in compiled.options or value not in compiled.values.get(option, (value,)):
            known = ", ".join(compiled.options) or "no options"
            allowed = ", ".join(map(str, compiled.values[option])) if option in compiled.values else ""
            use = f"use {allowed}" if allowed else f"it takes {known}"
            raise UnknownMethod(f"{choice.name} in one file cannot have {option}={value!r}: {use}")
    return compiled


@dataclass(frozen=True)
class Form:
    """What a file takes and gives, beside its method. picture: None for preprocessed images; (H, W) for uint8 pictures
    of this size; "free" for those of any size. overlay: None, or the colour map of a drawn picture, with its opacity.
    masks: of one run of the network; batch: None if the number of images is free; opset: None for the bundle's own.
    """

    picture: tuple[int, int] | str | None = None
    overlay: str | None = None
    opacity: float = 0.5
    masks: int = 1
    batch: int | None = None
    opset: int | None = None


def masks_of(manifest: Manifest) -> int:
    """How many masked images the network takes in one run, if nobody says."""
    return 1 if manifest.batch == 1 else 16


@dataclass(frozen=True)
class _Start:
    """A file that is begun: the network, explained for the target. inputs: the file's, in their order; extra: those of
    the method; is_named (batch, 1): whether the target is a class; picture: None for preprocessed images.
    """

    model: ir.Model
    source: Source
    inputs: list[ir.Value]
    extra: Mapping[str, ir.Value]
    is_named: ir.Value
    picture: Picture | None

    @property
    def batch(self) -> int | str:
        shape = self.inputs[0].shape
        assert shape is not None
        size = shape[0]
        return size if isinstance(size, int) else str(size)

    def finished(self, outputs: Sequence[ir.Value], form: Form) -> ir.Model:
        graph = self.model.graph
        graph.inputs.clear()
        graph.inputs.extend(self.inputs)
        graph.outputs.clear()
        graph.outputs.extend(outputs)
        if form.batch is not None:
            rename_size(graph, "batch", form.batch)
        tidy(self.model)
        if form.opset is not None:
            convert(self.model, form.opset)
            tidy(self.model)  # what became an attribute is no constant any more
        return self.model


def _start(
    bundle: Bundle, compiled: Compiled, choice: MethodChoice, chosen: Sequence[Tap], precision: str, form: Form
) -> _Start:
    names, manifest = [t.name for t in chosen], bundle.manifest
    program = bundle.program(compiled.kind, names[:1] if compiled.kind == Kind.TRUNK else names, precision)
    model = ir.load(bundle.file(program))
    graph = model.graph
    rename_size(graph, "seeds", "batch")  # one row of the seed for each image
    tape, inputs = Tape(graph), {str(v.name): v for v in graph.inputs}
    image, outputs = inputs["image"], {str(v.name): v for v in graph.outputs}
    assert image.shape is not None
    batch = image.shape[0]

    def new_input(name: str, kind: ir.DataType, *sizes: int | str) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape([batch, *sizes]), type=ir.TensorType(kind))

    entry, picture = image, None
    if form.picture is not None:
        size = None if isinstance(form.picture, str) else form.picture
        entry = new_input("picture", ir.DataType.UINT8, *(size or ("height", "width")), 3)
        picture = picture_of(tape, entry, size, manifest, f"{bundle.path}")
        ready = network_input(tape, picture, manifest)
        image.replace_all_uses_with(ready)
        image = ready
    target = new_input("target", ir.DataType.INT64)
    extra = {name: new_input(name, ir.DataType.FLOAT) for name in compiled.inputs}
    numbers = tape.constant(np.arange(manifest.num_classes, dtype=np.int64)[None])
    named = tape.Cast(tape.Equal(tape.Unsqueeze(target, [1]), numbers), to=ir.DataType.FLOAT)
    is_named = tape.Greater(tape.ReduceMax(named, [1], keepdims=1), tape.floats(0))
    explained = tape.Where(is_named, named, top_class(tape, outputs["logits"], manifest.num_classes))
    inline, numbers_of_runs = Inliner(graph), itertools.count()

    def run(
        kind: Kind, feeds: Mapping[str, ir.Value], layers: Sequence[str] = (), into: ir.Graph = graph
    ) -> dict[str, ir.Value]:
        other = ir.load(bundle.file(bundle.program(kind, layers, precision)))
        rename_size(other.graph, "batch", f"runs_{next(numbers_of_runs)}")  # engines take equal names for equal sizes
        return inline(other, feeds, into)

    taps = [manifest.tap(name) for name in program.taps]
    named_inputs = {"image": image} | extra
    source = Source(tape, manifest, outputs, taps, chosen, program.precision, named_inputs, explained, form.masks, run)
    feeds = {"seed": explained} | ({} if compiled.feeds is None else compiled.feeds(source, **choice.options))
    for name, value in feeds.items():
        if name in inputs:
            inputs[name].replace_all_uses_with(value)
    return _Start(model, source, [entry, target], extra, is_named, picture)


def one_file(
    bundle: Bundle, compiled: Compiled, choice: MethodChoice, chosen: Sequence[Tap], precision: str, form: Form
) -> ir.Model:
    """The method's program, with its arithmetic behind it and the finished map as its output. chosen: the layers."""
    start = _start(bundle, compiled, choice, chosen, precision, form)
    tape, source, batch = start.source.tape, start.source, start.batch
    maps, weights = compiled.build(source, **choice.options)
    # a class that does not exist, or a percentile that is no number, gives zeros: no map is better than a wrong one
    exists = tape.Or(start.is_named, tape.Unsqueeze(tape.Equal(start.inputs[1], tape.value(-1)), [1]))
    for number in start.extra.values():
        exists = tape.And(exists, tape.Unsqueeze(tape.Equal(number, number), [1]))
    maps = tape.Where(tape.Unsqueeze(exists, [2]), maps, tape.floats(0))
    outputs = [output(tape, maps, "map", [batch, *source.size]), source.outputs["logits"]]
    if weights is not None:
        weights = tape.Where(exists, weights, tape.floats(0))
        outputs.append(output(tape, weights, "layer_weights", [batch, len(chosen)]))
    if form.overlay is not None:
        drawing = form.overlay, form.opacity
        if start.picture is None:
            sizes, over = source.size, overlay_of_input(tape, source.inputs["image"], maps, source.manifest, *drawing)
        else:
            shape = start.inputs[0].shape
            assert shape is not None
            sizes, over = shape[1:3], overlay_of_picture(tape, start.picture, maps, *drawing)
        outputs.append(output(tape, over, "overlay", [batch, *sizes, 3], ir.DataType.UINT8))
    start.inputs.extend(start.extra.values())
    return start.finished(outputs, form)


def network_part(
    bundle: Bundle, compiled: Compiled, choice: MethodChoice, chosen: Sequence[Tap], precision: str, form: Form
) -> ir.Model:
    """The method's program for a target, without the arithmetic behind it: finish_part takes its outputs."""
    start = _start(bundle, compiled, choice, chosen, precision, form)
    return start.finished(list(start.source.outputs.values()), form)


def finish_part(
    bundle: Bundle, compiled: Compiled, choice: MethodChoice, chosen: Sequence[Tap], precision: str
) -> ir.Model:
    """What follows the network: its outputs for one image, but the logits, and the method's further inputs -> map and
    layer weights. A map can be retuned with it without another run of the network.
    """
    manifest = bundle.manifest
    program = bundle.program(compiled.kind, [t.name for t in chosen], precision)

    def of_one(name: str, *sizes: int) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape([1, *sizes]), type=ir.TensorType(ir.DataType.FLOAT))

    outputs = {name: of_one(name, *shape[1:]) for name, shape in program.outputs.items() if name != "logits"}
    extra = {name: of_one(name) for name in compiled.inputs}
    graph = ir.Graph([*outputs.values(), *extra.values()], [], nodes=[], name="finish", opset_imports={"": OPSET})
    tape = Tape(graph)
    taps = [manifest.tap(name) for name in program.taps]
    source = Source(tape, manifest, outputs, taps, chosen, program.precision, extra)
    maps, weights = compiled.build(source, **choice.options)
    graph.outputs.append(output(tape, maps, "map", [1, *source.size]))
    if weights is not None:
        graph.outputs.append(output(tape, weights, "layer_weights", [1, len(chosen)]))
    return tidy(ir.Model(graph, ir_version=IR_VERSION))


def rename_size(graph: ir.Graph, old: str, new: str | int) -> None:
    """Gives a symbolic size of all values another name, or a number; also where it is a part of a size, as 4*batch."""

    def renamed(size: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(size, int) or size.value is None or old not in size.free_symbols():
            return size if isinstance(size, int) else size.value
        if isinstance(new, int):
            found = size.evaluate({old: new})
            return found if isinstance(found, int) else None
        return re.sub(rf"\b{re.escape(old)}\b", new, size.value)

    nodes = ir.traversal.RecursiveGraphIterator(graph)
    for value in (*graph.inputs, *(y for node in nodes for y in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(map(renamed, value.shape))


def describe(
    model: ir.Model, manifest: Manifest, choice: MethodChoice, chosen: Sequence[Tap], precision: str, form: Form
) -> None:
    """What a consumer must know: layers, classes, preprocessing, method, precision, version, as JSON."""
    recipe = json.loads(manifest.to_json())["preprocess"]
    described: dict[str, Any] = {
        "method": choice.name,
        "options": choice.options,
        "layers": [t.name for t in chosen],
        "classes": manifest.classes,
        "preprocess": recipe,
        "probabilities": manifest.probability,
        "model": manifest.name,
        "weights": manifest.weights["sha256"],
        "precision": precision,
        "version": __version__,
        "input": "image: preprocessed, float32" if form.picture is None else "picture: RGB, uint8, preprocessed inside",
        "target": "a class number, -1 for the top class; the map of any other number is zero",
    }
    if "percentile" in (v.name for v in model.graph.inputs):
        described["percentile"] = "0 to 100; values outside are clamped; not a number gives a map of zeros"
    if form.overlay is not None:
        described["overlay"] = {"colormap": form.overlay, "opacity": form.opacity}
    for name, value in described.items():
        model.metadata_props[f"camrt.{name}"] = json.dumps(value)
    model.producer_name, model.producer_version = "camrt", __version__


def write(model: ir.Model, out: Path) -> Path:
    """In one step: a killed run leaves the old file, the new one, or none. BundleError if it cannot be written."""
    if out.exists() and not out.is_file():
        raise InputError(f"{out}: is no file: name one that ends in .onnx")
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    data = out.with_name(f"{out.name}.data")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            beside = Path(folder) / out.name
            if size > LARGEST:
                ir.save(model, beside, external_data=data.name)
                out.unlink(missing_ok=True)  # it must not stand beside weights that are not its own
                beside.with_name(data.name).replace(data)
            else:
                for name, value in model.graph.initializers.items():
                    if isinstance(value.const_value, ir.ExternalTensor):
                        value.const_value = ir.tensor(value.const_value.numpy(), name=name)
                ir.save(model, beside)
            beside.replace(out)
    except OSError as error:
        raise BundleError(f"{out}: cannot be written ({error.strerror or error})") from None
    return out
