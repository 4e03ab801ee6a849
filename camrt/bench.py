"""Measures explanations: latency, throughput, memory and stages, compared with the forward pass of the same engine."""

from __future__ import annotations

import io
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import install
from .kernels import minmax
from .method_choice import MethodChoice
from .runtime.errors import BackendUnavailable, CamrtError
from .runtime.explainer import Explainer, load
from .runtime.explanation import Explanation
from .runtime.images.image_batch import ImageBatch
from .verification.distances import cosine_distance, largest_difference

FORWARD = "forward pass"
STAGES = ("preprocess", "network", "method", "rest")
LIMIT = 1e-3  # on the distance from ONNX Runtime's CPU maps in float32, after min-max; in float16 it is 1 - cosine
WARM_UP = 3  # calls before the timing: a CUDA graph replays a shape from the third call on


@dataclass
class Measurements:
    """Results of a benchmark.

    times: (contender, batch size) -> seconds of each call. stages: contender -> seconds of each stage, for separate
    calls with one image. files: contender -> seconds of each call from the bytes of a photo to the bytes of its
    overlay; photo: what that photo was. checked: one sentence, the result of comparing the maps. memory: see `memory`,
    in MB.
    """

    times: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    stages: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    files: dict[str, list[float]] = field(default_factory=dict)
    photo: str = ""
    checked: str = ""
    memory: dict[str, float] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One row per contender and batch size that has been timed: milliseconds, images per second, and
        `forward_passes`, the median over turns of its time divided by that of the forward pass.
        """
        found = []
        for (name, batch), times in self.times.items():
            if not times:
                continue
            low, middle, high, late = (float(q) * 1e3 for q in np.quantile(times, [0.25, 0.5, 0.75, 0.99]))
            row: dict[str, Any] = {"what": name, "batch": batch, "calls": len(times)}
            row |= {"p50_ms": middle, "quartiles_ms": [low, high], "p99_ms": late, "images_per_s": batch / middle * 1e3}
            passes = self.times.get((FORWARD, batch), [])[: len(times)]
            if name != FORWARD and passes:
                row["forward_passes"] = float(np.median(np.array(times[: len(passes)]) / passes))
            if batch == 1 and self.stages.get(name):
                parts = self.stages[name]
                row["stages_ms"] = {stage: float(np.median([p[stage] for p in parts])) * 1e3 for stage in parts[0]}
            if batch == 1 and self.files.get(name):
                row["bytes_to_png_ms"] = float(np.median(self.files[name])) * 1e3
            found.append(row)
        return found


def measure(
    explainer: Explainer,
    contenders: Sequence[MethodChoice],
    images: Sequence[Any],
    batches: Sequence[int],
    runs: int,
    measured: Measurements,
    seconds: float = 60.0,
) -> Iterator[str]:
    """Fills `measured`; yields the name of each step before it runs. The caller may stop after any step.

    contenders: the methods; the forward pass takes turns with them. images: pictures as `explain` takes them, or
    network inputs; the stages, and the way from bytes to PNG, are timed on the first of them. Latency and throughput
    are timed from the network's input to the map, so their ratio to the forward pass is the cost of explaining.
    batches: batch sizes. runs: the most turns for each, after WARM_UP calls. seconds: a batch size gets no new turn
    after this time, but at least three turns.

    CamrtError if a map differs from the CPU's in float32 by more than LIMIT.
    """
    yield "comparing with the CPU"
    measured.checked = check(explainer, contenders, images[0])
    inputs = ImageBatch(images, explainer.manifest).on_host()
    everyone = [MethodChoice(FORWARD, ""), *contenders]
    for contender in contenders:
        yield f"stages of {contender.text}"
        measured.stages[contender.text] = stages(explainer, contender, images[0], min(runs, 20))
    photo = encoded(images[0])
    if photo is not None:
        measured.photo, data = photo
        for contender in contenders:
            yield f"from bytes to PNG by {contender.text}"
            measured.files[contender.text] = bytes_to_png(explainer, contender, data, min(runs, 20))
    for batch in batches:
        given = inputs[np.arange(batch) % len(inputs)]
        for contender in everyone:
            measured.times[contender.text, batch] = []
            for _ in range(WARM_UP):
                run(explainer, contender, given)
        started = time.perf_counter()
        for turn in range(runs):
            if turn >= 3 and time.perf_counter() - started > seconds:
                break
            yield f"batches of {batch}"
            for contender in everyone:
                begun = time.perf_counter()
                run(explainer, contender, given)
                measured.times[contender.text, batch].append(time.perf_counter() - begun)
        measured.memory = memory(explainer)


def run(explainer: Explainer, contender: MethodChoice, images: Any) -> Explanation | None:
    if not contender.name:
        explainer.classify(images)
        return None
    return explainer.explain(images, contender.name, **contender.options)


def stages(explainer: Explainer, contender: MethodChoice, image: Any, runs: int) -> list[dict[str, float]]:
    """Seconds of each stage, call by call."""
    found = []
    for turn in range(WARM_UP + runs):
        with explainer.timed() as noted:
            begun = time.perf_counter()
            run(explainer, contender, [image])
            total = time.perf_counter() - begun
        if turn >= WARM_UP:
            found.append(noted.seconds(total))
    return found


def encoded(image: Any) -> tuple[str, bytes] | None:
    """What a photo is, in words, and the bytes of its file: a path's own, a picture's as JPEG; None for a network's
    input.
    """
    if isinstance(image, str | Path):
        data = Path(image).read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            return f"{opened.format} of {opened.width} x {opened.height}", data
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        return None
    out, picture = io.BytesIO(), Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.save(out, "JPEG")
    return f"JPEG of {picture.width} x {picture.height}", out.getvalue()


def bytes_to_png(explainer: Explainer, contender: MethodChoice, data: bytes, runs: int) -> list[float]:
    """Seconds of each call, from a photo's file to the PNG file of its overlay, both in memory."""
    seconds = []
    for turn in range(WARM_UP + runs):
        begun = time.perf_counter()
        explainer.explain(data, contender.name, **contender.options).png(0)
        if turn >= WARM_UP:
            seconds.append(time.perf_counter() - begun)
    return seconds


def check(explainer: Explainer, contenders: Sequence[MethodChoice], image: Any) -> str:
    """Compares maps with those of ONNX Runtime on the CPU in float32 and returns one sentence about the result.

    CamrtError if they differ by more than LIMIT; int8 only says by how much.
    """
    half = explainer.precision != "fp32"
    if explainer.backend.name == "onnxruntime" and not half:
        return (
            "not compared: this backend is the reference for all others; "
            "`camrt verify` compares it with PyTorch in float64"
        )
    try:
        reference = load(explainer.bundle.path, "onnxruntime", precision="fp32")
    except BackendUnavailable as error:
        return f"not compared: {error}"
    worst = 0.0
    distance = cosine_distance if half else largest_difference
    for contender in contenders:
        want = run(reference, contender, [image])
        assert want is not None
        got = explainer.explain([image], contender.name, want.target, **contender.options)
        found = distance(minmax(got.maps), minmax(want.maps))
        worst = max(worst, found)
        if not found <= LIMIT and explainer.precision != "int8":  # which has no limit: its distance is said
            raise CamrtError(
                f"{contender.text}: not timed, because its map is wrong: {found:.2g} from the CPU's in float32, "
                f"allowed {LIMIT}"
            )
    return (
        f"maps at most {worst:.1e} from ONNX Runtime's on the CPU in float32 "
        f"({'1 - cosine' if half else 'largest difference'})"
    )


def memory(explainer: Explainer) -> dict[str, float]:
    """Memory in MB. peak_mb: the most that this process held (not on Windows); gpu_used_mb: used on the GPU, by all
    processes.
    """
    found = {}
    if sys.platform != "win32":
        import resource

        unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes, or kilobytes
        found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if explainer.backend.gpu is not None:
        free, total = explainer.backend.gpu.stream.device.memory()
        found["gpu_used_mb"] = (total - free) / 1e6
    return found


def example(explainer: Explainer, seed: int = 0) -> Any:
    """A random picture, uint8 (480, 640, C); a random network input (C, H, W) if the bundle has no preprocessing."""
    rng = np.random.default_rng(seed)
    channels, height, width = explainer.manifest.input_shape
    if explainer.manifest.preprocess is None:
        return rng.standard_normal((channels, height, width), np.float32)
    coarse = rng.integers(0, 256, (12, 16, channels), dtype=np.uint8)
    return np.kron(coarse, np.ones((40, 40, 1), np.uint8))  # 480 x 640, not only noise


def machine(explainer: Explainer) -> dict[str, Any]:
    """The model, the backend, the machine and the versions, for the report."""
    return {
        "model": explainer.manifest.name,
        "input_shape": list(explainer.manifest.input_shape),
        "precision": explainer.precision,
        "backend": str(explainer.backend),
        "processor": install.processor(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": install.versions(),
    }


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Latency of one image with its stages, and throughput by batch size."""
    single = [r for r in rows if r["batch"] == 1]
    columns = ["p50", "quartiles", "p99", "forward passes", *STAGES, "bytes to PNG"]
    lines = [f"| one image, ms | {' | '.join(columns)} |", "| --- " * (1 + len(columns)) + "|"]
    for r in single:
        low, high = r["quartiles_ms"]
        parts = [f"{v:.2f}" for v in r.get("stages_ms", {}).values()] or [""] * len(STAGES)
        ratio = f"{r['forward_passes']:.2f}" if "forward_passes" in r else ""
        files = f"{r['bytes_to_png_ms']:.2f}" if "bytes_to_png_ms" in r else ""
        cells = [
            r["what"],
            f"{r['p50_ms']:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{r['p99_ms']:.2f}",
            ratio,
            *parts,
            files,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    batches = sorted({r["batch"] for r in rows})
    names = list(dict.fromkeys(r["what"] for r in rows))
    rates = {(r["what"], r["batch"]): f"{r['images_per_s']:.1f}" for r in rows}
    lines += ["", "| images per second, in batches of | " + " | ".join(map(str, batches)) + " |"]
    lines.append("| --- " * (1 + len(batches)) + "|")
    lines += [f"| {name} | " + " | ".join(rates.get((name, b), "") for b in batches) + " |" for name in names]
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Writes a picture: where the time of one image goes, and images per second by batch size."""
    from matplotlib.figure import Figure

    staged = [r for r in rows if "stages_ms" in r]
    figure = Figure(figsize=(12, max(4.5, 2.5 + 0.5 * len(staged))), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=10)
    start = np.zeros(len(staged))
    for stage in STAGES if staged else ():
        widths = np.array([r["stages_ms"][stage] for r in staged])
        left.barh([r["what"] for r in staged], widths, left=start, label=stage)
        start += widths
    around = np.array([max(0.0, r.get("bytes_to_png_ms", 0) - s) for r, s in zip(staged, start, strict=True)])
    if around.any():
        bars = left.barh(
            [r["what"] for r in staged], around, left=start, label="read, draw and write files", color="0.8"
        )
        left.bar_label(bars, [f" {s + a:.1f}" for s, a in zip(start, around, strict=True)], fontsize=8)
    left.set_xlabel("milliseconds for one photo")
    left.invert_yaxis()
    left.set_xlim(0, 1.15 * float((start + around).max(initial=1)))
    if staged:
        left.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    batches = sorted({r["batch"] for r in rows})
    for name in dict.fromkeys(r["what"] for r in rows):
        points = sorted((r["batch"], r["images_per_s"]) for r in rows if r["what"] == name)
        right.plot(*zip(*points, strict=True), marker="o", label=name, ls="--" if name == FORWARD else "-")
    right.set_xscale("log", base=2)
    right.set_xticks(batches, [str(b) for b in batches])
    right.set_ylim(bottom=0)
    right.set_xlabel("images in a batch")
    right.set_ylabel("images per second, from input to map")
    right.grid(axis="y", alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
