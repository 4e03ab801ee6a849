"""The last step of every export: ONNX Runtime opens each program's file and runs it on two images, or on one where the
batch is fixed at 1.

A bundle that does not load, does not run, or gives other logits than its source is not put in place.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..runtime.backends.one_file import Run, open_file
from ..runtime.bundle.kinds import Kind
from ..runtime.bundle.manifest import Manifest, Program
from ..runtime.errors import CamrtError, ExportError, warn
from .autodiff import on_path
from .graph import TappedGraph, named_values
from .layers.layouts import layouts, tap_at
from .probes import as_pixels, smooth_images
from .programs import gradients
from .tape import static_dims

SOURCE_LIMIT = 1e-3  # relative L2 of logits from the source's: two float32 programs on the same image
ROWS_LIMIT = 1e-3  # relative L2 of a batch's logits from those of its images alone
# both limits, where the source computes in float16 or is quantised: one different rounding changes all later values
ROUNDED_LIMIT = 5e-2
HALF_LIMIT = 1e-2  # both limits, where the bundle itself computes in float16
LARGE = 32e6  # bytes of a program's outputs for one image; above this the images are run one after another
GRADIENT_LIMIT = 0.1  # relative L2 of a gradient from PyTorch's; above this float64 decides
WRONG_GRADIENT = 0.5  # relative L2, of a model that does not run in float64: rounding alone does not reach it

# one image (1, C, H, W) -> what the source gives, None where it cannot be run
Logits = Callable[[np.ndarray], np.ndarray | None]


class RowsMixed(CamrtError):
    """A free batch does not work: its images change one another's logits, its logits are not the source's, or PyTorch
    cannot trace it. Batch 1 may work.
    """


class NotFinite(CamrtError):
    """An optional program (full_grad) gives NaN or infinity. kind: the program's kind."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"{kind} holds NaN or infinity for an ordinary image")
        self.kind = kind


class NothingRead(CamrtError):
    """The gradient of a layer of tokens is zero: behind the last attention the logits read the class token alone."""


class Checker:
    """Checks the programs of one bundle in its folder.

    source: image (1, C, H, W) -> the untouched model's scores, which are compared with the bundle's logits after the
    source's final activation; rounded: whether the source computes with less precision than float32; images
    (N, C, H, W), float32; accepts_zeros: whether a network may pass if all its gradients are zero.
    """

    def __init__(
        self, graph: TappedGraph, source: Logits, rounded: bool, images: np.ndarray, accepts_zeros: bool = False
    ) -> None:
        self._graph = graph
        self._source = source
        self._accepts_zeros = accepts_zeros
        self._limits: tuple[float, ...] = (ROUNDED_LIMIT,) * 2 if rounded else (SOURCE_LIMIT, ROWS_LIMIT)
        self.images = images
        self.gradients: dict[str, np.ndarray] = {}  # (1, K, h, w) of the first image, by layer
        self.cotangent: np.ndarray | None = None  # (B, classes), of the source's scores
        self.seed: np.ndarray | None = None  # (B, classes), the same cotangent of the logits

    def __call__(self, folder: Path, manifest: Manifest) -> None:
        """Runs and compares every program. ExportError or BundleError names the program that fails; RowsMixed if the
        batch must be 1; NotFinite; NothingRead.
        """
        images = self.images[:1] if manifest.batch == 1 else self.images
        classify = next(p for p in manifest.programs if p.kind == Kind.CLASSIFY)
        if classify.precision != "float32":
            self._limits = tuple(max(limit, HALF_LIMIT) for limit in self._limits)
        run = open_file(folder / classify.file)
        logits = self._outputs(classify, {"image": images}, run)["logits"]
        self._compare_rows(run, images, logits)
        self._compare_source(manifest, images, logits)
        self.cotangent, self.seed = seeds_through(logits, manifest.final_activation)
        inputs = {"image": images, "seed": self.seed, "ratio": np.ones((len(self.seed), 1), np.float32)}
        inputs["masked"] = images.astype(np.float16)
        vanished = []
        for program in manifest.programs:
            if program is classify:
                continue
            feeds = {name: inputs[name] for name in program.inputs}
            out = self._outputs(program, feeds, open_file(folder / program.file))
            told = [a for n, a in out.items() if n != "logits"] or list(out.values())
            if program.precision == "float16" and not any(a.any() for a in told):
                vanished.append(program.file)
            if program.kind in (Kind.TRUNK, Kind.NORMALIZE):
                inputs |= {n: a for n, a in out.items() if n != "logits"}
                inputs["masked"] = inputs.get("normalized", images).astype(np.float16)
            if (
                "logits" in out
                and len(out["logits"]) == len(logits)
                and program.kind in (Kind.HEAD, Kind.SCORE)
                and program.precision == "float32"
            ):
                self._same(program.file, out["logits"], logits, self._limits[1], "logits of the whole network")
            if (
                program.kind == Kind.GRADIENTS
                and program.precision == "float32"
                and len(program.taps) == len(manifest.taps)
            ):
                self.gradients = {t: out[f"gradient:{t}"][:1] for t in program.taps}
            del out, told  # large ones, before the next program's weights come
        dead = not any(g.any() for g in self.gradients.values())  # of a head of zeros, all gradients are
        if vanished and not (dead and self.gradients):
            warn(
                f"{', '.join(vanished)}: only zeros for an ordinary image, whose numbers are too small for float16: "
                "use fp32"
            )
        for tap in manifest.taps:
            unread = tap.prefix and tap.name in self.gradients and not self.gradients[tap.name].any()
            if unread and not (dead and self._accepts_zeros):
                raise NothingRead(f"the logits read none of the grid of {tap.name!r}, only its class token")

    def classifier(self, folder: Path, manifest: Manifest) -> Callable[[np.ndarray], np.ndarray]:
        """Logits (1, classes) of an image (1, C, H, W)."""
        classify = next(p for p in manifest.programs if p.kind == Kind.CLASSIFY)
        run = open_file(folder / classify.file)
        return lambda image: run({"image": image})["logits"]

    def _outputs(self, program: Program, feeds: dict[str, np.ndarray], run: Run) -> dict[str, np.ndarray]:
        """A program's outputs. If they are large, the images are run one after another, and the first image's outputs
        are returned.
        """
        if sum(math.prod(shape[1:]) for shape in program.outputs.values()) * 4 > LARGE:
            for i in range(1, len(feeds["image"])):
                self._checked(program, {n: a[i : i + 1] for n, a in feeds.items()}, run)
            feeds = {n: a[:1] for n, a in feeds.items()}
        return self._checked(program, feeds, run)

    def _checked(self, program: Program, feeds: dict[str, np.ndarray], run: Run) -> dict[str, np.ndarray]:
        out = run(feeds)
        program.check_outputs(feeds, out)
        bad = next((n for n, a in out.items() if not np.isfinite(a).all()), None)
        if bad is not None and program.kind == Kind.FULL_GRAD:
            raise NotFinite(program.kind)
        if bad is not None and program.precision == "float16":
            raise ExportError(
                f"{program.file}: {bad!r} holds NaN or infinity for an ordinary image: its numbers are too large for "
                "float16: export in fp32"
            )
        if bad is not None:
            raise ExportError(
                f"{program.file}: {bad!r} holds NaN or infinity for an ordinary image: check the model's weights, and "
                "whether it computes a root, a logarithm or a quotient of a number that may be 0, such as the standard "
                "deviation of a constant channel"
            )
        return out

    def _same(self, file: str, got: np.ndarray, want: np.ndarray, limit: float, what: str) -> None:
        distance = relative_l2(got, want)
        if distance > limit:
            raise ExportError(f"{file}: differs from the {what} by {distance:.1e} (relative L2; allowed {limit:.0e})")

    def _compare_source(self, manifest: Manifest, images: np.ndarray, logits: np.ndarray) -> None:
        """Compares the logits with the source's. ExportError where they differ, but RowsMixed with a free batch, since
        batch 1 may still agree. ExportError if the source gives other logits each time.
        """
        for image, row in zip(images, logits, strict=True):
            want = self._source(image[None])
            if want is None:
                return
            got = finished(row, manifest.final_activation)
            if want.size != got.size:
                raise ExportError(f"the source gives {want.size} numbers for an image, the bundle {got.size}")
            distance, limit = relative_l2(got, want.astype(np.float64).reshape(got.shape)), self._limits[0]
            if distance > limit:
                again = self._source(image[None])
                if again is not None and relative_l2(again, want) > limit:
                    raise ExportError(
                        "the model gives different logits for the same image each time it runs: it draws random "
                        "numbers (dropout or noise that eval() does not turn off): remove them from the model"
                    )
                difference = (
                    f"its logits for one image differ from the source's by {distance:.1e} (relative L2; allowed "
                    f"{limit:.0e})"
                )
                raise (
                    ExportError(f"the bundle: {difference}")
                    if manifest.batch == 1
                    else RowsMixed(f"with a free batch {difference}")
                )

    def _compare_rows(self, run: Run, images: np.ndarray, logits: np.ndarray) -> None:
        if len(images) < 2:
            return
        single_logits = np.concatenate([run({"image": image[None]})["logits"] for image in images])
        if relative_l2(logits, single_logits) > self._limits[1]:
            raise RowsMixed(first_mixing(self._graph, images))


def finished(logits: np.ndarray, activation: str | None) -> np.ndarray:
    """The source's final activation ("Softmax", "Sigmoid", "LogSoftmax" or None) of one image's logits, float64."""
    z = logits.astype(np.float64)
    if activation == "Sigmoid":
        return 1 / (1 + np.exp(-z))
    if activation is None:
        return z
    shifted = z - z.max()
    log = shifted - np.log(np.exp(shifted).sum())
    return log if activation == "LogSoftmax" else np.exp(log)


def seeds_through(logits: np.ndarray, activation: str | None) -> tuple[np.ndarray, np.ndarray]:
    """(cotangent of the source's scores, cotangent of the logits), both (B, classes) float32: the gradient of the top
    class's score, scaled so that the largest entry for the logits is 1. Where the scores are saturated, the row for the
    logits is 0.
    """
    cotangent = np.eye(logits.shape[1])[logits.argmax(axis=1)]
    if activation is None:
        return cotangent.astype(np.float32), cotangent.astype(np.float32)
    seeds = np.zeros(logits.shape)
    for row, (z, v) in enumerate(zip(logits, cotangent, strict=True)):
        scores = finished(z, activation)
        if activation == "Sigmoid":
            seed = v * scores * (1 - scores)
        elif activation == "Softmax":
            seed = scores * (v - v @ scores)
        else:
            seed = v - np.exp(scores) * v.sum()
        largest = np.abs(seed).max()
        if largest > 0:  # else the scores are saturated
            seeds[row], cotangent[row] = seed / largest, v / largest
    return cotangent.astype(np.float32), seeds.astype(np.float32)


def zero_gradients(graph: TappedGraph) -> frozenset[str]:
    """Names of the token maps with a prefix (class or register tokens) whose gradient on the grid is zero for a test
    image; empty if it is zero for all of them.
    """
    layout_by_value = layouts(graph.model.graph)
    computed = [v for v in layout_by_value if v.producer() is not None and v.dtype == ir.DataType.FLOAT]
    token_layouts = {str(v.name): layout_by_value[v] for v in computed if layout_by_value[v].prefix}
    values = named_values(graph.model.graph)
    on_way = on_path(graph.model.graph, [graph.model.graph.inputs[0]], values[graph.logits])
    names = [n for n in token_layouts if values[n] in on_way]
    taps = tuple((tap_at(n, (), values[n], token_layouts[n], "none"), n) for n in names)
    image = smooth_images(static_dims(graph.model.graph.inputs[0]))[:1]
    classes = static_dims(values[graph.logits])[0]
    seed = np.random.default_rng(0).standard_normal((1, classes)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gradients.onnx"
        ir.save(gradients(replace(graph, taps=taps)), path)
        out = open_file(path)({"image": as_pixels(image) if graph.whole_numbers else image, "seed": seed})
    zero = frozenset(n for n in names if not out[f"gradient:{n}"].any())
    return zero if len(zero) < len(names) else frozenset()


def relative_l2(got: np.ndarray, want: np.ndarray) -> float:
    """The L2 norm of got - want, divided by the L2 norm of want (by 1 if that is 0)."""
    norm = float(np.linalg.norm(want))
    return float(np.linalg.norm(got.astype(np.float64) - want)) / (norm if norm > 0 else 1.0)


def first_mixing(graph: TappedGraph, images: np.ndarray) -> str:
    """A clause about the first node whose output for a batch differs from its outputs for single images."""
    model = graph.model.clone()
    model.graph.inputs[0].name = "image"
    values = [y for node in model.graph for y in node.outputs if y.dtype == ir.DataType.FLOAT and y.name]
    names = {y: f"value_{i}" for i, y in enumerate(values)}
    for y, name in names.items():
        same = ir.node("Identity", [y])
        same.outputs[0].name, same.outputs[0].shape, same.outputs[0].type = name, y.shape, y.type
        model.graph.append(same)
        model.graph.outputs.append(same.outputs[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "values.onnx"
        ir.save(model, path)
        run: Run = open_file(path)
        together = run({"image": images})
        singles = [run({"image": image[None]}) for image in images]
    for y, name in names.items():
        got, parts = together[name], [a[name] for a in singles]
        axis = next((i for i, (n, m) in enumerate(zip(got.shape, parts[0].shape, strict=True)) if n != m), None)
        want = parts[0] if axis is None else np.concatenate(parts, axis=axis)
        if got.shape != want.shape or relative_l2(got, want) > ROWS_LIMIT:
            node = y.producer()
            assert node is not None
            return f"{node.op_type} (node {node.name!r}) mixes the images of a batch"
    return "the images of a batch change one another's values"


def looks_like_probabilities(
    run: Callable[[np.ndarray], np.ndarray], images: np.ndarray, behind_product: bool
) -> str | None:
    """Describes the scores if they look like probabilities for the images (N, C, H, W), and for these times 20 and -20;
    else None.

    run: image (1, C, H, W) -> scores (1, classes). behind_product: whether a matrix product or a convolution computes
    the scores, which may then lie between 0 and 1 by chance.
    """
    stretched = np.concatenate([images, 20 * images, -20 * images])
    scores = np.concatenate([run(image[None]) for image in stretched]).astype(np.float64)
    sums = scores.sum(axis=1)
    if scores.min() < -1e-6 or np.ptp(scores) < 1e-6:
        return None
    if scores.shape[1] > 1 and sums.max() > 0 and np.ptp(sums) < 1e-3 * np.ptp(scores):  # not: large biases
        return f"rows that sum to {sums.mean():.3g}"
    return "numbers between 0 and 1" if scores.max() <= 1 + 1e-6 and not behind_product else None


def warn_of_probabilities(seem: str | None, made_of: str | None) -> None:
    """Warns that the scores are probabilities. seem: what they look like; made_of: the operator that computes them."""
    observation = (
        f"the scores look like probabilities ({seem}), and no logits were found before them"
        if seem is not None
        else f"the scores are computed from a {made_of}, whose input was not recognised as the logits"
    )
    warnings.warn(
        f"{observation}: gradients are those of these scores, which are small where the network is confident, and "
        "Score-CAM's weights are a softmax of them; export the model without its final activation, or name the output "
        "before it",
        stacklevel=4,
    )


def check_gradients(
    found: dict[str, np.ndarray],
    wanted: dict[str, np.ndarray],
    own: Sequence[str],
    exact: Callable[[], dict[str, float]],
) -> None:
    """Compares the gradients `found` with PyTorch's, `wanted`, layer by layer. ExportError if one differs; only a
    warning if `own` names classes with custom backward passes.

    exact: computes the distances {layer: relative L2} in float64, or none if the model does not run in float64; called
    only if a distance in float32 is above GRADIENT_LIMIT.
    """
    rough = {n: relative_l2(found[n], wanted[n]) for n in found}
    if max(rough.values(), default=0.0) <= GRADIENT_LIMIT:
        return
    distances = exact()
    wrong = [n for n, distance in distances.items() if distance > 1e-3]
    if not distances:
        wrong = [n for n, distance in rough.items() if distance > WRONG_GRADIENT]
    if not wrong:
        return
    problem = f"the gradients of {', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''} are not PyTorch's"
    if own:
        warnings.warn(
            f"{problem}, because of {', '.join(own)}, whose backward pass is not its forward pass's derivative",
            stacklevel=4,
        )
        return
    raise ExportError(
        f"{problem}: the model's backward pass differs from its forward pass's derivative (hooks on gradients, code "
        "that torch.export does not see, or a sort or topk of equal numbers, whose order is undefined); tap layers "
        "after that step"
    )
