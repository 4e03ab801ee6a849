"""Measures methods over images, image after image, and keeps every record at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..method_choice import MethodChoice
from ..runtime.errors import InputError, UnknownName
from ..runtime.explainer import Explainer
from ..runtime.images.image_batch import ImageBatch
from .masks import find_masks, read_mask
from .measuring import Question, measure
from .metric_table import FAITHFULNESS, LOCALISATION, METRICS
from .targets import read_targets_file

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Settings:
    """What is measured. masks: a folder of object masks; images without one get no localisation metrics. metrics: names
    in METRICS, by default all that apply but for the checks. targets: a file of labels, by default each image's top
    class. layers: as for `explain`. steps: of insertion and deletion. threshold: of the metric "iou", 0..1. void: see
    read_mask. other: an explainer of the same network with other weights, for "other_weights".
    """

    masks: Path | None = None
    metrics: Sequence[str] | None = None
    targets: Path | None = None
    layers: Sequence[str] | str | None = None
    steps: int = 32
    threshold: float = 0.5
    void: int | None = None
    other: Explainer | None = None

    def names(self) -> list[str]:
        """The metrics. UnknownName for one that does not exist; InputError for options that do not fit."""
        names = list(self.metrics or FAITHFULNESS | (LOCALISATION if self.masks is not None else {}))
        if self.metrics is None and self.other is not None:
            names.append("other_weights")
        for name in names:
            if name not in METRICS:
                raise UnknownName(f"no metric {name!r}: use {', '.join(METRICS)}")
            if name in LOCALISATION and self.masks is None:
                raise InputError(f"metric {name!r} needs masks of the objects: pass --masks FOLDER")
            if name == "other_weights" and self.other is None:
                raise InputError(
                    "metric 'other_weights' needs a bundle of the same network with other weights: pass "
                    "--other-weights BUNDLE"
                )
        if self.steps < 1 or not 0 <= self.threshold <= 1:
            raise InputError(
                f"steps {self.steps}, threshold {self.threshold}: use steps from 1, and a threshold in 0..1"
            )
        return names


def evaluate(
    explainer: Explainer,
    images: Mapping[Path, str],
    methods: Sequence[MethodChoice],
    out: Path,
    settings: Settings = Settings(),
    progress: Callable[[], None] = lambda: None,
    problem: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measures every method on every image and returns the records, one per image and method.

    images: image -> its name in the records. Each record is appended to out/results.jsonl at once; records of an
    earlier run with the same settings are used again. progress() is called once per image and method; problem(line) for
    each image that cannot be used.

    UnknownName for an unknown metric; InputError for options that do not fit, or if `out` cannot be written.
    """
    names = settings.names()
    masks = {} if settings.masks is None else find_masks(list(images), settings.masks, images)
    targets = None
    if settings.targets is not None:
        targets = read_targets_file(settings.targets, images, explainer.manifest)
    for method in methods:
        explainer.check_arguments(method.name, None, settings.layers, method.options)
    recorded = _as_recorded(explainer, settings, names)
    try:
        out.mkdir(parents=True, exist_ok=True)
        path = out / RESULTS
        records = list(_earlier(path, recorded))
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None
    done = {(*_identity(r), r["method"]) for r in records}
    current = set()
    with file:
        for image, name in images.items():
            said = {"image": name, "sha256": _sha256(image), "mask_sha256": _sha256(masks.get(image))}
            said["wanted"] = None if targets is None else targets.get(image)
            current.add(_identity(said))
            missing = [m for m in methods if (*_identity(said), m.text) not in done]
            for _ in range(len(methods) - len(missing)):
                progress()
            if not missing:
                continue
            try:
                if targets is not None and image not in targets:
                    raise InputError(f"{image}: {settings.targets} has no class for it")
                batch = ImageBatch([image], explainer.manifest).on_host()
                mask = read_mask(masks[image], image, explainer, settings.void) if image in masks else None
            except InputError as error:
                problem(str(error))
                for _ in missing:
                    progress()
                continue
            asked = Question(
                batch, said["wanted"], settings.layers, mask, settings.steps, settings.threshold, settings.other
            )
            for method in missing:
                values = measure(explainer, method, recorded["metrics"], asked)
                record = {**said, "method": method.text, "settings": recorded, **values}
                file.write(json.dumps(record) + "\n")
                file.flush()
                records.append(record)
                progress()
    chosen = {m.text for m in methods}
    return [r for r in records if r["method"] in chosen and _identity(r) in current]


def _as_recorded(explainer: Explainer, settings: Settings, names: Sequence[str]) -> dict[str, Any]:
    """What tells records of different runs apart."""
    layers = settings.layers
    return {
        "bundle_sha256": explainer.provenance["bundle_sha256"],
        "metrics": sorted(set(names) - {"win"} | ({"average_drop"} if "win" in names else set())),
        "layers": layers if layers is None or isinstance(layers, str) else list(layers),
        "steps": settings.steps,
        "threshold": settings.threshold,
        "void": settings.void,
        "other_weights": None if settings.other is None else settings.other.provenance["bundle_sha256"],
        "backend": explainer.backend.name,
        "precision": explainer.precision,
        "camrt": __version__,
    }


def _identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a changed image, mask or label changes."""
    return tuple(record.get(field) for field in ("image", "sha256", "mask_sha256", "wanted"))


def _sha256(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "unreadable"


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
