"""`camrt evaluate`: every metric of every method over a folder of images."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import __version__
from .method_choice import MethodChoice
from .runtime import metrics
from .runtime.errors import InputError, UnknownName
from .runtime.explainer import Explainer
from .runtime.images.image_batch import as_batch
from .runtime.images.opening import open_image
from .runtime.images.preprocess import fit

FAITHFULNESS = {
    "average_drop": ("Average Drop %", -1),
    "increase": ("Increase %", 1),
    "win": ("Win %", 1),
    "insertion": ("insertion", 1),
    "deletion": ("deletion", -1),
    "road": ("ROAD", 1),
}
LOCALISATION = {
    "iou_otsu": ("IoU Otsu", 1),
    "iou": ("IoU", 1),
    "centre_distance": ("centre distance", -1),
    "energy": ("energy", 1),
    "pointing": ("pointing", 1),
}  # name -> (heading, 1 if higher is better)
METRICS = FAITHFULNESS | LOCALISATION
RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Mask:
    """object, valid (H, W) bool, resized and cropped as the network's input; valid: pixels that count."""

    object: np.ndarray
    valid: np.ndarray


def read_mask(path: Path, image: Path, explainer: Explainer, void: int | None = None) -> Mask:
    """Reads an object mask, which must have its image's size, and preprocesses it like the image.

    0 is background; any other value is the object; pixels with the value `void` do not count. void: by default 255 in
    palette pictures, as in Pascal VOC, and none in grey pictures. InputError if the mask cannot be read, has another
    size than its image, or has no object inside the crop that the network sees.
    """
    try:
        with Image.open(path) as opened:
            if opened.mode not in ("1", "L", "P"):
                raise InputError(f"{path}: mode {opened.mode}: save masks as palette or 8-bit grey pictures")
            void = 255 if void is None and opened.mode == "P" else void
            values = np.asarray(opened if opened.mode != "1" else opened.convert("L"), np.uint8)
        size = open_image(image, explainer.manifest.input_shape[0], str(image)).size
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: not a readable mask ({error})") from None
    if values.shape != size[::-1]:
        width, height = values.shape[::-1]
        raise InputError(f"{path}: {width} x {height}, its image is {size[0]} x {size[1]}: make the sizes equal")
    recipe = explainer.manifest.preprocess
    assert recipe is not None  # the image was preprocessed
    kinds = np.where(values == void, 2, values > 0).astype(np.uint8)
    fitted = np.asarray(fit(Image.fromarray(kinds), recipe, "nearest"))
    if not (fitted == 1).any():
        raise InputError(f"{path}: has no object inside the crop that the network sees")
    return Mask(fitted == 1, fitted != 2)


MASK_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")


def find_masks(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """image -> its mask, for the images that have one.

    A mask has its image's relative path, without the suffix; or, if only one image has that stem, the stem alone.
    InputError if the folder does not exist or no image has a mask.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of masks")
    root = Path(os.path.commonpath([image.parent for image in images]))
    masks = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in MASK_SUFFIXES]
    by_place = {p.relative_to(folder).with_suffix(""): p for p in masks}
    stems = Counter(image.stem for image in images)
    found = {}
    for image in images:
        place = image.relative_to(root).with_suffix("")
        if place in by_place:
            found[image] = by_place[place]
        elif stems[image.stem] == 1 and Path(image.stem) in by_place:
            found[image] = by_place[Path(image.stem)]
    if not found:
        raise InputError(f"{folder}: no mask has the name of an image, e.g. {images[0].stem}.png")
    return found


def evaluate(
    explainer: Explainer,
    images: Sequence[Path],
    methods: Sequence[MethodChoice],
    out: Path,
    masks: Path | None = None,
    wanted: Sequence[str] | None = None,
    steps: int = 32,
    threshold: float = 0.5,
    void: int | None = None,
    progress: Callable[[], None] = lambda: None,
    problem: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measures every method on every image's top class and returns the records, one per image and method.

    Each record is appended to out/results.jsonl at once; records of an earlier run with the same settings are used
    again. masks: a folder of object masks; images without a mask get no localisation metrics. wanted: names in METRICS,
    by default all that apply. steps: of insertion and deletion; threshold: of the metric "iou", 0..1; void: see
    read_mask. progress() is called once per image and method; problem(line) for each image that cannot be used.

    UnknownName for an unknown metric; InputError for options that do not fit, or if `out` cannot be written.
    """
    names = list(METRICS if masks is not None else FAITHFULNESS) if wanted is None else list(wanted)
    for name in names:
        if name not in METRICS:
            raise UnknownName(f"no metric {name!r}: use {', '.join(METRICS)}")
        if name in LOCALISATION and masks is None:
            raise InputError(f"metric {name!r} needs masks of the objects: pass --masks FOLDER")
    if steps < 1 or not 0 <= threshold <= 1:
        raise InputError(f"steps {steps}, threshold {threshold}: use steps from 1, and a threshold in 0..1")
    of_image = {} if masks is None else find_masks(images, masks)
    settings = {
        "bundle": hashlib.sha256(explainer.manifest.to_json().encode()).hexdigest()[:16],
        "metrics": sorted(set(names) - {"win"} | ({"average_drop"} if "win" in names else set())),
        "steps": steps,
        "threshold": threshold,
        "void": void,
        "backend": explainer.backend.name,
        "precision": explainer.precision,
        "camrt": __version__,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        path = out / RESULTS
        records = list(_earlier(path, settings))
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None
    done = {(r["image"], r["method"]) for r in records}
    identities = {image: _identity(image, of_image.get(image)) for image in images}
    fresh = []
    with file:
        for image in images:
            key = identities[image]
            missing = [m for m in methods if (key, m.text) not in done]
            for _ in range(len(methods) - len(missing)):
                progress()
            if not missing:
                continue
            try:
                batch, _ = as_batch([image], explainer.manifest)
                mask = read_mask(of_image[image], image, explainer, void) if image in of_image else None
            except InputError as error:
                problem(str(error))
                for _ in missing:
                    progress()
                continue
            for method in missing:
                values = _measure(explainer, batch, method, mask, settings["metrics"], steps, threshold)
                record = {"image": key, "method": method.text, "settings": settings, **values}
                file.write(json.dumps(record) + "\n")
                file.flush()
                fresh.append(record)
                progress()
    chosen = {m.text for m in methods}
    current = set(identities.values())
    return [r for r in [*records, *fresh] if r["method"] in chosen and r["image"] in current]


def _identity(image: Path, mask: Path | None) -> str:
    """Identifies an image by its path and the hashes of it and its mask, so that a changed file is measured again."""
    parts = [str(image)]
    for path in (image, *([mask] if mask is not None else [])):
        try:
            with path.open("rb") as file:
                parts.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
        except OSError:
            parts.append("unreadable")
    return " ".join(parts)


def _earlier(path: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Records of an earlier run with these settings. Removes an incomplete last line of an interrupted run."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        os.truncate(path, len(whole))
    for line in whole.decode("utf-8", "replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("settings") == settings:
            yield record


def _measure(
    explainer: Explainer,
    batch: np.ndarray,
    method: MethodChoice,
    mask: Mask | None,
    names: Sequence[str],
    steps: int,
    threshold: float,
) -> dict[str, Any]:
    """The metrics of one image's map."""
    result = explainer.explain(batch, method.name, **method.options)
    assert result.target is not None
    target, image, scaled = int(result.target[0]), explainer.normalized(batch)[0], result.normalized()[0]

    def score(inputs: np.ndarray) -> np.ndarray:
        return explainer.normalized_probabilities(inputs)[:, target]

    before, after = score(np.stack([image, metrics.masked(image, scaled)]))
    computations: dict[str, Callable[[], Any]] = {
        "average_drop": lambda: metrics.average_drop(before, after),
        "increase": lambda: metrics.increase_in_confidence(before, after),
        "insertion": lambda: metrics.insertion(image, scaled, score, steps),
        "deletion": lambda: metrics.deletion(image, scaled, score, steps),
        "road": lambda: metrics.road(image, scaled, score),
    }
    if mask is not None:
        region = (scaled, mask.object, mask.valid)
        computations |= {
            "iou_otsu": lambda: metrics.iou(*region),
            "iou": lambda: metrics.iou(*region, threshold),
            "centre_distance": lambda: metrics.centre_distance(*region),
            "energy": lambda: metrics.energy(*region),
            "pointing": lambda: metrics.pointing(*region),
        }
    computed = [n for n in names if n != "win" and (mask is not None or n not in LOCALISATION)]
    values = {name: round(float(computations[name]()), 6) for name in computed}
    return {"target": target, "probability": round(float(before), 6), **values}


@dataclass(frozen=True)
class Cell:
    """A mean over images and its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    images: int


def bootstrap(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> Cell:
    """Mean and 95 % percentile bootstrap interval of values (B,). Efron, 1979. ValueError if there are none."""
    if not len(values):
        raise ValueError("no values")
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Cell(float(values.mean()), float(low), float(high), len(values))


def tabulate(records: Sequence[dict[str, Any]], methods: Sequence[MethodChoice]) -> dict[str, dict[str, Cell]]:
    """method -> metric -> Cell. Win compares these methods, over the images that all of them have."""
    of_method = {m.text: {r["image"]: r for r in records if r["method"] == m.text} for m in methods}
    common = sorted(set.intersection(*(set(rows) for rows in of_method.values()))) if of_method else []
    wins: dict[str, np.ndarray] = {}
    if len(methods) > 1 and common and all("average_drop" in rows[i] for rows in of_method.values() for i in common):
        drops = np.array([[rows[i]["average_drop"] for rows in of_method.values()] for i in common])
        wins = dict(zip(of_method, metrics.win_percentage(drops).T, strict=True))
    table = {}
    for method, rows in of_method.items():
        cells = {}
        for name in METRICS:
            values = wins.get(method, np.zeros(0)) if name == "win" else [r[name] for r in rows.values() if name in r]
            if len(values):
                cells[name] = bootstrap(np.asarray(values, np.float64))
        table[method] = cells
    return table


def as_markdown(table: dict[str, dict[str, Cell]]) -> str:
    """A table with the means and half the width of their intervals; the best mean of each column is bold."""
    names = [n for n in METRICS if any(n in cells for cells in table.values())]
    arrows = {1: "↑", -1: "↓"}
    lines = ["| method | " + " | ".join(f"{METRICS[n][0]} {arrows[METRICS[n][1]]}" for n in names) + " |"]
    lines.append("| --- |" + " --- |" * len(names))
    best = {
        n: max((c[n].mean * METRICS[n][1] for c in table.values() if n in c and math.isfinite(c[n].mean)), default=None)
        for n in names
    }
    for method, cells in table.items():
        parts = []
        for n in names:
            if n not in cells:
                parts.append("")
                continue
            digits = 1 if METRICS[n][0].endswith("%") else 3
            text = f"{cells[n].mean:.{digits}f}"
            text = f"**{text}**" if cells[n].mean * METRICS[n][1] == best[n] else text
            parts.append(f"{text} ± {(cells[n].high - cells[n].low) / 2:.{digits}f}")
        lines.append(f"| {method} | " + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"
