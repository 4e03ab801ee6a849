"""A whole run: plans it, resumes it, sees it through, and sums it up."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import install
from ..questions import check_percentile
from ..runtime.backends import BACKENDS, create
from ..runtime.backends.cores import cores
from ..runtime.bundle.reading import Bundle, read_bundle
from ..runtime.cams import method_named
from ..runtime.errors import InputError
from ..runtime.layer_choice import chosen_layers
from ..runtime.targets import read_targets
from .places import RUN, Place, would_find
from .processes import run_processes
from .rows import MAPS, Wanted
from .tasks import Task, fingerprint, plan
from .worker import Done, Job, done_before, part_name

SUMMARY = "_summary.json"  # what reads a folder of Parquet files leaves names with _ out


@dataclass
class Summary:
    """What became of the images. images, problems (reason -> images), inexact (maps whose map_error is above
    LARGE_ERROR): of the whole run, with what an earlier leg did; before: of `images`, those of earlier legs, in
    parts_before. seconds: of this leg alone.
    """

    images: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    inexact: int = 0
    parts: int = 0
    before: int = 0
    parts_before: int = 0
    seconds: float = 0.0
    machines: int = 1
    workers: int = 1

    def add(self, done: Done) -> None:
        self.images += done.images
        self.problems.update(done.problems)
        self.inexact += done.inexact

    @property
    def failed(self) -> int:
        return sum(self.problems.values())

    @property
    def images_per_second(self) -> float:
        return (self.images - self.before) / self.seconds if self.seconds else 0.0

    def cost_per_million(self, price: float) -> float:
        """price: of one machine for an hour."""
        rate = self.images_per_second
        return price * self.machines / 3600 / rate * 1e6 if rate else 0.0


@dataclass(frozen=True)
class Means:
    """How a run is carried out; it changes no row, but for the last bits of maps. workers: explainers, by default one
    for each GPU, else one for each core but one in four; address: of a Ray cluster, or "local"; None for processes of
    this machine.
    """

    backend: str = "auto"
    workers: int | None = None
    batch: int = 16
    threads: int = 1
    readers: int = 2
    address: str | None = None


def map_images(
    bundle: str | Path,
    sources: Sequence[str],
    out: str,
    wanted: Wanted,
    means: Means | None = None,
    precision: str | None = None,
    part: int = 256,
    resume: bool = False,
    progress: Callable[[Summary, int], None] = lambda *_: None,
) -> Summary:
    """Explains the images of sources into Parquet files, part-NUMBER.parquet, with _run.json and _summary.json.

    sources: pictures, folders, patterns, Parquet or tar (webdataset) files, local or s3://, gs://, abfs://. out: a
    folder, local or as the sources. part: images of a file. resume: goes on with a run that was interrupted: parts that
    are there stay. progress: called with the sum so far and the number of all parts, after each.

    InputError if the folder holds another run, or this one and resume was not said; BundleError; UnknownMethod.
    """
    means, opened, place = means or Means(), read_bundle(bundle), Place.of(out)
    _check(opened, wanted, means)
    precision = opened.chosen_precision(precision, masks=True)
    _check_apart(place, sources)
    tasks = plan(sources, part)
    described = _described(opened, sources, wanted, means, precision, part, tasks)
    with place.for_one_run():
        names = _begin(place, described, resume)
        summary, waiting = _written_before(place, tasks, names)
        path = str(opened.path.resolve())
        job = Job(path, place, wanted, means.backend, precision, means.batch, means.threads, means.readers)
        started = time.monotonic()
        progress(summary, len(tasks))
        if waiting:
            for done in _running(job, waiting, means, summary):
                summary.add(done)
                summary.parts += 1
                summary.seconds = time.monotonic() - started
                progress(summary, len(tasks))
        told = {**vars(summary), "images_per_second": summary.images_per_second}
        place.child(SUMMARY).write((json.dumps(told, indent=1) + "\n").encode())
    return summary


def _check_apart(place: Place, sources: Sequence[str]) -> None:
    """InputError if the results would lie among the images: a later leg would find them there."""
    for source in sources:
        if would_find(source, place.child(part_name(0))):
            raise InputError(f"{place.label}: the results would lie among the images: choose another --out")


def _written_before(place: Place, tasks: Sequence[Task], names: set[str]) -> tuple[Summary, list[Task]]:
    """What the parts that are there hold, and the tasks without a part that can be read."""
    there = [task for task in tasks if part_name(task.number) in names]
    summary, waiting = Summary(), [task for task in tasks if part_name(task.number) not in names]
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda task: done_before(place.child(part_name(task.number)), task.number), there)
        for task, done in zip(there, found, strict=True):
            if done is None:
                waiting.append(task)
                continue
            summary.add(done)
            summary.parts_before += 1
    summary.before = summary.images
    return summary, sorted(waiting, key=lambda task: task.number)


def _running(job: Job, tasks: Sequence[Task], means: Means, summary: Summary) -> Iterator[Done]:
    if means.address is not None:
        from .cluster import connect, default_actors, nodes, run_on_ray

        ray = connect(means.address)
        summary.machines = nodes(ray)
        summary.workers = min(means.workers or default_actors(ray), len(tasks))
        return run_on_ray(ray, job, tasks, summary.workers)
    gpus, usable = _gpus(job), cores()
    summary.workers = min(means.workers or gpus or max(1, usable - usable // 4), len(tasks))
    return run_processes(job, tasks, summary.workers, gpus)


def _gpus(job: Job) -> int:
    """How many GPUs this machine has for the backend; 0 for the CPU."""
    if create(job.backend).gpu is None:
        return 0
    from ..kernels.gpu.device import count

    return count()


def _check(bundle: Bundle, wanted: Wanted, means: Means) -> None:
    method = method_named(wanted.method)
    method.check_options(dict(wanted.options))
    chosen_layers(bundle.manifest, method, wanted.layers)
    read_targets(wanted.target, 1, bundle.manifest)
    if bundle.manifest.preprocess is None:
        raise InputError(f"{bundle.path}: has no recipe to preprocess pictures by: add one with 'camrt recipe'")
    if wanted.map not in MAPS:
        raise InputError(f"map {wanted.map!r}: use {', '.join(MAPS)}")
    if means.backend != "auto" and means.backend not in BACKENDS:
        raise InputError(f"no backend {means.backend!r}: use auto, {', '.join(BACKENDS)}")
    if method.name == "winsor_cam" and "percentile" in wanted.options:
        check_percentile(wanted.options["percentile"])
    counts = {"actors": means.workers, "batch": means.batch, "readers": means.readers, "threads": means.threads}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: use 1 or more")


def _described(
    bundle: Bundle,
    sources: Sequence[str],
    wanted: Wanted,
    means: Means,
    precision: str,
    part: int,
    tasks: Sequence[Task],
) -> dict[str, Any]:
    """What _run.json says: all that rows depend on."""
    asked = {**asdict(wanted), "layers": wanted.layers if isinstance(wanted.layers, str) else list(wanted.layers or [])}
    return {
        "format": 1,
        "bundle": bundle.manifest.name,
        "bundle_sha256": bundle.sha256,
        "versions": install.versions(),
        "backend": means.backend,
        "precision": precision,
        "batch": means.batch,
        "threads": means.threads,
        **json.loads(json.dumps(asked, default=str)),
        "sources": [_public(source) for source in sources],
        "files_sha256": fingerprint(tasks),
        "images_per_part": part,
        "parts": len(tasks),
    }


def _public(source: str) -> str:
    """A source without the keys that its address may have."""
    return re.sub(r"^(\w+://)[^/@]*@", r"\1", source.partition("?")[0] if "://" in source else source)


def _begin(place: Place, described: dict[str, Any], resume: bool) -> set[str]:
    """The names of the files that are there. InputError where they are another run's. A run without a part is none."""
    run, names = place.child(RUN), set(place.names())
    parts = [name for name in names if name.startswith("part-")]
    if parts and RUN not in names:
        raise InputError(f"{place.label}: holds {parts[0]}, and no {RUN}: choose another folder")
    if not parts:
        place.make_folder()
        run.write((json.dumps(described, indent=1) + "\n").encode())
        return set()
    try:
        before = json.loads(run.read())
        # of the sources, what files there are counts, not how they were named
        different = [k for k in described if k != "sources" and before.get(k) != described[k]]
    except (ValueError, AttributeError):
        raise InputError(f"{run.label}: cannot be read: choose another folder") from None
    if different:
        changes = "; ".join(f"{k}: {_short(before.get(k))} there, {_short(described[k])} now" for k in different[:3])
        raise InputError(f"{place.label}: holds another run ({changes}): choose another folder")
    if not resume:
        raise InputError(f"{place.label}: holds this run already: go on with it (--resume), or choose another folder")
    return names


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
