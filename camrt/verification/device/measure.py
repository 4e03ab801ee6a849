"""Computes a bundle's references for `camrt check`, with PyTorch in float64 from the bundle's own forward graph."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...export.api import check_packages
from ...export.probes import last_bits, smooth_images
from ...kernels import minmax
from ...runtime.bundle.kinds import Kind
from ...runtime.bundle.manifest import MANIFEST, MASK_PRECISIONS, Manifest
from ...runtime.bundle.reading import Bundle, read_bundle, write_manifest
from ...runtime.cams.masking import error_bounds
from ...runtime.errors import BundleError, CamrtError, ExportError, warn
from ...runtime.explainer import Explainer
from ..comparisons import FLOAT32_UNITS, FULL_GRAD_RUNS, QUANTISED_UNITS, full_grads
from ..distances import ACTIVATION_LIMIT, HALF_LIMIT, MAP_LIMIT, cosine_distance, row_distance
from ..interpreted import InterpretedBackend
from ..oracle import Oracle, own_graph
from ..recorder import Recorder, is_quantised, seeds_for
from .check import feeds_of
from .references import (
    FILE,
    TENSORS,
    Case,
    References,
    as_images,
    as_pixels,
    map_distance,
    of_layers,
    sampled,
    signed_sums,
)

if TYPE_CHECKING:
    import torch

    from ...export.pytorch.autograd import Record

FEW_CHANNELS = 64  # Score-CAM runs all channels of a layer, so only a layer with so many is used
MASKS = 33  # of ScoreCAM++: more than half of a GPU's mask batch, which the runtime then fills up
ROUNDED_LIMIT = float(np.sqrt(2 * HALF_LIMIT))  # relative L2 in float16 or int8, which is HALF_LIMIT as 1 - cosine
ROUNDING = 2.0**-25  # of a sum in float32, beside the sum of its terms' sizes
WIDEST_LIMIT = 0.9  # relative L2; a program that gives zeros is at 1
_IMAGES = 4  # in one run of PyTorch, which then takes little memory
Compute = Callable[["Record", "Record"], "torch.Tensor"]  # (layers, layers behind their norms) -> maps


@dataclass(frozen=True)
class _Probes:
    """What a bundle is measured with: images (B, C, H, W), the cotangents of their logits (B, classes), and by how many
    units in the last place the images of float32's runs differ.
    """

    bundle: Bundle
    images: np.ndarray
    seeds: np.ndarray
    units: float


@dataclass(frozen=True)
class _Question:
    """A call of `explain`, as in Case. compute: how PyTorch computes its maps from a record; None: `explain` itself
    gives them, with programs that PyTorch runs. precise: in float64. runs: samples of float32's own distance.
    """

    method: str
    options: dict[str, Any]
    compute: Compute | None = None
    retune: dict[str, Any] | None = None
    layers: list[str] | None = None
    images: int = 2
    precise: bool = True
    runs: int = FULL_GRAD_RUNS


def add_references(path: str | Path, progress: Callable[[str], None] = lambda _: None) -> None:
    """Stores in a bundle what `camrt check` compares a device with. Needs PyTorch; takes about as long as the export.

    Two smooth random images; their logits; of every layer the sums of its activation, gradient and maps; and the maps
    of every method: as PyTorch computes them in float64 from the bundle's forward graph. A limit is that of `verify`:
    where PyTorch float32's own distance from these values is large, twice that. CamrtError where a package is missing;
    BundleError if it cannot be written; ExportError for an operator that verification does not know.
    """
    check_packages("torch", "onnx", "onnxscript")
    bundle = read_bundle(path)
    before = bundle.sha256
    references = measured(bundle, progress)
    file = bundle.path / FILE
    beside = bundle.path / f".{os.getpid()}.{FILE}"
    try:
        digest = references.save(beside)
        if hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest() != before:
            raise BundleError(f"{bundle.path}: was changed meanwhile: add the references again")
        beside.replace(file)
    except OSError as error:
        raise BundleError(f"{file}: cannot be written ({error.strerror})") from None
    finally:
        beside.unlink(missing_ok=True)
    write_manifest(bundle.path, replace(bundle.manifest, references={"file": FILE, "sha256": digest}))


def store_references(folder: Path, manifest: Manifest, progress: Callable[[str], None] = lambda _: None) -> Manifest:
    """For `complete` of `export_model` and `export_onnx`: as `add_references`, before the bundle is in its place."""
    check_packages("torch", "onnx", "onnxscript")
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")  # an Explainer reads it; export replaces it
    digest = measured(Bundle(folder, manifest), progress).save(folder / FILE)
    return replace(manifest, references={"file": FILE, "sha256": digest})


def measured(bundle: Bundle, progress: Callable[[str], None] = lambda _: None) -> References:
    """The references of a bundle. ExportError as `add_references`."""
    manifest = bundle.manifest
    pixels = as_pixels(smooth_images(manifest.input_shape, 1 if manifest.batch == 1 else 2))
    images, oracle = as_images(pixels), own_graph(bundle)
    seeds = seeds_for(oracle, images, manifest.num_classes, [t.name for t in manifest.taps])
    units = QUANTISED_UNITS if is_quantised(bundle) else FLOAT32_UNITS
    progress("computing references in float64")
    probes, recorder = _Probes(bundle, images, seeds, units), Recorder(bundle, oracle, images, seeds)
    questions = list(_of_layers(bundle, seeds))
    record = recorder(images, True)
    (tensors, maps), cancelling = _of_record(record, questions), _cancelling(record[0])
    logits = tensors.pop("logits")
    own = {kind: np.zeros(len(manifest.taps)) for kind in TENSORS} | {"logits": np.zeros(1)} | cancelling
    singles: list[list[np.ndarray]] = []
    for records in recorder.singles(images, units):
        found, single_maps = _of_record(records, questions)
        for kind, want in {"logits": logits, **tensors}.items():
            distances = [row_distance(a, b) for a, b in zip(found[kind], want, strict=True)]
            own[kind] = np.maximum(own[kind], distances)
        singles.append(single_maps)
    cases = [_case(question, maps[i], [single[i] for single in singles]) for i, question in enumerate(questions)]
    cases += _full_grad(probes, oracle, progress)
    cases += _by_explaining(probes, progress)
    cases = [case for case in cases if case.sums.any(axis=1).all()]  # else a map is constant: min-max shows rounding
    if not cases:
        raise ExportError("every method's map is constant for the images that 'camrt check' would compare")
    return References(
        pixels,
        seeds,
        logits[0].astype(np.float32),
        manifest.probability,
        {kind: sums.astype(np.float32) for kind, sums in tensors.items()},
        {kind: np.maximum(ACTIVATION_LIMIT, 2 * distance) for kind, distance in own.items()}
        | _limits_of_rounding(probes, logits[0], tensors),
        tuple(cases),
    )


def _limits_of_rounding(
    probes: _Probes, logits: np.ndarray, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Of the programs that are not float32: twice the distance from float64 that their own rounding makes, at most
    WIDEST_LIMIT. A warning says where rounding alone goes beyond half of that.
    """
    bundle, limits, worst = probes.bundle, {}, (0.0, "")
    for program in bundle.manifest.programs:
        if program.precision == "float32":
            continue
        precision = next(name for name, recorded in MASK_PRECISIONS.items() if recorded == program.precision)
        session = Explainer(bundle, InterpretedBackend(rounding=True), precision=precision).session
        out = session.open(program).run(feeds_of(session, program, probes.images, probes.seeds))
        found = {"logits": [_rounded_distance(out["logits"].astype(np.float64), logits)]}
        taps = [t for t in bundle.manifest.taps if t.name in program.taps]
        layers = [bundle.manifest.taps.index(t) for t in taps]
        for kind, arrays in of_layers(program, taps, out).items():
            wanted = tensors[kind][layers]
            found[kind] = [_rounded_distance(signed_sums(a), want) for a, want in zip(arrays, wanted, strict=True)]
        for kind, distances in found.items():
            limits[f"{program.file} {kind}"] = np.clip(2 * np.array(distances), ROUNDED_LIMIT, WIDEST_LIMIT)
            worst = max(worst, (max(distances), f"{kind.replace('_', ' ')} of {program.file}"))
    if worst[0] > WIDEST_LIMIT / 2:
        warn(
            f"rounding alone moves the {worst[1]} by {min(worst[0], 10):.0%}: this precision does not fit the "
            "network, use fp32"
        )
    return limits


def _rounded_distance(got: np.ndarray, want: np.ndarray) -> float:
    """As row_distance; infinite where float16 overflowed."""
    return row_distance(got, want) if np.isfinite(got).all() else math.inf


def _of_layers(bundle: Bundle, seeds: np.ndarray) -> Iterator[_Question]:
    """The methods that a record of the layers decides."""
    import torch

    from ...export.pytorch.autograd import select
    from ..methods import LAYER_METHODS, integrative_cam, integrative_residual, winsor_cam

    taps, size, images = bundle.manifest.taps, bundle.manifest.input_shape[1:], len(seeds)
    conv, last = ([t.name for t in taps if role in t.roles] for role in ("conv", "last"))

    def seed(recorded: Record) -> torch.Tensor:
        return torch.from_numpy(seeds).to(recorded.logits.dtype)

    def winsor(percentile: int, aggregation: str) -> Compute:
        return lambda layers, behind: winsor_cam(select(layers, conv), size, percentile, aggregation)[0]

    if conv:
        yield _Question("winsor_cam", {"percentile": 0}, winsor(0, "mean"), images=images)
        for percentile, aggregation in ((50, "mean"), (90, "mean"), (90, "max")):
            again = {"percentile": percentile, "layer_aggregation": aggregation}
            yield _Question("winsor_cam", {"percentile": 0}, winsor(percentile, aggregation), again, images=images)
        yield _Question(
            "integrative_cam",
            {},
            lambda layers, behind: integrative_cam(select(behind, conv), seed(behind), size)[0],
            images=images,
        )
        yield _Question(
            "integrative_cam",
            {"reading": "residual"},
            lambda layers, behind: integrative_residual(select(layers, conv), seed(layers), size)[0],
            images=images,
        )
    if last:
        for name, method in LAYER_METHODS.items():
            yield _Question(name, {}, lambda layers, behind, m=method: m(select(layers, last), size), images=images)


def _of_record(
    recorded: tuple[Record, Record], questions: Iterable[_Question]
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """(logits (1, B, classes) and the sums of TENSORS (layers, B, SUMS); the maps of the questions (B, H, W))."""
    from ..methods import layer_cam_maps

    layers, behind = recorded
    alphas, maps = layer_cam_maps(layers)
    evidence = [y * g / 2 for y, g in zip(behind.activations.values(), behind.gradients.values(), strict=True)]
    signed, magnitudes = [e.sum(1) for e in evidence], [e.abs().sum((1, 2, 3))[:, None] for e in evidence]
    tensors = (layers.activations.values(), layers.gradients.values(), alphas, maps, signed, magnitudes)
    sums = {
        kind: np.stack([signed_sums(t.numpy()) for t in of_layers])
        for kind, of_layers in zip(TENSORS, tensors, strict=True)
    }
    found = [q.compute(layers, behind).numpy() for q in questions if q.compute is not None]
    return {"logits": layers.logits.double().numpy()[None], **sums}, found


def _cancelling(layers: Record) -> dict[str, np.ndarray]:
    """How far float32's rounding alone can move each layer's alphas and maps (relative L2), where the gradient cancels
    over the grid: few runs of float32 may by chance all be nearer.
    """
    found: dict[str, list[float]] = {"alphas": [], "maps": []}
    for y, g in zip(layers.activations.values(), layers.gradients.values(), strict=True):
        alpha, size = g.mean((2, 3)), g.abs().mean((2, 3))
        sums = [(size, alpha), ((size[:, :, None, None] * y.abs()).sum(1), (alpha[:, :, None, None] * y).sum(1))]
        for kind, (large, small) in zip(found, sums, strict=True):
            norms = [(a.flatten(1).norm(dim=1)).double().numpy() for a in (large, small)]
            ratio = norms[0] / np.where(norms[1] > 0, norms[1], 1)
            found[kind].append(ROUNDING * float(ratio.max()))
    return {kind: np.array(values) for kind, values in found.items()}


def _full_grad(probes: _Probes, oracle: Oracle, progress: Callable[[str], None]) -> Iterator[Case]:
    progress("computing references of methods")
    found = full_grads(probes.bundle, oracle, probes.images, probes.seeds, probes.units)
    if found is not None:
        yield _case(_Question("full_grad", {}, images=len(probes.images)), found.double, found.singles)


def _by_explaining(probes: _Probes, progress: Callable[[str], None]) -> Iterator[Case]:
    """The methods that run the network several times, or seed it in their own way, for one image.

    PyTorch runs the programs, in float64; where masked images run through the whole network in float32, as no gradient
    then depends on its rounding.
    """
    bundle, image, seed = probes.bundle, probes.images[:1], probes.seeds[:1]

    def maps(question: _Question, batch: Iterable[np.ndarray], precise: bool = False) -> list[np.ndarray]:
        explainer = Explainer(bundle, InterpretedBackend(precise), _IMAGES, bundle.precisions[0])
        arguments = question.method, seed, question.layers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a map of zeros is compared too
            return [explainer.explain(image, *arguments, **question.options).maps for image in batch]

    for question in _run_several_times(probes):
        progress(f"computing references of {question.method}")
        changed = itertools.islice(last_bits(image, question.runs, probes.units), question.runs)
        try:
            (want,) = maps(question, [image], question.precise)
            singles = maps(question, changed)
        except CamrtError as error:  # as Finer-CAM's, where all other classes are impossible
            progress(f"no reference of {question.method}: {error}")
            continue
        yield _case(question, want, singles)


def _run_several_times(probes: _Probes) -> Iterator[_Question]:
    bundle, manifest = probes.bundle, probes.bundle.manifest
    # of masked images: without steps, float32 is far closer than the limit
    runs = 2 if probes.units == QUANTISED_UNITS else 0
    last = [t.name for t in manifest.taps if "last" in t.roles]
    if last and manifest.num_classes > 1:
        yield _Question("finer_cam", {}, images=1)
    if last:
        program = InterpretedBackend().open(bundle, bundle.program(Kind.ACTIVATIONS, last))
        activation = program.run({"image": probes.images[:1]})[f"activation:{last[0]}"][0]
        options = {"max_error": _error_for(activation)}
        yield _Question("score_cam_pp", options, images=1, precise=False, runs=runs)
        if any(p.kind == Kind.HEAD and last[0] in p.taps for p in manifest.programs):
            yield _Question("ablation_cam", {}, images=1)
            yield _Question("recipro_cam", {}, images=1)
    few = [t for t in manifest.taps if t.channels <= FEW_CHANNELS and math.prod(t.grid) > 1]
    if few:
        layer = min(few, key=lambda t: t.channels).name
        yield _Question("score_cam", {}, layers=[layer], images=1, precise=False, runs=runs)


def _error_for(activation: np.ndarray) -> float:
    """ScoreCAM++'s max_error that leaves MASKS channels of an activation (K, h, w), half-way to that of one less."""
    _, bounds = error_bounds(activation[activation.any(axis=(1, 2))], "tanh")
    dropped = len(bounds) - MASKS
    return float(bounds[dropped - 1 : dropped + 1].mean()) if dropped > 0 else 0.0


def _case(question: _Question, want: np.ndarray, singles: Sequence[np.ndarray]) -> Case:
    """want: maps (images, H, W) in float64; singles: PyTorch float32's."""
    samples, scaled = sampled(want), minmax(want.astype(np.float64))
    distance = max((map_distance(sampled(maps), samples, want.shape[1:]) for maps in singles), default=0.0)
    half = max((cosine_distance(minmax(maps.astype(np.float64)), scaled) for maps in singles), default=0.0)
    return Case(
        question.method,
        question.options,
        question.layers,
        question.retune,
        question.images,
        {"fp32": max(MAP_LIMIT, 2 * distance), "fp16": max(HALF_LIMIT, 2 * half)},
        *(a.astype(np.float32) for a in samples),
    )
