"""Explains files: reading, the network and writing side by side, so that the network does not wait."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .image_files import ImageFiles, collect
from .results_folder import Outputs, ResultsFolder, key_of, replacing
from .runtime.backends.cores import cores
from .runtime.errors import InputError, NotFinite
from .runtime.explainer import Explainer, load
from .runtime.explanation import PNG_COMPRESSION, Explanation, plain
from .runtime.images.colormaps import colorize
from .runtime.images.opening import open_image
from .runtime.images.overlay import check_opacity
from .runtime.images.preprocess import checked_recipe


@dataclass(frozen=True)
class Drawing:
    """How overlays are drawn: options of Explanation.overlay."""

    opacity: float = 0.5
    colormap: str = "turbo"
    size: str = "photo"
    by_value: bool = False
    legend: bool = False


@dataclass
class Summary:
    """What became of the images. problems: reason -> images that could not be explained."""

    explained: int = 0
    finished_before: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        return sum(self.problems.values())


@dataclass(frozen=True)
class _Photo:
    """A file that was read: its hash, its size in bytes, and its picture."""

    path: Path
    sha256: str
    size: int
    picture: Image.Image


@dataclass(frozen=True)
class _Problem:
    """A file that cannot be explained, and why."""

    path: Path
    reason: str


def explain_files(
    bundle: str | Path | Explainer,
    images: str | Path | Iterable[str | Path] | ImageFiles,
    out: str | Path,
    method: str = "winsor_cam",
    target: Any = None,
    layers: Sequence[str] | str | None = None,
    batch: int = 8,
    jobs: int | None = None,
    resume: bool = False,
    overlays: bool = True,
    maps: bool = True,
    drawing: Drawing = Drawing(),
    shard: tuple[int, int] | None = None,
    progress: Callable[[int], object] = lambda _: None,
    problem: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Summary:
    """Writes an overlay, a map and a line of JSON for each image into a folder (see results_folder.py).

    images: files, folders and glob patterns. out: the folder; it keeps the images' subfolders. target: as for `explain`
    of one image: a class, a list of classes, or None for each image's top class. batch: images in one run. jobs:
    threads that read and write, by default one per core. resume: leave out images whose results are complete. drawing:
    of overlays. shard: (number, count), this is one of several processes that share the images. progress(n): n more
    images are done; problem(line): an image could not be explained. options: the method's.

    InputError, UnknownMethod, UnknownLayer, before anything is written, for arguments that do not fit and for a folder
    that holds results of another configuration. An image that cannot be read is a problem, not an error.
    """
    explainer = bundle if isinstance(bundle, Explainer) else load(bundle, max_batch=batch)
    if not isinstance(images, ImageFiles):
        named = [images] if isinstance(images, str | Path) else images
        images = collect([str(image) for image in named], skip=[Path(out)])
    if batch < 1 or (jobs is not None and jobs < 1):
        raise InputError("batch and jobs: use 1 or more")
    several = isinstance(target, list | tuple)
    chosen = explainer.check_arguments(method, [list(target)] if several else target, layers, options)
    check_opacity(drawing.opacity)
    colorize(np.zeros((1, 1)), drawing.colormap)
    configuration = {
        "bundle": explainer.manifest.name,
        "bundle_sha256": explainer.provenance["bundle_sha256"],
        "precision": explainer.precision,
        "method": method,
        "options": {name: plain(value) for name, value in chosen.items()},
        "target": plain(target),
        "layers": plain(layers),
        "overlays": vars(drawing) if overlays else None,
        "maps": maps,
    }
    results = ResultsFolder(Path(out), configuration, images, overlays, maps, shard)
    todo = images.share(shard)
    summary = Summary(skipped=images.skipped)
    if resume:
        finished = results.finished()
        summary.finished_before = sum(image in finished for image in todo)
        todo = [image for image in todo if image not in finished]
        progress(summary.finished_before)
    run = _Run(explainer, method, target, layers, options, drawing, results, batch, progress, problem, summary)
    try:
        run.all(todo, jobs or cores())
    finally:
        results.close()
    return summary


_Pending = deque[tuple[_Photo, Future[dict[str, Any]]]]
# errors of one image's name, where the folder can be written
_OF_ONE_NAME = {errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EILSEQ}


@dataclass(frozen=True)
class _Run:
    explainer: Explainer
    method: str
    target: Any
    layers: Any
    options: dict[str, Any]
    drawing: Drawing
    results: ResultsFolder
    batch: int
    progress: Callable[[int], object]
    problem: Callable[[str], None]
    summary: Summary

    def all(self, files: Sequence[Path], jobs: int) -> None:
        readers = ThreadPoolExecutor(jobs, thread_name_prefix="camrt-read")
        writers = ThreadPoolExecutor(jobs, thread_name_prefix="camrt-write")
        pending: _Pending = deque()
        try:
            for photos in self._batches(_ahead(readers, self._read, files, self.batch + jobs)):
                for item in self._explained(photos):
                    pending.append((item[2], writers.submit(self._write, *item)))
                self._finish(pending, keep=2 * self.batch)
            self._finish(pending, keep=0)
        finally:
            readers.shutdown(cancel_futures=True)
            writers.shutdown(cancel_futures=True)

    def _read(self, path: Path) -> _Photo | _Problem:
        try:
            data = path.read_bytes()
            picture = open_image(data, self.explainer.manifest.input_shape[0], "it")
            checked_recipe(self.explainer.manifest, "it", picture.size)
        except OSError as error:
            return _Problem(path, error.strerror or str(error))
        except InputError as error:
            return _Problem(path, str(error).removeprefix("it: "))
        return _Photo(path, hashlib.sha256(data).hexdigest(), len(data), picture)

    def _batches(self, photos: Iterator[_Photo | _Problem]) -> Iterator[list[_Photo]]:
        """What could be read, in batches."""
        while some := list(itertools.islice(photos, self.batch)):
            good = [photo for photo in some if isinstance(photo, _Photo)]
            for photo in some:
                if isinstance(photo, _Problem):
                    self._note(photo)
            if good:
                yield good

    def _explained(self, photos: list[_Photo]) -> Iterator[tuple[Explanation, int, _Photo]]:
        """A batch's explanation; where the network gives NaN for one of it, the others one by one."""
        try:
            result = self._explain(photos)
        except NotFinite as error:
            if len(photos) == 1:
                self._note(_Problem(photos[0].path, str(error)))
            else:
                for photo in photos:
                    yield from self._explained([photo])
            return
        for i, photo in enumerate(photos):
            yield result, i, photo

    def _explain(self, photos: list[_Photo]) -> Explanation:
        target = self.target
        if isinstance(target, list | tuple):
            target = [list(target)] * len(photos)
        pictures = [photo.picture for photo in photos]
        return self.explainer.explain(pictures, self.method, target, self.layers, **self.options)

    def _write(self, result: Explanation, index: int, photo: _Photo) -> dict[str, Any]:
        """Writes an image's files; returns its line."""
        self.results.begin(photo.path, photo.sha256)
        outputs, folder = self.results.outputs(photo.path), self.results.folder
        for name in (outputs.overlay, outputs.map):
            if name is not None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if outputs.map is not None:
            with replacing(folder / outputs.map) as file:
                np.save(file, result.maps[index])
        if outputs.overlay is not None:
            several = range(result.maps.shape[1]) if result.maps.ndim == 4 else None
            indices = [index] if several is None else [(index, k) for k in several]
            drawn = [result.overlay(i, **vars(self.drawing)) for i in indices]
            with replacing(folder / outputs.overlay) as file:
                Image.fromarray(np.concatenate(drawn, axis=1)).save(file, "PNG", compress_level=PNG_COMPRESSION)
        return self._record(result, index, photo, outputs)

    def _record(self, result: Explanation, index: int, photo: _Photo, outputs: Outputs) -> dict[str, Any]:
        """One line of explanations.jsonl."""
        said = result.to_dict(index)
        image = said.pop("images")[0]
        said.pop("layers")  # layer_weights names them
        record = {
            "image": str(photo.path),
            "path": key_of(photo.path),
            "sha256": photo.sha256,
            "bytes": photo.size,
            "overlay": outputs.overlay,
            "map": outputs.map,
            **image,
            **said,
        }
        if self.target == "not":
            record["target"] = "not"
        return record

    def _finish(self, pending: _Pending, keep: int) -> None:
        """Appends the lines of what is written, in order; waits until at most `keep` are left."""
        while pending and (len(pending) > keep or pending[0][1].done()):
            photo, writing = pending.popleft()
            try:
                self.results.append(writing.result())
            except OSError as error:
                if error.errno in _OF_ONE_NAME:
                    self._note(_Problem(photo.path, f"its results cannot be written ({error.strerror})"))
                    continue
                self._finish_the_rest(pending)
                raise InputError(
                    f"{self.results.folder}: cannot be written ({error.strerror or error}): what is finished stays"
                ) from None
            self.summary.explained += 1
            self.progress(1)

    def _finish_the_rest(self, pending: _Pending) -> None:
        """Appends the lines of what was still written, after a write failed."""
        for _, writing in pending:
            with contextlib.suppress(OSError):
                self.results.append(writing.result())
                self.summary.explained += 1

    def _note(self, problem: _Problem) -> None:
        self.summary.problems[problem.reason.partition(" (")[0]] += 1
        self.problem(f"{problem.path}: {problem.reason}")
        self.progress(1)


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[Path], _Photo | _Problem], files: Sequence[Path], count: int
) -> Iterator[_Photo | _Problem]:
    """work(file) for every file, in order, at most `count` ahead of what is taken."""
    waiting: deque[Future[_Photo | _Problem]] = deque()
    rest = iter(files)
    for file in itertools.islice(rest, count):
        waiting.append(pool.submit(work, file))
    while waiting:
        done = waiting.popleft()
        for file in itertools.islice(rest, 1):
            waiting.append(pool.submit(work, file))
        yield done.result()
