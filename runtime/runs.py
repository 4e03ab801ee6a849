"""Runs programs over batches of images and targets, and gives methods what they read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backends import Backend, Executable
from .bundle import Bundle
from .cams import Gradients, GridMaps, Heads, Lane, LayerMaps, MaskedRuns, Method
from .errors import CamrtError
from .manifest import Manifest, Program, Tap
from .scores import probabilities

GRADIENT_AGGREGATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda g: g.mean(axis=(2, 3)),
    "max": lambda g: g.max(axis=(2, 3)),
    "min": lambda g: g.min(axis=(2, 3)),
    "absmean": lambda g: np.abs(g).mean(axis=(2, 3)),
    "absmax": lambda g: np.abs(g).max(axis=(2, 3)),
    "sum": lambda g: g.sum(axis=(2, 3)),
    "l2": lambda g: np.sqrt((g * g).sum(axis=(2, 3))),
}


@dataclass(frozen=True)
class Part:
    """S explanations that run together: S images with a seed each, or one image with S seeds. `first`: the first image."""

    first: int
    images: np.ndarray
    seeds: np.ndarray


class Runs:
    """The programs of one bundle, opened when they are first needed. May be used from several threads."""

    def __init__(self, bundle: Bundle, backend: Backend, max_batch: int, precision: str):
        self.bundle = bundle
        self.backend = backend
        self.precision = precision
        self.max_batch = 1 if bundle.manifest.batch == 1 else max_batch
        self._opened: dict[tuple[str, bool], Executable] = {}
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def size(self) -> tuple[int, int]:
        return self.manifest.input_shape[1:]

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """(B, C, H, W) -> (B, classes)."""
        program = self._open(self._program("classify"))
        return np.concatenate([program.run({"image": part})["logits"] for _, part in _chunks(batch, self.max_batch)])

    def parts(self, batch: np.ndarray, seeds: np.ndarray, by_image: bool) -> Iterator[Part]:
        """B images with seeds (B, K, classes), image-major. by_image: an image with all of its seeds is one part."""
        if by_image:
            for index, (image, rows) in enumerate(zip(batch, seeds, strict=True)):
                yield Part(index, image[None], rows)
        elif seeds.shape[1] == 1:
            for start, images in _chunks(batch, self.max_batch):
                yield Part(start, images, seeds[start : start + len(images), 0])
        else:
            for index, (image, rows) in enumerate(zip(batch, seeds, strict=True)):
                for _, some in _chunks(rows, self.max_batch):
                    yield Part(index, image[None], some)

    def read(self, method: Method, part: Part, names: Sequence[str], options: Mapping[str, Any]) -> Any:
        """What the method's function takes first. CamrtError if the network gives NaN or infinity."""
        readers: dict[str, Callable[[], Any]] = {
            "layer_maps": lambda: self._layer_maps(part, names, str(options.get("gradient_aggregation", "mean"))),
            "gradients": lambda: self._gradients(part, names),
            "activations": lambda: self._activations(part, names),
            "full_grad": lambda: self._full_grad(part),
            "masked_runs": lambda: self._masked_runs(part, names),
            "heads": lambda: self._heads(part, names),
        }
        data = readers[method.needs]()
        check_finite(data.logits)
        return data

    def _taps(self, names: Sequence[str]) -> tuple[Tap, ...]:
        """In the bundle's order."""
        return tuple(t for t in self.manifest.taps if t.name in set(names))

    def _layer_maps(self, part: Part, names: Sequence[str], aggregation: str) -> LayerMaps:
        """An aggregation of gradients other than the mean takes whole gradients out of the network."""
        mean = aggregation == "mean"
        program = self._program("layer_maps" if mean else "gradients", names)
        out = self._run(program, part, self.manifest.seeds_share_image)
        if mean:
            alphas, maps = out["alphas"], out["maps"]
        else:
            weighed = [_weigh(out, name, aggregation) for name in program.taps]
            alphas, maps = (np.concatenate(parts, axis=1) for parts in zip(*weighed, strict=True))
        joined = LayerMaps(self._taps(program.taps), *self._scores(out, part.seeds), alphas, maps, self.size)
        check_finite(alphas, maps)
        return joined.select(names)

    def _gradients(self, part: Part, names: Sequence[str]) -> Gradients:
        out = self._run(self._program("gradients", names), part, self.manifest.seeds_share_image)
        taps, rows = self._taps(names), len(part.seeds)
        activations = tuple(_repeated(out[f"activation:{t.name}"], rows) for t in taps)
        gradients = tuple(out[f"gradient:{t.name}"] for t in taps)
        return Gradients(taps, *self._scores(out, part.seeds), activations, gradients, self.size)

    def _activations(self, part: Part, names: Sequence[str], concurrent: bool = False) -> Gradients:
        out = self._open(self._program("activations", names), concurrent).run({"image": part.images})
        taps, rows = self._taps(names), len(part.seeds)
        activations = tuple(_repeated(out[f"activation:{t.name}"], rows) for t in taps)
        return Gradients(taps, *self._scores(out, part.seeds), activations, (), self.size)

    def _full_grad(self, part: Part) -> GridMaps:
        program = self._program("full_grad")
        out = self._run(program, part, share_image=False)
        maps = tuple(out[name] for name in program.outputs if name.startswith("grid:"))
        return GridMaps((), *self._scores(out, part.seeds), maps, self.size)

    def _masked_runs(self, part: Part, names: Sequence[str]) -> MaskedRuns:
        concurrent = self.backend.lanes > 1  # for both: the threads of a run that is over would spin and slow the lanes
        data = self._activations(part, names, concurrent)
        activations = tuple(a[0] for a in data.activations)
        classify = self._open(self._program("classify"), concurrent)

        def run(masked: np.ndarray) -> np.ndarray:
            return classify.run({"image": masked})["logits"]

        def batches(count: int, work: Callable[[slice, Lane], None]) -> None:
            starts = range(0, count, self.max_batch)
            lanes = min(self.backend.lanes, len(starts))

            def drive(number: int) -> None:
                room = min(self.max_batch, count)
                masked = np.empty((room, *self.manifest.input_shape), np.float32)
                lane = Lane(number, run, masked, np.empty((room, *self.size), np.float32))
                for start in starts[number::lanes]:
                    work(slice(start, min(start + self.max_batch, count)), lane)

            if lanes < 2:
                for number in range(lanes):
                    drive(number)
            else:
                list(self._pool().map(drive, range(lanes)))

        return MaskedRuns(data.taps, data.logits, data.seeds, part.images[0], activations, self._probabilities, batches)

    def _heads(self, part: Part, names: Sequence[str]) -> Heads:
        taps, heads, activations, logits = self._taps(names), [], [], None
        for tap in taps:
            out = self._open(self._program("trunk", [tap.name])).run({"image": part.images})
            context = {name: array for name, array in out.items() if name.startswith("context:")}
            head = self._open(self._program("head", [tap.name]))

            def run(changed: np.ndarray, head: Executable = head, context: dict = context) -> np.ndarray:
                repeated = {name: np.repeat(array, len(changed), axis=0) for name, array in context.items()}
                return head.run({"activation": changed, **repeated})["logits"]

            heads.append(run)
            activations.append(out["activation"][0])
            logits = out
        assert logits is not None
        scores = self._scores(logits, part.seeds)
        return Heads(taps, *scores, tuple(activations), tuple(heads), self._probabilities, self.max_batch, self.size)

    def _probabilities(self, logits: np.ndarray) -> np.ndarray:
        return probabilities(logits, self.manifest)

    def _scores(self, out: Mapping[str, np.ndarray], seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits and seeds (S, classes); a row of zeros becomes the one-hot row of the top class."""
        logits = _repeated(out["logits"][: len(seeds)], len(seeds))
        return logits, top_class_where_zero(seeds, logits)

    def _run(self, program: Program, part: Part, share_image: bool) -> dict[str, np.ndarray]:
        images = part.images
        if not share_image and len(images) != len(part.seeds):
            images = np.repeat(images, len(part.seeds), axis=0)
        return self._open(program).run({"image": images, "seed": part.seeds})

    def _program(self, kind: str, layers: Sequence[str] = ()) -> Program:
        return self.bundle.program(kind, layers, self.precision)

    def _open(self, program: Program, concurrent: bool = False) -> Executable:
        with self._lock:
            key = (program.file, concurrent)
            if key not in self._opened:
                self._opened[key] = self.backend.open(self.bundle, program, concurrent)
            return self._opened[key]

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.backend.lanes, thread_name_prefix="camrt-lane")
            return self._threads


def check_finite(*arrays: np.ndarray) -> None:
    """CamrtError if one holds NaN or infinity."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise CamrtError("the network gave NaN or infinity: check its weights and the images' preprocessing")


def top_class_where_zero(seeds: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Seeds (S, classes), rows of zeros replaced by the one-hot row of the top class of logits (S, classes)."""
    seeds = seeds.copy()
    rows = np.flatnonzero(~seeds.any(axis=1))
    seeds[rows, logits[rows].argmax(axis=1)] = 1
    return seeds


def _repeated(array: np.ndarray, rows: int) -> np.ndarray:
    """One image's array seen as that of every row; several are left as they are."""
    return np.broadcast_to(array, (rows, *array.shape[1:])) if len(array) == 1 else array


def _weigh(out: Mapping[str, np.ndarray], name: str, aggregation: str) -> tuple[np.ndarray, np.ndarray]:
    """alpha (S, K) = aggregate over the grid of the gradient, and sum_k alpha_k A_k (S, h w)."""
    gradient, activation = out[f"gradient:{name}"], out[f"activation:{name}"]
    alpha = GRADIENT_AGGREGATIONS[aggregation](gradient)
    flat = activation.reshape(*activation.shape[:2], -1)
    return alpha, (alpha[:, None] @ flat)[:, 0]


def _chunks(array: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(array), size):
        yield start, array[start : start + size]
