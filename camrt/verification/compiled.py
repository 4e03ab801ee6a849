"""Checks a file of `camrt compile`: its maps against PyTorch in float64, and all that it gives against `explain`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.probes import last_bits, smooth_images
from ..kernels import minmax
from ..runtime.backends import Settings, create
from ..runtime.bundle.manifest import Manifest
from ..runtime.bundle.reading import Bundle, read_bundle
from ..runtime.cams import method_named
from ..runtime.cams.data import Heads
from ..runtime.errors import CamrtError, InputError, first_line
from ..runtime.explainer import Explainer
from ..runtime.explanation import Explanation
from ..runtime.images.image_batch import ImageBatch
from ..runtime.images.preprocess import undo
from .comparisons import (
    FLOAT32_UNITS,
    PERCENTILES,
    Comparison,
    MapComparison,
    Records,
    compared,
    finished,
    full_grads,
    kept,
)
from .distances import Row, largest_difference, relative_l2
from .oracle import Oracle, open_oracle
from .recorder import FLOAT32_RUNS, Recorder
from .verify import Report

if TYPE_CHECKING:
    from ..export.pytorch.autograd import Record

EXPLAIN_LIMIT = 1e-3  # largest difference from `explain`: of maps after min-max, and of layer weights
ENGINE_LIMIT = 1e-4  # relative L2 of logits from `explain`
OVERLAY_LIMIT = 1.0  # grey levels, mean
EXPLAIN_RUNS = 4  # samples of what the last bits of an image change
FREE = 3, 2  # where a picture's size is free, it is tried at this ratio of the network's input


@dataclass(frozen=True)
class CompiledFile:
    """A compiled file as ONNX Runtime opens it. said: its metadata, without the prefix; run: inputs -> outputs."""

    path: Path
    said: Mapping[str, Any]
    inputs: Mapping[str, list[Any]]
    run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def open_compiled(path: str | Path) -> CompiledFile:
    """InputError if it is no file of `camrt compile`; CamrtError without ONNX Runtime."""
    import onnx

    try:
        import onnxruntime
    except ImportError:
        raise CamrtError("onnxruntime is missing: pip install 'camrt[cpu]'") from None
    path = Path(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise InputError(f"{path}: not readable as ONNX ({first_line(error)[:200]})") from None
    said = {p.key.removeprefix("camrt."): p.value for p in model.metadata_props if p.key.startswith("camrt.")}
    if "method" not in said:
        raise InputError(f"{path}: not a file of camrt compile")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(names, map(np.asarray, session.run(names, feeds)), strict=True))

    inputs = {i.name: i.shape for i in session.get_inputs()}
    return CompiledFile(path, {k: json.loads(v) for k, v in said.items()}, inputs, run)


def verify_compiled(
    path: str | Path,
    file: str | Path,
    source: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Compares a compiled file, run by ONNX Runtime with all of its optimisations, with its bundle's source.

    path: the bundle; source: as for `verify`. Rows "PyTorch": maps against the reference in float64, with the limits of
    `verify`, for methods and options that it has a reference of. Rows "explain": map, layer weights and logits against
    what `explain` gives from the bundle. InputError if the file was not compiled from this bundle; CamrtError.
    """
    bundle, compiled = read_bundle(path), open_compiled(file)
    manifest, said = bundle.manifest, compiled.said
    if said["weights"] != manifest.weights["sha256"]:
        raise InputError(f"{file}: compiled from another bundle, of the model {said['model']!r}: name that one")
    oracle = open_oracle(bundle, source)
    entry, batch = _entry(compiled, manifest)
    explainer = Explainer(bundle, create("onnxruntime", Settings(max_batch=16)), precision=said["precision"])
    logits = explainer.classify(batch)
    targets = np.where(np.arange(len(batch)) == 0, -1, logits.argsort(axis=1)[:, -2:][:, 0]).astype(np.int64)
    classes = np.where(targets < 0, logits.argmax(axis=1), targets)
    feeds = entry | {"target": targets}
    rows: list[Row | Comparison] = []
    what = MapComparison.of(said["precision"], "compiled")
    beside_pytorch = _Reference(bundle, oracle, said, batch, classes, what)
    for subject, options in _variants(said):
        if "percentile" in options:
            feeds["percentile"] = np.full(len(batch), options["percentile"], np.float32)
        progress(f"checking {subject}")
        out = compiled.run(feeds)
        rows += _beside_explain(explainer, said, subject, options, batch, classes, out, what, entry.get("picture"))
        rows += beside_pytorch.rows(subject, options, out)
    return Report(oracle.name, finished(rows, beside_pytorch.singles()))


def _variants(said: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of the row, options of the method): one for each percentile, where the file takes one."""
    if said["method"] == "winsor_cam":
        for p in PERCENTILES:
            yield f"{said['method']} p{p}", {**said["options"], "percentile": p}
    else:
        yield said["method"], dict(said["options"])


def _entry(compiled: CompiledFile, manifest: Manifest) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The file's image or picture, and the network's input that belongs to it."""
    name, shape = next(iter(compiled.inputs.items()))
    count = shape[0] if isinstance(shape[0], int) else 1 if manifest.batch == 1 else 2
    if name == "image":
        batch = smooth_images(manifest.input_shape, count)
        return {name: batch}, batch
    own = [side * FREE[0] // FREE[1] for side in manifest.input_shape[1:]]
    size = [n if isinstance(n, int) else side for n, side in zip(shape[1:3], own, strict=True)]
    pictures = np.stack([undo(x, None) for x in smooth_images((3, *size), count)])
    return {name: pictures}, ImageBatch(list(pictures), manifest).on_host()


def _beside_explain(
    explainer: Explainer,
    said: Mapping[str, Any],
    subject: str,
    options: dict[str, Any],
    batch: np.ndarray,
    classes: np.ndarray,
    out: Mapping[str, np.ndarray],
    what: MapComparison,
    pictures: np.ndarray | None,
) -> Iterator[Row]:
    layers = None if not said["layers"] else said["layers"]

    def explained(images: Any) -> Explanation:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a map of zeros is compared too
            return explainer.explain(images, said["method"], classes, layers, **options)

    result, own = explained(batch), []
    if method_named(said["method"]).needs is Heads:  # scores that are nearly equal: min-max then shows rounding
        own = [minmax(explained(images).maps) for images in last_bits(batch, EXPLAIN_RUNS, FLOAT32_UNITS)]
    maps = minmax(out["map"]), minmax(result.maps).astype(np.float64)
    limit = EXPLAIN_LIMIT if said["precision"] == "fp32" else what.limit
    yield compared("explain", f"map {subject}", *maps, own, what.distance, limit)
    if "overlay" in out:
        yield _overlay_row(explained(list(pictures)) if pictures is not None else result, said, subject, out)
    if layers is not None:
        weights = out["layer_weights"], result.layer_weights.astype(np.float64)
        floor = EXPLAIN_LIMIT if said["precision"] == "fp32" else 5e-2
        yield compared("explain", f"weights {subject}", *weights, [], largest_difference, floor)
    floor = ENGINE_LIMIT if said["precision"] == "fp32" else 1e-2
    logits = out["logits"], result.logits.astype(np.float64)
    yield compared("explain", f"logits {subject}", *logits, [], relative_l2, floor)


def _overlay_row(result: Explanation, said: Mapping[str, Any], subject: str, out: Mapping[str, np.ndarray]) -> Row:
    """The mean difference in grey levels."""
    colormap, opacity = said["overlay"]["colormap"], said["overlay"]["opacity"]
    want = np.stack([result.overlay(i, opacity, colormap) for i in range(len(result))]).astype(np.float64)
    got = out["overlay"].astype(np.float32)
    return compared(
        "explain", f"overlay {subject}", got, want, [], lambda a, b: float(np.abs(a - b).mean()), OVERLAY_LIMIT
    )


class _Reference:
    """PyTorch's maps in float64, of methods that it has a reference of: PyTorch runs once for all of them."""

    def __init__(
        self,
        bundle: Bundle,
        oracle: Oracle,
        said: Mapping[str, Any],
        batch: np.ndarray,
        classes: np.ndarray,
        what: MapComparison,
    ) -> None:
        self._bundle, self._oracle, self._said, self._batch, self._what = bundle, oracle, said, batch, what
        self._seed = np.eye(bundle.manifest.num_classes, dtype=np.float32)[classes]

    def rows(
        self, subject: str, options: Mapping[str, Any], out: Mapping[str, np.ndarray]
    ) -> Iterator[Row | Comparison]:
        """A row, if the method with these options has a reference that needs no more than gradients."""
        what, label, got = self._what, ("PyTorch", f"map {subject}"), minmax(out["map"])
        if self._said["method"] == "full_grad":
            found = full_grads(self._bundle, self._oracle, self._batch, self._seed, FLOAT32_UNITS)
            if found is not None:
                own = [minmax(maps) for maps in found.singles]
                yield compared(*label, got, minmax(found.double), own, what.distance, what.limit)
            return
        compute = self._method(options)
        if compute is None:
            return
        from ..export.pytorch.autograd import select

        def maps(records: Records) -> np.ndarray:
            recorded = records[self._said["method"] == "integrative_cam"]  # behind the norms
            return minmax(compute(select(recorded, self._said["layers"])).numpy())

        yield Comparison(*label, kept(maps(self._double)), maps, what.distance, what.limit, FLOAT32_RUNS).take(got)

    def singles(self) -> Iterator[Records]:
        """PyTorch's records in float32, if a row needs them."""
        if "_double" in vars(self):
            yield from self._recorder.singles(self._batch, FLOAT32_UNITS)

    @cached_property
    def _recorder(self) -> Recorder:
        return Recorder(self._bundle, self._oracle, self._batch, self._seed)

    @cached_property
    def _double(self) -> Records:
        return self._recorder(self._batch, True)

    def _method(self, options: Mapping[str, Any]) -> Callable[[Record], Any] | None:
        """The method's maps from records of its layers; None if there is no such function."""
        import torch

        from .methods import LAYER_METHODS, integrative_cam, winsor_cam

        method, seed, size = self._said["method"], self._seed, self._batch.shape[2:]
        if method == "winsor_cam" and set(options) <= {"percentile", "layer_aggregation"}:
            return lambda record: winsor_cam(record, size, **options)[0]
        if method == "integrative_cam":
            smooth = {"identity": lambda s: s, "exp": torch.exp}[options.get("smooth", "identity")]
            return lambda r: integrative_cam(r, torch.from_numpy(seed).to(r.logits.dtype), size, smooth)[0]
        if method in LAYER_METHODS and not options:
            return lambda record: LAYER_METHODS[method](record, size)
        return None
