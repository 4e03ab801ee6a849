"""`export_model` and `export_onnx`: from a model to a bundle on disk."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import install
from ..runtime.bundle.kinds import Kind
from ..runtime.bundle.manifest import MASK_PRECISIONS, Manifest, Normalized, Preprocess, check_activation, check_recipe
from ..runtime.errors import CamrtError, ExportError, InputError

if TYPE_CHECKING:
    import torch

    from .check import Checker, Logits
    from .graph import Attempt, TappedGraph
    from .programs import BuiltProgram

Progress = Callable[[str], None]
Calibration = np.ndarray | Callable[[Manifest], np.ndarray]
Complete = Callable[[Path, Manifest, Progress], Manifest]


def _silent(_: str) -> None:
    pass


def export_model(
    model: torch.nn.Module | torch.export.ExportedProgram,
    path: str | Path,
    input_shape: Sequence[int],
    layers: str | Sequence[str] = "default",
    *,
    precision: str | Sequence[str] = "fp32",
    calibration: Calibration | None = None,
    output: str | None = None,
    activation: str | None = None,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    source: str | None = None,
    shuffle_weights: int | None = None,
    overwrite: bool = False,
    progress: Progress = _silent,
    complete: Complete | None = None,
) -> Path:
    """Exports a PyTorch classifier, in eval mode and float32, and returns the bundle's path.

    input_shape: (channels, height, width). layers: "default" (every convolution and the last block), "conv", "last",
    or names of modules and of functions that modules call, written as in torchvision's feature extraction
    (layer4.2.relu_2). precision: "fp32", "fp16" (mixed: see export/precision.py), "int8" or several; camrt.load then
    chooses one. "int8" adds a program for the masked images of ScoreCAM++ and Score-CAM to those of "fp32".
    calibration: for "int8", images (N, C, H, W) float32 as the network takes them, or a function that makes them from
    the manifest; ten or more, of the kind that will be explained.
    output: the attribute, key or position of the logits, where the model returns several things. activation: "softmax"
    or "sigmoid", the function that turns the logits into probabilities. classes: names in logit order. preprocess: how
    a picture becomes the input; without it the bundle takes preprocessed arrays only. shuffle_weights: a seed; the
    bundle is then of a copy whose weights are in random order, for `camrt evaluate --other-weights`. progress is called
    with one line per stage. complete(folder, manifest, progress): called at the end with the folder that will be moved
    to `path`; it may add files and returns the manifest, e.g. camrt.store_references.

    At the end ONNX Runtime opens every program and runs it on two images (on one where the batch is fixed at 1). A
    bundle that differs from the model is not written. ExportError: the output is not (batch, classes), PyTorch cannot
    export the model, or the bundle differs from it. UnsupportedOperator: an operator has no gradient rule.
    UnknownLayer. InputError: an argument does not fit. BundleError: `path` exists or cannot be written.
    """
    check_packages("torch", "onnx", "onnxscript")
    from .check import RowsMixed
    from .pytorch.autograd import agreement, eager_logits
    from .pytorch.from_torch import NotTraced, trace_module, weights_digest
    from .pytorch.modules import check_output, prepare_module
    from .shuffled import shuffled_module

    shape = _shape(input_shape)
    module = prepare_module(model, output)
    if shuffle_weights is not None:
        module, source = shuffled_module(module, shuffle_weights), None
    _check_path(path, overwrite)
    check_recipe(preprocess, shape)
    check_activation(activation)
    label = name or type(model).__name__.lower()
    precisions = _precisions(precision, calibration)
    facts = _Facts(path, label, "torch", precisions, activation, classes, preprocess, overwrite, calibration, complete)

    def build(attempt: Attempt) -> TappedGraph:
        try:
            return trace_module(module, shape, layers, progress, attempt)
        except NotTraced as problem:
            if attempt.pinned:
                raise
            raise RowsMixed(str(problem)) from problem

    check_output(module, shape)
    origin = {"kind": "torch", "spec": source, "output": output, "weights_sha256": weights_digest(module)}
    return _export(build, facts, origin, lambda _: eager_logits(module), lambda c, g: agreement(module, c, g), progress)


def export_onnx(
    model: str | Path,
    path: str | Path,
    layers: str | Sequence[str] = "default",
    *,
    input_shape: Sequence[int] | None = None,
    precision: str | Sequence[str] = "fp32",
    calibration: Calibration | None = None,
    output: str | None = None,
    activation: str | None = None,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    shuffle_weights: int | None = None,
    overwrite: bool = False,
    progress: Progress = _silent,
    complete: Complete | None = None,
) -> Path:
    """Exports an ONNX classifier (opset 9 or later) and returns the bundle's path. PyTorch is not needed.

    layers: "default", "conv", "last", or names of nodes or tensors. input_shape: (channels, height, width), for a file
    whose sizes are dynamic. output: the name of the output that holds the logits, where the file has several. A final
    Softmax, Sigmoid or LogSoftmax is removed: gradients are those of the logits before it. Other arguments and errors
    as export_model.
    """
    check_packages("onnx", "onnxscript")
    from .files.from_onnx import read_graph, refuse_invalid, source_logits
    from .shuffled import shuffled_file

    _check_path(path, overwrite)
    check_activation(activation)
    label = name or Path(model).stem
    precisions = _precisions(precision, calibration)
    facts = _Facts(path, label, "onnx", precisions, activation, classes, preprocess, overwrite, calibration, complete)
    origin = {"kind": "onnx", "spec": str(model) if shuffle_weights is None else None, "output": output}
    sizes = None if input_shape is None else _shape(input_shape)
    with tempfile.TemporaryDirectory(prefix="camrt-") as folder:
        try:
            file = Path(model)
            if shuffle_weights is not None:
                file = shuffled_file(file, Path(folder), shuffle_weights)
            return _export(
                lambda attempt: read_graph(file, sizes, layers, output, progress, attempt),
                facts,
                origin,
                lambda graph: source_logits(file, output, graph),
                lambda checker, graph: None,
                progress,
            )
        except CamrtError:
            raise
        except Exception:
            refuse_invalid(Path(model))
            raise


@dataclass(frozen=True)
class _Facts:
    """What a user says of a bundle."""

    path: str | Path
    name: str
    kind: str
    precisions: list[str]
    activation: str | None
    classes: Sequence[str] | None
    preprocess: Preprocess | None
    overwrite: bool
    calibration: Calibration | None
    complete: Complete | None


def _precisions(precisions: str | Sequence[str], calibration: Calibration | None) -> list[str]:
    """The precisions as programs record them ("float32", "float16", "int8"), without repeats; "float32" before "int8".

    InputError for an unknown one, or for none; for int8 without calibration, and for calibration without int8.
    """
    names = [precisions] if isinstance(precisions, str) else list(precisions)
    for name in names:
        if name not in MASK_PRECISIONS:
            raise InputError(f"precision {name!r}: use {', '.join(MASK_PRECISIONS)}")
    if not names:
        raise InputError(f"no precision was given: use {', '.join(MASK_PRECISIONS)}")
    if ("int8" in names) != (calibration is not None):
        raise InputError("int8 needs calibration= (--calibration PICTURES), and nothing else does")
    if "int8" in names and "fp32" not in names:
        names = ["fp32", *names]
    return list(dict.fromkeys(MASK_PRECISIONS[name] for name in names))


def _export(
    build: Callable[[Attempt], TappedGraph],
    facts: _Facts,
    origin: dict[str, Any],
    source: Callable[[TappedGraph], Logits],
    agree: Callable[[Checker, TappedGraph], None],
    progress: Progress,
) -> Path:
    """Builds, checks and writes a bundle; where an attempt fails, tries again with batch 1, without the program that
    failed, or with an earlier last layer.

    build(attempt): the graph; `attempt` says what earlier attempts showed. source(graph): a function from an image to
    the untouched model's output. agree(checker, graph): further comparisons, after the programs have run.
    """
    from .check import NotFinite, NothingRead, RowsMixed, zero_gradients
    from .graph import Attempt
    from .layers.logits import BatchElsewhere

    attempt, reason = Attempt(), ""
    while True:
        graph = None
        try:
            graph = build(attempt)
            if reason:
                warnings.warn(f"the bundle explains one image at a time (batch 1): {reason}", stacklevel=3)
                reason = ""
            return _write(graph, facts, origin, source(graph), agree, progress, attempt)
        except (RowsMixed, BatchElsewhere) as problem:
            if attempt.pinned:
                raise ExportError(str(problem)) from problem
            attempt, reason = replace(attempt, pinned=True), str(problem)
        except NotFinite as problem:
            message = f"{problem} (a root, for example, has no gradient at 0): the bundle is written without it"
            warnings.warn(message, stacklevel=3)
            attempt = replace(attempt, left_out=attempt.left_out | {problem.kind})
        except NothingRead as problem:
            if attempt.without_gradient is not None:
                raise ExportError(str(problem)) from problem
            progress(f"{problem}: looking for the last layer before it")
            assert graph is not None
            attempt = replace(attempt, without_gradient=zero_gradients(graph))


def _write(
    graph: TappedGraph,
    facts: _Facts,
    origin: dict[str, Any],
    source: Logits,
    agree: Callable[[Checker, TappedGraph], None],
    progress: Progress,
    attempt: Attempt,
) -> Path:
    from .bundle import write_bundle
    from .check import Checker, looks_like_probabilities, warn_of_probabilities
    from .graph import named_values
    from .layers.logits import class_count, is_product, made_of_probabilities
    from .noise import with_noise
    from .probes import as_pixels, smooth_images
    from .programs import build_programs, seeds_share_image
    from .tape import static_dims

    values = named_values(graph.model.graph)
    count = class_count(values[graph.logits])
    if facts.classes is not None and len(facts.classes) != count:
        raise ExportError(f"{len(facts.classes)} class names for a network with {count} classes")
    shape = _shape(static_dims(graph.model.graph.inputs[0]))
    check_recipe(facts.preprocess, shape)
    check_activation(facts.activation, count)
    packages = ("torch", "onnx", "onnxscript") if facts.kind == "torch" else ("onnx", "onnxscript")
    manifest = Manifest(
        name=facts.name,
        source=origin,
        tools={p: importlib.metadata.version(p) for p in ("camrt", *packages)},
        input_shape=shape,
        num_classes=count,
        taps=tuple(t for t, _ in graph.taps),
        programs=(),
        weights={},
        batch=graph.batch,
        seeds_share_image=seeds_share_image(graph),
        final_activation=graph.final_activation,
        activation=facts.activation,
        last_layer=graph.last,
        normalized=normalized_of(graph),
        classes=None if facts.classes is None else tuple(map(str, facts.classes)),
        preprocess=facts.preprocess,
    )
    if manifest.assumes_softmax:
        progress(
            "the activation that turns the logits into probabilities is not known: a softmax is assumed (activation=, "
            "--activation)"
        )
    programs = {}
    for precision in facts.precisions:
        if precision == "int8":
            built = _int8(graph, manifest, facts, progress)
            programs[built.file] = built
            continue
        for built in build_programs(replace(graph, precision=precision), progress):
            if built.kind not in attempt.left_out:
                programs.setdefault(built.file, built)
    images = smooth_images(shape)
    if graph.whole_numbers:
        images = as_pixels(images)
    checker = Checker(graph, source, graph.rounded, images, attempt.without_gradient is not None)

    def check(folder: Path, complete: Manifest) -> Manifest:
        progress("checking every program")
        started = time.perf_counter()
        checker(folder, complete)
        agree(checker, graph)
        scores = values[graph.logits]
        made_of = made_of_probabilities(scores)
        seem = looks_like_probabilities(checker.classifier(folder, complete), images, is_product(scores))
        if seem is not None or made_of is not None:
            warn_of_probabilities(seem, made_of)
        measured = with_noise(folder, complete, graph.whole_numbers)
        progress(f"checked {len(complete.programs)} programs in {time.perf_counter() - started:.1f} s")
        return measured if facts.complete is None else facts.complete(folder, measured, progress)

    return write_bundle(facts.path, manifest, list(programs.values()), facts.overwrite, progress, check)


def _int8(graph: TappedGraph, manifest: Manifest, facts: _Facts, progress: Progress) -> BuiltProgram:
    """The program `masked` in int8; says how far its logits are from float32's. InputError for other images."""
    from .int8 import FEW_IMAGES, LARGE_ERROR, LEAST_SAME, int8_program
    from .programs import BuiltProgram

    given = facts.calibration
    images = np.asarray(given(manifest) if callable(given) else given)
    if images.ndim != 4 or images.shape[1:] != manifest.input_shape or images.dtype != np.float32 or not len(images):
        raise InputError(
            f"calibration: {images.dtype}{list(images.shape)} instead of float32 images [N, "
            f"{', '.join(map(str, manifest.input_shape))}]"
        )
    if not np.isfinite(images).all():
        raise InputError("calibration: holds NaN or infinity")
    progress(f"calibrating int8 with {len(images)} images")
    result = int8_program(graph, images)
    said = (
        f"int8: under masks, logits differ from float32's by {result.error:.1%} (relative L2), and the top class stays "
        f"for {result.same:.0%}"
    )
    progress(said)
    if len(images) < FEW_IMAGES:
        warnings.warn(f"calibration: {len(images)} images are few: give ten or more", stacklevel=4)
    if result.error > LARGE_ERROR or result.same < LEAST_SAME:
        warnings.warn(f"{said}: use fp16, or calibrate with more pictures of the kind to explain", stacklevel=4)
    return BuiltProgram(Kind.MASKED, "masked.int8.onnx", (), result.model, "int8")


def normalized_of(graph: TappedGraph) -> Normalized | None:
    """The tensor after the graph's own normalisation of the image: its name and (channels, height, width); None where
    masks multiply the image itself.
    """
    from .graph import named_values
    from .tape import static_dims

    if graph.normalized is None:
        return None
    value = named_values(graph.model.graph)[graph.normalized]
    return Normalized(graph.normalized, _shape(static_dims(value)))


def check_packages(*packages: str, purpose: str = "export") -> None:
    """CamrtError names the packages that are missing or broken. purpose: what needs them, which is also the extra."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise CamrtError(f"{purpose} needs {', '.join(missing)}: {install.extra(purpose)}")
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise CamrtError(install.repair(purpose, package, purpose, error)) from None


def _shape(values: Sequence[int]) -> tuple[int, int, int]:
    shape = tuple(values)
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(f"input_shape {shape}: pass (channels, height, width)")
    return shape  # type: ignore[return-value]


def _check_path(path: str | Path, overwrite: bool) -> None:
    """Refuses an existing path before the long work starts."""
    from .bundle import check_target

    check_target(Path(path), overwrite)
