"""Compares what a backend gives on this machine with a bundle's stored references. Needs no PyTorch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...kernels import DeviceError
from ...runtime.backends import Backend, Settings, create, masks_on_gpu
from ...runtime.bundle.kinds import Kind
from ...runtime.bundle.manifest import Program
from ...runtime.bundle.reading import Bundle, read_bundle
from ...runtime.cams import MaskedRuns, method_named
from ...runtime.errors import CamrtError, InputError, UnknownName, near
from ...runtime.explainer import Explainer
from ...runtime.explanation import Explanation
from ...runtime.images.image_batch import ImageBatch
from ...runtime.layer_choice import chosen_layers
from ...runtime.session.session import Session
from ..distances import CLASS_LIMIT, Row, class_distance, cosine_distance, row_distance
from .references import Case, References, map_distance, of_layers, read_references, sampled, signed_sums

REPLAYS = 3  # calls of each method where a CUDA graph is captured in the second and replayed from the third on


@dataclass(frozen=True)
class DeviceReport:
    """The result of `check`. engine: what ran, for people; rows: one per comparison; seconds: how long it took."""

    engine: str
    rows: tuple[Row, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(r.passed for r in self.rows)


def check(
    path: str | Path,
    backend: str = "auto",
    precisions: str | Sequence[str] | None = None,
    programs: Collection[str] | None = None,
    max_batch: int = 16,
    mask_batch: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> DeviceReport:
    """Runs a bundle's programs and methods on this machine and compares them with the references that it stores.

    precisions: "fp32", "fp16", "int8", by default all that the bundle has. programs: files, by default those of all
    programs; only methods that these suffice for are checked. backend, max_batch, mask_batch: as for `camrt.load`.
    Limits: those of `verify`; maps in float16: 1 - cosine of 1e-3, and the top class; what programs in float16 or int8
    give: a relative L2 of 0.045, which is that cosine, or twice what rounding alone does. Maps of masked images in int8
    have no limit: they must only be finite. CamrtError if the bundle stores no references; errors of one program or
    method become a row that fails.
    """
    bundle = read_bundle(path)
    references = read_references(bundle)
    precisions = [precisions] if isinstance(precisions, str) else precisions
    chosen = [bundle.chosen_precision(p, masks=True) for p in precisions or bundle.mask_precisions]
    masks = masks_on_gpu(max_batch, mask_batch)
    engine = create(backend, Settings(max_batch=max_batch, progress=progress, mask_batch=masks))
    return check_on(bundle, references, engine, chosen, programs, max_batch, mask_batch, progress)


def check_on(
    bundle: Bundle,
    references: References,
    engine: Backend,
    precisions: Sequence[str],
    programs: Collection[str] | None = None,
    max_batch: int = 16,
    mask_batch: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> DeviceReport:
    """As `check`, with an opened bundle and backend."""
    started, rows = time.perf_counter(), []
    bundle = replace(bundle, manifest=replace(bundle.manifest, activation=references.probability))
    known = [p.file for p in bundle.manifest.programs]
    files = set(known if programs is None else programs)
    for file in files.difference(known):
        raise UnknownName(f"{bundle.path} has no program {file!r}{near(file, known)}")
    done: set[str] = set()
    for precision in dict.fromkeys(precisions):

        def device(precision: str = precision) -> _Device:
            """With no open program: few devices have the memory for all programs at once."""
            return _Device(Explainer(bundle, engine, max_batch, precision, mask_batch), references, progress)

        if not done:
            rows += device().preprocessing()
        cases, own = device().cases(files), bundle.programs(precision)
        for program in bundle.manifest.programs:
            now = device()
            if program in own and program.file in files - done:
                done.add(program.file)
                rows += now.program(program)
                if program.kind == Kind.CLASSIFY and program.precision == "float16":
                    rows += now.top_class()
            rows += now.maps(cases.get(program.file, []))
    if not rows:
        raise InputError(f"{bundle.path}: nothing to check with these programs: 'camrt info' lists them")
    return DeviceReport(str(engine), tuple(rows), time.perf_counter() - started)


@dataclass(frozen=True)
class _Run:
    """One run of a program, as users run it. rows: of the references; factors: what multiplies their gradients."""

    name: str
    images: np.ndarray
    seeds: np.ndarray
    rows: list[int]
    factors: np.ndarray


class _Device:
    """A backend and precision, against the references."""

    def __init__(self, explainer: Explainer, references: References, progress: Callable[[str], None]) -> None:
        self._explainer = explainer
        self._session = explainer.session
        self._manifest = explainer.manifest
        self._references = references
        self._images = references.images
        self._progress = progress
        self._label = "methods" if explainer.precision == "fp32" else f"methods {explainer.precision}"

    # ---- pictures

    def preprocessing(self) -> Iterator[Row]:
        """On a GPU: its resized pictures are Pillow's, to the bit."""
        stream = self._session.memory.stream
        if stream is None or self._manifest.preprocess is None or self._manifest.input_shape[0] != 3:
            return
        upper = self._references.pixels[0, :, : self._manifest.input_shape[1] * 3 // 4]
        picture = np.ascontiguousarray(upper.transpose(1, 2, 0))

        def distance() -> float:
            batch = ImageBatch([picture], self._manifest)
            with self._session.exclusive():
                (got,) = self._session.memory.get(batch.on_gpu(stream))
            return float(np.abs(got - batch.on_host()).max())

        yield self._row("preprocessing", "a resized picture", distance, 0.0)

    # ---- programs

    def program(self, program: Program) -> Iterator[Row]:
        self._progress(f"checking {program.file}")
        for run in self._runs(program):
            try:
                with self._session.exclusive():
                    feeds = feeds_of(self._session, program, run.images, run.seeds)
                    out = self._session.open(program).run(feeds)
                program.check_outputs(feeds, out)
            except (CamrtError, DeviceError) as error:
                yield _failed(program.file, run.name, str(error))
                continue
            bad = next((name for name, array in out.items() if not np.isfinite(array).all()), None)
            if bad is not None:
                yield _failed(program.file, f"finite, {run.name}", f"NaN or infinity in {bad}")
            else:
                yield from self._compared(program, run, out)

    def _runs(self, program: Program) -> Iterator[_Run]:
        """All images, twice; of a program that masked images run through, as many as these; one alone; one with three
        targets, of which the second is twice the first.
        """
        images, seeds, count = self._images, self._references.seeds, len(self._images)
        if count > 1:
            rows = [*range(count)] * 2
            yield _Run(f"{len(rows)} images", images[rows], seeds[rows], rows, np.ones(len(rows)))
            if program.kind == Kind.MASKED:
                rows = [i % count for i in range(self._session.mask_batch)]
                yield _Run(f"{len(rows)} images", images[rows], seeds[rows], rows, np.ones(len(rows)))
        yield _Run("one image", images[:1], seeds[:1], [0], np.ones(1))
        if count > 1 and "seed" in program.inputs:
            shared = self._manifest.seeds_share_image and program.kind != Kind.FULL_GRAD
            factors = np.array([1.0, 2.0, 1.0])
            same = images[:1] if shared else np.repeat(images[:1], len(factors), axis=0)
            given = (seeds[:1] * factors[:, None]).astype(np.float32)
            yield _Run("three targets", same, given, [0] * len(factors), factors)

    def _compared(self, program: Program, run: _Run, out: Mapping[str, np.ndarray]) -> Iterator[Row]:
        taps = [t for t in self._manifest.taps if t.name in program.taps]
        if "logits" in out:
            rows = run.rows[: len(out["logits"])]
            distance = row_distance(out["logits"].astype(np.float64), self._references.logits[rows].astype(np.float64))
            limit = float(self._limits(program, "logits")[0])
            yield Row(program.file, f"logits, {run.name}", distance, 0.0, limit)
        for kind, arrays in of_layers(program, taps, out).items():
            rows = run.rows[: len(arrays[0])]
            factors = np.ones(len(rows)) if kind == "activation" else run.factors
            layers = [self._manifest.taps.index(t) for t in taps]
            wanted = self._references.tensors[kind][layers][:, rows].astype(np.float64) * factors[:, None]
            found = [  # below: the layer that is nearest to its limit, or farthest beyond it
                Row(program.file, f"{kind} {t.name}, {run.name}", row_distance(signed_sums(a), want), 0.0, float(limit))
                for t, a, want, limit in zip(taps, arrays, wanted, self._limits(program, kind), strict=True)
            ]
            yield max(found, key=lambda row: row.distance / row.limit)

    def _limits(self, program: Program, kind: str) -> np.ndarray:
        """Of the program's layers."""
        if program.precision != "float32":
            return self._references.limits[f"{program.file} {kind}"]
        limits = self._references.limits[kind]
        return limits if kind == "logits" else limits[[t.name in program.taps for t in self._manifest.taps]]

    # ---- methods

    def cases(self, files: Collection[str]) -> dict[str, list[Case]]:
        """The calls that these programs suffice for, by the file that is last in the manifest of those they need."""
        order = {program.file: i for i, program in enumerate(self._manifest.programs)}
        found: dict[str, list[Case]] = {}
        for case in self._references.cases:
            needed = self._programs_of(case)
            if needed <= set(files):
                found.setdefault(max(needed, key=lambda file: order[file]), []).append(case)
        return found

    def top_class(self) -> Iterator[Row]:
        def distance() -> float:
            return class_distance(self._explainer.classify(self._images), self._references.logits.astype(np.float64))

        yield self._row(self._label, "top class", distance, CLASS_LIMIT)

    def maps(self, cases: Iterable[Case]) -> Iterator[Row]:
        result: Explanation | None = None
        for case in cases:
            self._progress(f"checking {case.label}")
            gpu, distances = self._explainer.backend.gpu, []
            try:
                for _ in range(REPLAYS if gpu is not None and gpu.captures and case.retune is None else 1):
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # a map of zeros is compared too
                        if case.retune is None or result is None:
                            result = self._explained(case)
                        retuned = result if case.retune is None else result.retune(**case.retune)
                    distances.append(self._map_distance(case, retuned.maps))  # `explain` refuses NaN
            except (CamrtError, DeviceError) as error:
                result = None
                yield _failed(self._label, case.label, str(error))
                continue
            yield Row(self._label, case.label, max(distances), 0.0, self._limit(case))

    def _explained(self, case: Case) -> Explanation:
        images, seeds = self._images[: case.images], self._references.seeds[: case.images]
        return self._explainer.explain(images, case.method, seeds, case.layers, **case.options)

    def _map_distance(self, case: Case, maps: np.ndarray) -> float:
        samples, sums = sampled(maps)
        want = case.samples.astype(np.float64), case.sums.astype(np.float64)
        if not np.isfinite(self._limit(case)):
            return 0.0  # nothing to compare with: that it ran is what counts
        if self._explainer.precision == "fp16":
            return max(cosine_distance(samples, want[0]), cosine_distance(sums, want[1]))
        return map_distance((samples, sums), want, maps.shape[1:])

    def _limit(self, case: Case) -> float:
        """Infinite for masked images in int8, which have none; in that precision, everything else is float32."""
        if self._explainer.precision != "int8":
            return case.limits[self._explainer.precision]
        masks = issubclass(method_named(case.method).data(case.options), MaskedRuns)
        return float("inf") if masks else case.limits["fp32"]

    def _programs_of(self, case: Case) -> set[str]:
        """Files of the programs that a call needs."""
        method = method_named(case.method)
        data, names = method.data(case.options), chosen_layers(self._manifest, method, case.layers)
        kinds = {*data.kinds}
        programs = []
        if issubclass(data, MaskedRuns):
            kinds = kinds - {Kind.CLASSIFY} | ({Kind.NORMALIZE} if self._manifest.normalized is not None else set())
            on_gpu = self._session.memory.stream is not None
            programs.append(self._session.bundle.mask_program(self._explainer.precision, on_gpu))
        without_layers = (Kind.CLASSIFY, Kind.NORMALIZE, Kind.FULL_GRAD)
        programs += [self._session.program(k, () if k in without_layers else names) for k in kinds]
        if method.seeds is not None:
            programs.append(self._session.exact_logits_program)
        return {program.file for program in programs}

    def _row(self, program: str, subject: str, measure: Callable[[], float], limit: float) -> Row:
        try:
            return Row(program, subject, measure(), 0.0, limit)
        except (CamrtError, DeviceError) as error:
            return _failed(program, subject, str(error))


def feeds_of(session: Session, program: Program, images: np.ndarray, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """A program's inputs for images and seeds; where it reads what another program gives, that one runs before."""
    known = {"image": images, "seed": seeds, "ratio": np.zeros((len(seeds), 1), np.float32)}
    before = {Kind.HEAD: (Kind.TRUNK, program.taps), Kind.SCORE: (Kind.NORMALIZE, ())}
    if session.manifest.normalized is not None:
        before[Kind.MASKED] = (Kind.NORMALIZE, ())
    if program.kind in before:
        source = session.program(*before[Kind(program.kind)])
        known |= session.open(source).run({"image": images})
    known["masked"] = known.get("normalized", images).astype(np.float16)
    return {name: known[name] for name in program.inputs}


def _failed(program: str, subject: str, problem: str) -> Row:
    return Row(program, subject, float("nan"), 0.0, 0.0, problem)
