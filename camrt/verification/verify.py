"""Checks a bundle against PyTorch in float64, tap by tap and method by method."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..export.probes import smooth_images
from ..kernels import DeviceError
from ..runtime.backends import Backend, Executable, Settings, create
from ..runtime.backends.cpu import give_back_freed
from ..runtime.bundle.kinds import Kind
from ..runtime.bundle.manifest import Program
from ..runtime.bundle.reading import Bundle, read_bundle
from ..runtime.errors import CamrtError
from ..runtime.explainer import Explainer
from .comparisons import (
    FLOAT32_UNITS,
    QUANTISED_UNITS,
    Comparison,
    FullGrads,
    MapComparison,
    Records,
    Row,
    finished,
    full_grad_graph_rows,
    full_grad_rows,
    full_grads,
    graph_rows,
    head_row,
    method_rows,
    program_rows,
    signed_row,
    source_rows,
    top_class_row,
    use_rows,
)
from .interpreted import InterpretedBackend
from .oracle import Oracle, open_oracle
from .recorder import Recorder, is_quantised, seeds_for


@dataclass(frozen=True)
class Report:
    """The result of `verify`. oracle: the reference's name. rows: one per comparison. own_backward: parts of the model
    whose backward pass is not the derivative of their forward pass, so gradients before them may differ.
    """

    oracle: str
    rows: tuple[Row, ...]
    own_backward: tuple[str, ...] = ()

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

    source: as for `camrt export`; by default what the bundle records. images: float32 (B, C, H, W); by default two
    smooth random ones. Limits: relative L2 of 1e-5 for activations and gradients; largest difference of 1e-3 for maps
    after min-max; or twice PyTorch float32's own distance, if that is more. 1e-6 for the gradient program's arithmetic
    in float64. `comparisons` has the other limits. CamrtError if the source does not fit the bundle or the GPU fails.
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
    backend: str | Backend = "auto",
    progress: Callable[[str], None] = lambda _: None,
    precisions: Sequence[str] | None = None,
) -> Report:
    """As `verify`, with an opened bundle and oracle. backend: a name, or an opened one.

    precisions: "fp32", "fp16"; by default all of the bundle.
    """
    report = _compared(bundle, oracle, images, backend, progress, precisions, steps=False)
    if report.passed or not is_quantised(bundle):
        return report
    progress("the network is quantised: comparing again, with larger changes of the images as the limit")
    return _compared(bundle, oracle, images, backend, progress, precisions, steps=True)


def _compared(
    bundle: Bundle,
    oracle: Oracle,
    images: np.ndarray | None,
    backend: str | Backend,
    progress: Callable[[str], None],
    precisions: Sequence[str] | None,
    steps: bool,
) -> Report:
    """steps: whether the network is quantised. Its activations change in steps, so the limits allow what a change of
    the images by about 1e-3 does.
    """
    manifest = bundle.manifest
    batch = smooth_images(manifest.input_shape) if images is None else images
    layers = [t.name for t in manifest.taps]
    if manifest.batch == 1:
        batch = batch[:1]
    seed = seeds_for(oracle, batch, manifest.num_classes, layers)
    units = QUANTISED_UNITS if steps else FLOAT32_UNITS
    progress(f"reference in float64: {oracle.name}")
    recorder = Recorder(bundle, oracle, batch, seed)
    with tempfile.TemporaryDirectory(prefix="camrt-") as folder:
        double = recorder.stored(batch, Path(folder))
        of_full_grad = full_grads(bundle, oracle, batch, seed, units)
        give_back_freed()
        chosen = bundle.precisions if precisions is None else precisions
        found = _by_engine(bundle, backend, chosen, batch, seed, double, of_full_grad, progress, steps)
        progress("comparing PyTorch in float32 with float64")
        rows = finished(found, recorder.singles(batch, units))
    return Report(oracle.name, rows, tuple(oracle.own_backward(batch[:1])))


def _by_engine(
    bundle: Bundle,
    backend: str | Backend,
    precisions: Sequence[str],
    batch: np.ndarray,
    seed: np.ndarray,
    double: Records,
    of_full_grad: FullGrads | None,
    progress: Callable[[str], None],
    steps: bool,
) -> list[Row | Comparison]:
    """What the backend gives, of every program and method. The programs are closed again when it returns."""
    settings = Settings(max_batch=max(16, len(batch)), keeps_memory=False)
    engine = _OneOpen(create(backend, settings) if isinstance(backend, str) else backend)
    by_method: list[Row | Comparison] = []
    for precision in precisions:
        by_method += graph_rows(bundle, precision, batch, seed, double[0], progress)
        by_method += full_grad_graph_rows(bundle, precision, batch, seed, of_full_grad)
        for run_by in [engine] if precision == "fp32" else [engine, InterpretedBackend(rounding=True)]:
            explainer = Explainer(bundle, run_by, precision=precision)
            what = MapComparison.of(precision, str(run_by.name))
            if precision == "fp16":
                by_method.append(top_class_row(what.label, explainer.classify(batch), double[0]))
            by_method += method_rows(explainer, what, batch, seed, double, progress)
            by_method += full_grad_rows(explainer, what, batch, seed, of_full_grad)
    rows = list(_of_programs(bundle, engine, batch, seed, double, progress, steps))
    if "fp32" in precisions:
        rows += use_rows(bundle, engine, batch, seed, double)
        rows += source_rows(bundle, engine, batch)
    return rows + by_method


def _of_programs(
    bundle: Bundle,
    engine: Backend,
    batch: np.ndarray,
    seed: np.ndarray,
    double: Records,
    progress: Callable[[str], None],
    steps: bool,
) -> Iterator[Row | Comparison]:
    """The outputs of every float32 program, and the top class of the float16 program for masked images."""
    cut, scored = {}, batch
    for program in bundle.manifest.programs:
        if program.kind == Kind.MASKED and program.precision == "float16":  # of int8, `details` report the error
            logits = engine.open(bundle, program).run({"masked": scored.astype(np.float16)})["logits"]
            yield top_class_row(program.file, logits, double[0])
        if program.precision != "float32":
            continue
        progress(f"checking {program.file}")
        inputs = cut | {"image": batch, "seed": seed, "ratio": np.zeros((len(seed), 1), np.float32)}
        executable = engine.open(bundle, program)
        out = executable.run({name: inputs[name] for name in program.inputs})
        if program.kind in (Kind.TRUNK, Kind.NORMALIZE):
            cut = out  # inputs of the next program in the manifest: the head or score program
            scored = out.get("normalized", scored)
        yield from program_rows(program.file, out, program.taps, double, steps)
        if program.kind == Kind.SIGNED_MAPS:
            yield signed_row(program.file, out, double)
        if program.kind == Kind.HEAD and bundle.manifest.batch != 1:
            yield head_row(bundle, engine, program, batch, double, steps)


class _OneOpen:
    """A backend that on a CPU keeps only the program open that ran last: all of them together would hold many copies of
    the weights.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._opened: dict[tuple[str, tuple[str, ...], bool], Executable] = {}
        self.name, self.lanes, self.prunes, self.gpu = backend.name, backend.lanes, backend.prunes, backend.gpu

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> _Reopened:
        return _Reopened(self, bundle, program, concurrent)

    def opened(self, bundle: Bundle, program: Program, concurrent: bool) -> Executable:
        key = (program.file, program.taps, concurrent)
        if key not in self._opened:
            if self.gpu is None:
                self._opened.clear()
                give_back_freed()
            self._opened[key] = self._backend.open(bundle, program, concurrent)
        return self._opened[key]


@dataclass(frozen=True)
class _Reopened:
    """A program that is opened when it runs, unless it is still open."""

    engine: _OneOpen
    bundle: Bundle
    program: Program
    concurrent: bool

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return self.engine.opened(self.bundle, self.program, self.concurrent).run(feeds)
