"""The comparisons of `camrt verify`, one row each: a bundle's result against PyTorch's in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.probes import as_pixels, last_bits
from ..kernels import minmax
from ..runtime.backends import Backend
from ..runtime.bundle.kinds import Kind
from ..runtime.bundle.manifest import Program
from ..runtime.bundle.reading import Bundle
from ..runtime.cams import GridMaps
from ..runtime.cams.gradient import full_grad
from ..runtime.explainer import Explainer
from .distances import (
    ACTIVATION_LIMIT,
    CLASS_LIMIT,
    HALF_LIMIT,
    MAP_LIMIT,
    Row,
    class_distance,
    cosine_distance,
    largest_difference,
    relative_l2,
)
from .oracle import Oracle
from .recorder import FLOAT32_RUNS

if TYPE_CHECKING:
    from ..export.pytorch.autograd import Record

GRAPH_LIMIT = 1e-6  # relative L2 of a program's arithmetic in float64; its constants are still float32
FULL_GRAD_LIMIT = 1e-5  # largest difference of its map, computed in float64 and summed in float32
SOURCE_LIMIT = 1e-4  # relative L2 from the source file, run in float32
ROUNDED_LIMIT = 5e-2  # the same, if the source file computes in float16 or is quantised
PERCENTILES = (0, 50, 90, 100)
FULL_GRAD_RUNS = 3  # samples of PyTorch float32's own distance from FullGrad; each needs a whole backward pass
FLOAT32_UNITS = 16  # the images of these samples differ by about this many units in the last place
QUANTISED_UNITS = 2**14  # the same for a quantised network: about 1e-3 of each number


@dataclass(frozen=True)
class MapComparison:
    """How the maps of one precision are compared. label: `program` of the rows; distance: (got, want) -> number."""

    label: str
    distance: Callable[[np.ndarray, np.ndarray], float]
    limit: float

    @classmethod
    def of(cls, precision: str, engine: str) -> MapComparison:
        if precision == "fp32":
            return cls("methods", largest_difference, MAP_LIMIT)
        return cls(f"methods fp16 {engine}", cosine_distance, HALF_LIMIT)


Records = tuple["Record", "Record"]  # of the layers as they are, and of the layers behind their norms
Pick = Callable[[Records], np.ndarray]


@dataclass
class Comparison:
    """A comparison with float64, whose limit awaits PyTorch float32's own distance. want: gives float64's result, which
    is not kept where it is large; pick: records -> what is compared; runs: how many of float32's records count; own:
    their largest distance so far. Otherwise as `Row`.
    """

    program: str
    subject: str
    want: Callable[[], np.ndarray]
    pick: Pick
    measure: Callable[[np.ndarray, np.ndarray], float]
    floor: float
    runs: int
    distance: float = float("nan")
    own: float = 0.0
    problem: str = ""

    def take(self, got: np.ndarray) -> Comparison:
        """What the bundle gave. If the shapes or dtypes differ, or there is a NaN, the row fails."""
        try:
            if got.dtype != np.float32:
                raise ValueError(f"dtype {got.dtype} instead of float32")
            self.distance = self.measure(got.astype(np.float64), self.want())
        except ValueError as error:
            self.problem = str(error)
        return self

    def take_float32(self, records: Records) -> None:
        """What PyTorch gave in float32."""
        try:
            self.own = max(self.own, self.measure(self.pick(records).astype(np.float64), self.want()))
        except ValueError as error:
            self.problem = str(error)

    def row(self) -> Row:
        """The limit is `floor`, or twice PyTorch float32's own distance if that is more."""
        if self.problem:
            return Row(self.program, self.subject, float("nan"), float("nan"), self.floor, self.problem)
        return Row(self.program, self.subject, self.distance, self.own, max(self.floor, 2 * self.own))


def kept(array: np.ndarray) -> Callable[[], np.ndarray]:
    """For a comparison's `want` that is small, or takes long to compute."""
    return lambda: array


def finished(found: Iterable[Row | Comparison], singles: Iterable[Records]) -> tuple[Row, ...]:
    """The rows, in their order. singles: PyTorch float32's records, of which only one is held at a time."""
    found = list(found)
    waiting = [c for c in found if isinstance(c, Comparison)]
    runs = 0
    for records in singles:  # not in enumerate(), which holds what it gave last
        for comparison in waiting:
            if runs < comparison.runs and not comparison.problem:
                comparison.take_float32(records)
        del records
        runs += 1  # noqa: SIM113
    return tuple(c.row() if isinstance(c, Comparison) else c for c in found)


def top_class_row(program: str, logits: np.ndarray, double: Record) -> Row:
    return Row(program, "top class", class_distance(logits, double.logits.numpy()), 0.0, CLASS_LIMIT)


def compared(
    program: str,
    subject: str,
    got: np.ndarray,
    want: np.ndarray,
    own: Sequence[np.ndarray],
    measure: Callable[[np.ndarray, np.ndarray], float],
    floor: float,
) -> Row:
    """Compares in float64. If the shapes or dtypes differ, or there is a NaN, the row fails.

    own: PyTorch float32's results; the limit is `floor`, or twice their largest distance if that is more.
    """
    try:
        if got.dtype != np.float32:
            raise ValueError(f"dtype {got.dtype} instead of float32")
        distance = measure(got.astype(np.float64), want)
        torch_float32 = max((measure(o.astype(np.float64), want) for o in own), default=0.0)
    except ValueError as error:
        return Row(program, subject, float("nan"), float("nan"), floor, str(error))
    return Row(program, subject, distance, torch_float32, max(floor, 2 * torch_float32))


def program_rows(
    file: str, out: dict[str, np.ndarray], taps: Sequence[str], double: Records, steps: bool
) -> Iterator[Comparison]:
    """For the logits, activations, gradients and maps of one program. out: its outputs.

    steps: whether the network is quantised, so that its activations change in steps.
    """

    def row(subject: str, name: str, pick: Callable[[Record], Any], continuous: bool) -> Comparison:
        def of(records: Records) -> np.ndarray:
            return pick(records[0]).numpy()

        runs = 1 if continuous and not steps else FLOAT32_RUNS
        return Comparison(file, subject, lambda: of(double), of, relative_l2, ACTIVATION_LIMIT, runs).take(out[name])

    if "logits" in out:
        yield row("logits", "logits", lambda r: r.logits, True)
    for tap in taps:
        for name in ("activation", f"activation:{tap}"):
            if name in out:
                yield row(f"activation {tap}", name, lambda r, t=tap: r.activations[t], True)
        if f"gradient:{tap}" in out:
            yield row(f"gradient {tap}", f"gradient:{tap}", lambda r, t=tap: r.gradients[t], False)
    if "alphas" in out:
        yield row("alphas", "alphas", lambda r: _side_by_side(r, taps)[0], False)
        yield row("maps", "maps", lambda r: _side_by_side(r, taps)[1], False)


def signed_row(file: str, out: dict[str, np.ndarray], double: Records) -> Comparison:
    """The maps of the signed_maps program, run with the ratio 0."""
    import torch

    def maps(records: Records) -> np.ndarray:
        behind = records[1]
        pairs = zip(behind.activations.values(), behind.gradients.values(), strict=True)
        return torch.cat([(y * g / 2).sum(1).flatten(1) for y, g in pairs], 1).numpy()

    arguments = kept(maps(double)), maps, relative_l2, ACTIVATION_LIMIT, FLOAT32_RUNS
    return Comparison(file, "signed maps", *arguments).take(out["maps"])


def head_row(
    bundle: Bundle, engine: Backend, program: Program, batch: np.ndarray, double: Records, steps: bool
) -> Comparison:
    """Runs a head as methods do: with three activations of one image, here unchanged, and its context repeated."""
    trunk = bundle.program(Kind.TRUNK, program.taps)
    out = engine.open(bundle, trunk).run({"image": batch[:1]})
    inputs = {name: np.repeat(out[name], 3, axis=0) for name in program.inputs}
    got = engine.open(bundle, program).run(inputs)["logits"]

    def logits(records: Records) -> np.ndarray:
        return np.repeat(records[0].logits[:1].numpy(), 3, axis=0)

    arguments = kept(logits(double)), logits, relative_l2, ACTIVATION_LIMIT, FLOAT32_RUNS if steps else 1
    return Comparison(program.file, "several activations of one image", *arguments).take(got)


def _side_by_side(recorded: Record, taps: Sequence[str]) -> tuple[Any, Any]:
    """Alphas (B, sum K) and maps (B, sum h w), as the layer_maps program lays them out."""
    import torch

    from ..export.pytorch.autograd import select
    from .methods import layer_cam_maps

    alphas, maps = layer_cam_maps(select(recorded, taps))
    return torch.cat(alphas, 1), torch.cat([m.flatten(1) for m in maps], 1)


def use_rows(
    bundle: Bundle, engine: Backend, batch: np.ndarray, seed: np.ndarray, double: Records
) -> Iterator[Comparison]:
    """The widest layer_maps program as users run it: one image alone, and one image with two targets.

    The second target is twice the first, whose maps must be twice the first's.
    """
    program = max((p for p in bundle.manifest.programs if p.kind == Kind.LAYER_MAPS), key=lambda p: len(p.taps))
    executable = engine.open(bundle, program)

    def maps(records: Records) -> np.ndarray:
        return _side_by_side(records[0], program.taps)[1][:1].numpy()

    def row(subject: str, got: np.ndarray) -> Comparison:
        arguments = kept(maps(double)), maps, relative_l2, ACTIVATION_LIMIT, FLOAT32_RUNS
        return Comparison(program.file, subject, *arguments).take(got)

    yield row("single image", executable.run({"image": batch[:1], "seed": seed[:1]})["maps"])
    count = 1 if bundle.manifest.seeds_share_image else 2
    feeds = {"image": np.repeat(batch[:1], count, axis=0), "seed": np.concatenate([seed[:1], 2 * seed[:1]])}
    if bundle.manifest.batch == 1:
        return
    got = executable.run(feeds)["maps"]
    for i, subject in enumerate(("several targets, first", "several targets, second")):
        yield row(subject, got[i : i + 1] / (i + 1))


def source_rows(bundle: Bundle, engine: Backend, batch: np.ndarray) -> Iterator[Row]:
    """If the bundle's ONNX source file exists: compares the logits with ONNX Runtime's result of the original file."""
    from ..export.check import finished
    from ..export.files.from_onnx import read_graph, source_logits
    from ..export.graph import Attempt

    manifest = bundle.manifest
    spec = manifest.source.get("spec")
    if manifest.source["kind"] != "onnx" or not spec or not Path(spec).is_file():
        return
    graph = read_graph(spec, manifest.input_shape, [], manifest.source["output"], attempt=Attempt(manifest.batch == 1))
    source = source_logits(Path(spec), manifest.source["output"], graph)
    if graph.whole_numbers:
        batch = as_pixels(batch)
    source_scores = [source(image[None]) for image in batch]
    if any(f is None for f in source_scores):
        return
    want = np.concatenate([np.asarray(f).reshape(1, -1) for f in source_scores]).astype(np.float64)
    logits = engine.open(bundle, bundle.program(Kind.CLASSIFY)).run({"image": batch})["logits"]
    got = np.stack([finished(row, manifest.final_activation) for row in logits]).astype(np.float32)
    limit = ROUNDED_LIMIT if graph.rounded else SOURCE_LIMIT
    yield compared("classify.onnx", "scores of the source file", got, want, [], relative_l2, limit)


def graph_rows(
    bundle: Bundle,
    precision: str,
    batch: np.ndarray,
    seed: np.ndarray,
    double: Record,
    progress: Callable[[str], None],
) -> Iterator[Row]:
    """The widest gradient program's arithmetic, in float64, without ONNX Runtime."""
    program = bundle.program(Kind.GRADIENTS, [t.name for t in bundle.manifest.taps], precision)
    progress(f"checking {program.file} in float64")
    names = [f"gradient:{tap}" for tap in program.taps]
    out = _in_float64(bundle, program, batch, seed, names)
    for tap, name in zip(program.taps, names, strict=True):
        subject = f"float64 gradient {tap}"
        try:
            distance = relative_l2(out[name], double.gradients[tap].numpy())
            yield Row(program.file, subject, distance, 0.0, GRAPH_LIMIT)
        except ValueError as error:
            yield Row(program.file, subject, float("nan"), 0.0, GRAPH_LIMIT, str(error))


def _in_float64(
    bundle: Bundle, program: Program, batch: np.ndarray, seed: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """A program's outputs, computed in float64 without ONNX Runtime, one image after another, for the memory."""
    import torch

    from ..export.interpreter import Interpreter

    interpreter, parts = Interpreter(bundle.file(program)), []
    with torch.no_grad():
        for i in range(len(batch)):
            feeds = {"image": batch[i : i + 1], "seed": seed[i : i + 1]}
            parts.append(interpreter.run({n: torch.from_numpy(a).double() for n, a in feeds.items()}, names))
    return {name: np.concatenate([part[name].numpy() for part in parts]) for name in names}


def method_rows(
    explainer: Explainer,
    what: MapComparison,
    batch: np.ndarray,
    seed: np.ndarray,
    double: Records,
    progress: Callable[[str], None],
) -> Iterator[Comparison]:
    """Maps of Winsor-CAM and Integrative CAM, and, at the last block, of every method in LAYER_METHODS."""
    from ..export.pytorch.autograd import select
    from .methods import LAYER_METHODS, integrative_cam, integrative_residual, winsor_cam

    size = batch.shape[2:]
    roles = {role: [t.name for t in explainer.manifest.taps if role in t.roles] for role in ("conv", "last")}

    def row(subject: str, got: np.ndarray, compute: Callable[[Record], Any], behind: bool = False) -> Comparison:
        def maps(records: Records) -> np.ndarray:
            return minmax(compute(records[behind]).numpy())

        arguments = kept(maps(double)), maps, what.distance, what.limit, FLOAT32_RUNS
        return Comparison(what.label, subject, *arguments).take(minmax(got))

    if roles["conv"]:
        progress("checking winsor_cam")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a map of zeros is compared too
            first = explainer.explain(batch, "winsor_cam", seed, percentile=PERCENTILES[0])
            for aggregation in ("mean", "max"):
                for p in PERCENTILES:
                    got = first.retune(percentile=p, layer_aggregation=aggregation).maps
                    options = (size, p, aggregation)
                    subject = f"winsor_cam {aggregation} p{p}"
                    yield row(subject, got, lambda r, o=options: winsor_cam(select(r, roles["conv"]), *o)[0])
        progress("checking integrative_cam")
        got = explainer.explain(batch, "integrative_cam", seed, "conv").maps
        yield row(
            "integrative_cam",
            got,
            lambda r: integrative_cam(select(r, roles["conv"]), _seed_like(r, seed), size)[0],
            behind=True,
        )
        got = explainer.explain(batch, "integrative_cam", seed, reading="residual").maps
        yield row(
            "integrative_cam residual",
            got,
            lambda r: integrative_residual(select(r, roles["conv"]), _seed_like(r, seed), size)[0],
        )
    if roles["last"]:
        for name, method in LAYER_METHODS.items():
            progress(f"checking {name}")
            got = explainer.explain(batch, name, seed).maps
            yield row(name, got, lambda r, m=method: m(select(r, roles["last"]), size))


def _seed_like(recorded: Record, seed: np.ndarray) -> Any:
    """The seed as a tensor of the record's precision."""
    import torch

    return torch.from_numpy(seed).to(recorded.logits.dtype)


@dataclass(frozen=True)
class FullGrads:
    """FullGrad's maps in float64, and PyTorch float32's."""

    double: np.ndarray
    singles: list[np.ndarray]


def full_grads(bundle: Bundle, oracle: Oracle, batch: np.ndarray, seed: np.ndarray, units: float) -> FullGrads | None:
    """FullGrad's reference maps; None if the bundle has no full_grad program. units: see FLOAT32_UNITS."""
    if not any(p.kind == Kind.FULL_GRAD for p in bundle.manifest.programs):
        return None
    singles = [oracle.full_grad(x, seed, False) for x in last_bits(batch, FULL_GRAD_RUNS, units)]
    double = [oracle.full_grad(batch[i : i + 1], seed[i : i + 1], True) for i in range(len(batch))]
    return FullGrads(np.concatenate(double), singles)


def full_grad_rows(
    explainer: Explainer, what: MapComparison, batch: np.ndarray, seed: np.ndarray, reference: FullGrads | None
) -> Iterator[Row]:
    if reference is not None:
        got = explainer.explain(batch, "full_grad", seed).maps
        yield compared(what.label, "full_grad", got, reference.double, reference.singles, what.distance, what.limit)


def full_grad_graph_rows(
    bundle: Bundle, precision: str, batch: np.ndarray, seed: np.ndarray, reference: FullGrads | None
) -> Iterator[Row]:
    """The program's own arithmetic in float64."""
    if reference is None:
        return
    program = bundle.program(Kind.FULL_GRAD, (), precision)
    names = [name for name in program.outputs if name.startswith("grid:")]
    maps = tuple(_in_float64(bundle, program, batch, seed, names).values())
    precise = full_grad(GridMaps((), seed, seed, maps, batch.shape[2:])).maps
    yield compared(
        program.file, "float64 full_grad", precise, reference.double, [], largest_difference, FULL_GRAD_LIMIT
    )
