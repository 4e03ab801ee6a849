"""Checks a bundle against PyTorch in float64, tap by tap and method by method."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np

from .compare import cosine_distance, largest_difference, relative_l2
from .kernels import DeviceError, minmax
from .oracle import Oracle, open_oracle
from .rounding import RoundingBackend
from .runtime.backends import Backend, Executable, Settings, create
from .runtime.bundle import Bundle, read_bundle
from .runtime.cams import GridMaps
from .runtime.cams.gradient import full_grad
from .runtime.errors import CamrtError
from .runtime.explainer import Explainer
from .runtime.manifest import Program

if TYPE_CHECKING:
    from .export.reference import Recorded

GRAPH_LIMIT = 1e-6  # relative L2 of a program's own arithmetic in float64: what float32 constants leave
FULL_GRAD_LIMIT = 1e-5  # largest difference of its map, computed in float64 and summed in float32
SOURCE_LIMIT = 1e-4  # relative L2 from another float32 program
ACTIVATION_LIMIT = 1e-5  # relative L2 from float64
MAP_LIMIT = 1e-3  # largest difference after min-max
HALF_LIMIT = 1e-3  # 1 - cosine of maps after min-max, of programs in float16
CLASS_LIMIT = 0.02  # part of the range of an image's logits within which classes are tied to float16
PERCENTILES = (0, 50, 90, 100)
FLOAT32_RUNS = 8  # how often PyTorch float32's own distance is sampled,
FULL_GRAD_RUNS = 3  # FullGrad's, a whole backward pass each,
FLOAT32_UNITS = 16  # with images that differ by so many units in the last place


@dataclass(frozen=True)
class Row:
    """One comparison: its distance from the float64 reference, PyTorch float32's own, and what is allowed.

    A rectifier whose input is within rounding of 0 may fall to either side, and one that does moves early gradients by
    1e-3 and more. Which ones fall is chance, so for gradients and maps PyTorch float32's own distance is the largest of
    several runs, whose images differ in their last bits. Chance hides no error: the gradient program is also run as it
    stands by PyTorch operators in float64, where rectifiers fall as they do in the reference.
    """

    program: str
    subject: str
    distance: float
    torch_float32: float
    limit: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.distance <= self.limit


@dataclass(frozen=True)
class Report:
    """oracle: what was compared with. rows: one per program and tap or method."""

    oracle: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(r.passed for r in self.rows)


def verify(
    path: str | Path,
    source: str | None = None,
    images: np.ndarray | None = None,
    backend: str = "auto",
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Compares every program of a bundle with the reference in float64.

    source: as for `camrt export`; by default what the bundle records. images: float32 (B, C, H, W); by default two smooth
    random ones. Limits: 1e-5 relative L2 for activations and gradients and 1e-3 for maps, after min-max, or twice PyTorch
    float32's own distance where that is more; 1e-6 for the gradient program's arithmetic in float64.
    """
    bundle = read_bundle(path)
    oracle = open_oracle(bundle, source)
    try:
        return verify_bundle(bundle, oracle, images, backend, progress)
    except DeviceError as error:
        raise CamrtError(str(error)) from error


def verify_bundle(
    bundle: Bundle,
    oracle: Oracle,
    images: np.ndarray | None = None,
    backend: str = "auto",
    progress: Callable[[str], None] = lambda _: None,
    precisions: Sequence[str] | None = None,
) -> Report:
    """As `verify`, with the oracle at hand. precisions: by default all that the bundle has."""
    from .export.reference import as_maps

    manifest = bundle.manifest
    batch = smooth_images(manifest.input_shape) if images is None else images
    engine = _Sharing(create(backend, Settings(max_batch=max(16, len(batch)))))
    layers = [t.name for t in manifest.taps]
    if manifest.batch == 1:
        batch = batch[:1]
    seed = _seeds(oracle, batch, manifest.num_classes, layers)
    progress(f"reference in float64: {oracle.name}")
    double = as_maps(oracle.record(batch, seed, layers, True), manifest.taps)
    singles = [
        as_maps(oracle.record(image, seed, layers, False), manifest.taps)
        for image in last_bits(batch, FLOAT32_RUNS, FLOAT32_UNITS)
    ]
    chosen = bundle.precisions if precisions is None else precisions
    full_grads = _full_grads(bundle, oracle, batch, seed)
    by_method: list[Row] = []
    explainers = []  # whose programs the rows of programs use as well
    for precision in chosen:
        by_method += _graph_rows(bundle, precision, batch, seed, double, progress)
        by_method += _full_grad_graph_rows(bundle, precision, batch, seed, full_grads)
        for run_by in [engine] if precision == "fp32" else [engine, RoundingBackend()]:
            explainer = Explainer(bundle, run_by, precision=precision)
            what = _Compared.of(precision, str(run_by.name))
            if precision == "fp16":
                by_method += _class_rows(explainer, what, batch, double)
            else:
                explainers.append(explainer)
            by_method += _method_rows(explainer, what, batch, seed, double, singles, progress)
            by_method += _full_grad_rows(explainer, what, batch, seed, full_grads)
    rows: list[Row] = []
    cut: dict[str, np.ndarray] = {}
    for program in manifest.programs:
        if program.precision != "float32":
            continue
        progress(f"checking {program.file}")
        given = cut | {"image": batch, "seed": seed}
        executable = engine.open(bundle, program)
        out = executable.run({name: given[name] for name in program.inputs})
        if program.kind == "trunk":
            cut = out  # what the head, which comes next, is given
        rows += _program_rows(program.file, out, program.taps, double, singles)
        if program.kind == "head" and manifest.batch != 1:
            rows += _head_rows(bundle, engine, program, batch, double, singles)
    if "fp32" in chosen:
        rows += _use_rows(bundle, engine, batch, seed, double, singles)
        rows += _source_rows(bundle, engine, batch)
    rows += by_method
    return Report(oracle.name, tuple(rows))


class _Sharing:
    """A backend that opens a program once for all who hold it at the same time: opening takes longer than most runs."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._opened: WeakValueDictionary[tuple[str, bool], Executable] = WeakValueDictionary()
        self.name, self.lanes, self.gpu = backend.name, backend.lanes, backend.gpu

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> Executable:
        key = (program.file, concurrent)
        executable = self._opened.get(key)
        if executable is None:
            executable = self._opened[key] = self._backend.open(bundle, program, concurrent)
        return executable


@dataclass(frozen=True)
class _Compared:
    """How maps of a precision are compared: what the rows say, the distance, and what is allowed of it."""

    label: str
    distance: Callable[[np.ndarray, np.ndarray], float]
    limit: float

    @classmethod
    def of(cls, precision: str, engine: str) -> _Compared:
        if precision == "fp32":
            return cls("methods", largest_difference, MAP_LIMIT)
        return cls(f"methods fp16 {engine}", cosine_distance, HALF_LIMIT)


def _class_rows(explainer: Explainer, what: _Compared, batch: np.ndarray, double: Recorded) -> Iterator[Row]:
    """By how much of the range of its logits the top class in float16 falls short of the reference's."""
    want = double.logits.numpy()
    found = explainer.classify(batch).argmax(axis=1)
    short = want.max(axis=1) - want[np.arange(len(want)), found]
    yield Row(what.label, "top class", float((short / np.ptp(want, axis=1)).max()), 0.0, CLASS_LIMIT)


def smooth_images(shape: Sequence[int], count: int = 2, seed: int = 0) -> np.ndarray:
    """Random network inputs with structure at several scales, float32 (count, *shape)."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    images = np.zeros((count, *shape), np.float32)
    for plane in images.reshape(-1, *shape[1:]):
        for cells in (3, 7, 17, 41):
            coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
            plane += np.asarray(coarse.resize((shape[2], shape[1]), Image.Resampling.BICUBIC)) / 2
    return images


def last_bits(batch: np.ndarray, count: int, units: float = 4) -> Iterator[np.ndarray]:
    """The batch, and count - 1 copies whose numbers differ from it by a few units in the last place."""
    yield batch
    rng = np.random.default_rng(0)
    for _ in range(count - 1):
        yield (batch * (1 + units * 2.0**-24 * rng.standard_normal(batch.shape))).astype(np.float32)


def _seeds(oracle: Oracle, batch: np.ndarray, classes: int, layers: Sequence[str]) -> np.ndarray:
    """The first image's top class, and for the others a contrast of their top class with its runner-up."""
    logits = oracle.record(batch, np.zeros((len(batch), classes), np.float32), layers[-1:], True).logits.numpy()
    seed = np.zeros((len(batch), classes), np.float32)
    for i, row in enumerate(logits):
        order = row.argsort()
        seed[i, order[-1]] = 1
        if i and classes > 1:
            seed[i, order[-2]] = -1
    return seed


def _row(
    program: str,
    subject: str,
    got: np.ndarray,
    want: np.ndarray,
    own: Sequence[np.ndarray],
    measure: Callable[[np.ndarray, np.ndarray], float],
    floor: float,
) -> Row:
    """Compares in float64; a comparison that cannot be made is a row that fails."""
    try:
        if got.dtype != np.float32:
            raise ValueError(f"dtype {got.dtype} instead of float32")
        distance = measure(got.astype(np.float64), want)
        torch_float32 = max((measure(o.astype(np.float64), want) for o in own), default=0.0)
    except ValueError as error:
        return Row(program, subject, float("nan"), float("nan"), floor, str(error))
    return Row(program, subject, distance, torch_float32, max(floor, 2 * torch_float32))


def _program_rows(
    file: str, out: dict[str, np.ndarray], taps: Sequence[str], double: Recorded, singles: Sequence[Recorded]
) -> Iterator[Row]:
    def row(subject: str, name: str, pick: Callable[[Recorded], Any], continuous: bool) -> Row:
        runs = singles[:1] if continuous else singles
        want, own = pick(double).numpy(), [pick(r).numpy() for r in runs]
        return _row(file, subject, out[name], want, own, relative_l2, ACTIVATION_LIMIT)

    yield row("logits", "logits", lambda r: r.logits, True)
    for tap in taps:
        for name in ("activation", f"activation:{tap}"):
            if name in out:
                yield row(f"activation {tap}", name, lambda r, t=tap: r.activations[t], True)
        if f"gradient:{tap}" in out:
            yield row(f"gradient {tap}", f"gradient:{tap}", lambda r, t=tap: r.gradients[t], False)
    if "maps" in out:
        yield row("alphas", "alphas", lambda r: _side_by_side(r, taps)[0], False)
        yield row("maps", "maps", lambda r: _side_by_side(r, taps)[1], False)


def _head_rows(
    bundle: Bundle, engine: Backend, program: Program, batch: np.ndarray, double: Recorded, singles: Sequence[Recorded]
) -> Iterator[Row]:
    """The head as methods use it: three activations of one image, here all unchanged, with its context repeated."""
    trunk = bundle.program("trunk", program.taps)
    out = engine.open(bundle, trunk).run({"image": batch[:1]})
    given = {name: np.repeat(out[name], 3, axis=0) for name in program.inputs}
    got = engine.open(bundle, program).run(given)["logits"]
    want = np.repeat(double.logits[:1].numpy(), 3, axis=0)
    own = [np.repeat(r.logits[:1].numpy(), 3, axis=0) for r in singles[:1]]
    yield _row(program.file, "several activations of one image", got, want, own, relative_l2, ACTIVATION_LIMIT)


def _side_by_side(recorded: Recorded, taps: Sequence[str]) -> tuple[Any, Any]:
    """Alphas (B, sum K) and maps (B, sum h w), as the layer_maps program lays them out."""
    import torch

    from .export.reference import layer_cam_maps, select

    alphas, maps = layer_cam_maps(select(recorded, taps))
    return torch.cat(alphas, 1), torch.cat([m.flatten(1) for m in maps], 1)


def _use_rows(
    bundle: Bundle, engine: Backend, batch: np.ndarray, seed: np.ndarray, double: Recorded, singles: Sequence[Recorded]
) -> Iterator[Row]:
    """The widest layer_maps program as users run it: one image alone, and one image with two targets.

    The second target is twice the first, whose maps must be twice the first's.
    """
    program = max((p for p in bundle.manifest.programs if p.kind == "layer_maps"), key=lambda p: len(p.taps))
    executable = engine.open(bundle, program)
    want, own = ([_side_by_side(r, program.taps)[1][:1].numpy() for r in runs] for runs in ([double], singles))
    got = executable.run({"image": batch[:1], "seed": seed[:1]})["maps"]
    yield _row(program.file, "single image", got, want[0], own, relative_l2, ACTIVATION_LIMIT)
    count = 1 if bundle.manifest.seeds_share_image else 2
    feeds = {"image": np.repeat(batch[:1], count, axis=0), "seed": np.concatenate([seed[:1], 2 * seed[:1]])}
    if bundle.manifest.batch == 1:
        return
    got = executable.run(feeds)["maps"]
    for i, subject in enumerate(("several targets, first", "several targets, second")):
        yield _row(program.file, subject, got[i : i + 1] / (i + 1), want[0], own, relative_l2, ACTIVATION_LIMIT)


def _source_rows(bundle: Bundle, engine: Backend, batch: np.ndarray) -> Iterator[Row]:
    """For an ONNX source that is at hand: what ONNX Runtime computes from the untouched file."""
    manifest = bundle.manifest
    spec = manifest.source.get("spec")
    if manifest.source["kind"] != "onnx" or not spec or not Path(spec).is_file():
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(str(spec), providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    channels_last = entry.shape[3] == batch.shape[1] and entry.shape[1] != batch.shape[1]
    fed = batch.transpose(0, 2, 3, 1) if channels_last else batch
    output = [manifest.source["output"] or session.get_outputs()[0].name]
    want = np.concatenate([np.asarray(session.run(output, {entry.name: fed[i : i + 1]})[0]) for i in range(len(fed))])
    logits = engine.open(bundle, bundle.program("classify")).run({"image": batch})["logits"].astype(np.float64)
    if manifest.final_activation == "Softmax":
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits)) if manifest.final_activation == "Sigmoid" else logits
    got = scores.astype(np.float32)
    want = want.reshape(got.shape).astype(np.float64)
    yield _row("classify.onnx", "scores of the source file", got, want, [], relative_l2, SOURCE_LIMIT)


def _graph_rows(
    bundle: Bundle,
    precision: str,
    batch: np.ndarray,
    seed: np.ndarray,
    double: Recorded,
    progress: Callable[[str], None],
) -> Iterator[Row]:
    """The widest gradient program's arithmetic, in float64, without ONNX Runtime."""
    import torch

    from .export.interpreter import Interpreter

    program = bundle.program("gradients", [t.name for t in bundle.manifest.taps], precision)
    progress(f"checking {program.file} in float64")
    names = [f"gradient:{tap}" for tap in program.taps]
    feeds = {"image": torch.from_numpy(batch).double(), "seed": torch.from_numpy(seed).double()}
    with torch.no_grad():
        out = Interpreter(bundle.file(program)).run(feeds, names)
    for tap, name in zip(program.taps, names, strict=True):
        subject = f"float64 gradient {tap}"
        try:
            distance = relative_l2(out[name].numpy(), double.gradients[tap].numpy())
            yield Row(program.file, subject, distance, 0.0, GRAPH_LIMIT)
        except ValueError as error:
            yield Row(program.file, subject, float("nan"), 0.0, GRAPH_LIMIT, str(error))


def _method_rows(
    explainer: Explainer,
    what: _Compared,
    batch: np.ndarray,
    seed: np.ndarray,
    double: Recorded,
    singles: Sequence[Recorded],
    progress: Callable[[str], None],
) -> Iterator[Row]:
    """Winsor-CAM, Integrative CAM, and at the last block every method that reads one activation and gradient."""
    import torch

    from .export.reference import LAYER_METHODS, integrative_cam, select, winsor_cam

    size = batch.shape[2:]
    roles = {role: [t.name for t in explainer.manifest.taps if role in t.roles] for role in ("conv", "last")}

    def row(subject: str, got: np.ndarray, compute: Callable[[Recorded], Any]) -> Row:
        want, own = minmax(compute(double).numpy()), [minmax(compute(r).numpy()) for r in singles]
        return _row(what.label, subject, minmax(got), want, own, what.distance, what.limit)

    if roles["conv"]:
        progress("checking winsor_cam")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a map of zeros is compared all the same
            first = explainer.explain(batch, "winsor_cam", seed, percentile=PERCENTILES[0])
            for aggregation in ("mean", "max"):
                for p in PERCENTILES:
                    got = first.retune(percentile=p, layer_aggregation=aggregation).maps
                    options = (size, p, aggregation)
                    subject = f"winsor_cam {aggregation} p{p}"
                    yield row(subject, got, lambda r, o=options: winsor_cam(select(r, roles["conv"]), *o)[0])
        progress("checking integrative_cam")
        got = explainer.explain(batch, "integrative_cam", seed).maps

        def integrative(recorded: Recorded) -> Any:
            kind = recorded.logits.dtype
            return integrative_cam(select(recorded, roles["conv"]), torch.from_numpy(seed).to(kind), size)[0]

        yield row("integrative_cam", got, integrative)
    if roles["last"]:
        for name, method in LAYER_METHODS.items():
            progress(f"checking {name}")
            got = explainer.explain(batch, name, seed).maps
            yield row(name, got, lambda r, m=method: m(select(r, roles["last"]), size))


@dataclass(frozen=True)
class _FullGrads:
    """FullGrad's maps in float64, and PyTorch float32's."""

    double: np.ndarray
    singles: list[np.ndarray]


def _full_grads(bundle: Bundle, oracle: Oracle, batch: np.ndarray, seed: np.ndarray) -> _FullGrads | None:
    """None where the bundle has no program for it."""
    if not any(p.kind == "full_grad" for p in bundle.manifest.programs):
        return None
    singles = [oracle.full_grad(x, seed, False) for x in last_bits(batch, FULL_GRAD_RUNS, FLOAT32_UNITS)]
    return _FullGrads(oracle.full_grad(batch, seed, True), singles)


def _full_grad_rows(
    explainer: Explainer, what: _Compared, batch: np.ndarray, seed: np.ndarray, reference: _FullGrads | None
) -> Iterator[Row]:
    if reference is not None:
        got = explainer.explain(batch, "full_grad", seed).maps
        yield _row(what.label, "full_grad", got, reference.double, reference.singles, what.distance, what.limit)


def _full_grad_graph_rows(
    bundle: Bundle, precision: str, batch: np.ndarray, seed: np.ndarray, reference: _FullGrads | None
) -> Iterator[Row]:
    """The program's own arithmetic in float64."""
    import torch

    from .export.interpreter import Interpreter

    if reference is None:
        return
    program = bundle.program("full_grad", (), precision)
    names = [name for name in program.outputs if name.startswith("grid:")]
    feeds = {"image": torch.from_numpy(batch).double(), "seed": torch.from_numpy(seed).double()}
    with torch.no_grad():
        out = Interpreter(bundle.file(program)).run(feeds, names)
    maps = tuple(out[name].numpy() for name in names)
    precise = full_grad(GridMaps((), seed, seed, maps, batch.shape[2:])).maps
    yield _row(program.file, "float64 full_grad", precise, reference.double, [], largest_difference, FULL_GRAD_LIMIT)
