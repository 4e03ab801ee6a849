"""Runs programs over batches of images and targets, and gives methods what they read.

On a GPU images and seeds go there once; methods that run there find their arrays there and leave their maps there, and of
what the others read only the programs' outputs come back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...kernels import DeviceError, OutOfMemory
from ...kernels import check_finite as check_finite_there
from ..backends import Backend, Executable
from ..bundle.kinds import Kind
from ..bundle.manifest import Manifest, Program, Tap
from ..bundle.reading import Bundle
from ..cams import Gradients, GridMaps, Heads, Lane, LayerMaps, MaskedRuns, Method, Result
from ..errors import CamrtError
from ..scores import probabilities
from .cuda_graphs import Replays
from .memory import Memory
from .timing import Stages, Timed

NOT_FINITE = "the network gave NaN or infinity: check its weights and the images' preprocessing"

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
    """S explanations that run together: S images with a seed each, or one image with S seeds. `first`: the first image.

    The images are where the backend runs, the seeds on the host.
    """

    first: int
    images: Any
    seeds: np.ndarray


class Runs:
    """The programs of one bundle, opened when they are first needed. May be used from several threads."""

    def __init__(self, bundle: Bundle, backend: Backend, max_batch: int, precision: str):
        self.bundle = bundle
        self.backend = backend
        self.precision = precision
        self.max_batch = 1 if bundle.manifest.batch == 1 else max_batch
        self.memory = Memory(None if backend.gpu is None else backend.gpu.stream)
        self._replays = None if backend.gpu is None or not backend.gpu.captures else Replays(backend.gpu.stream)
        self._opened: dict[tuple[str, bool], Executable] = {}
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self.stages: Stages | None = None  # where the time of calls goes, while somebody asks

    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.stages is None else self.stages(name)

    @property
    def _replayed(self) -> Replays | None:
        """None also while stages are timed, which a graph does not tell apart."""
        return self._replays if self.stages is None else None

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def size(self) -> tuple[int, int]:
        return self.manifest.input_shape[1:]

    @contextmanager
    def alone(self, halving: bool = False) -> Iterator[None]:
        """One thread at a time uses a GPU's stream. CamrtError for what goes wrong there; OutOfMemory if somebody will halve."""
        if self.backend.gpu is None:
            yield
            return
        try:
            with self.backend.gpu.lock:
                yield
        except DeviceError as error:
            if halving and isinstance(error, OutOfMemory):
                raise
            raise CamrtError(str(error)) from error

    def make_room(self) -> bool:
        """After a GPU's memory was used up: gives back what can be; where that is not much, takes half as much at a time.

        False where it cannot.
        """
        with self.alone():
            replayed = self._replays is not None and self._replays.clear()
            if self.memory.stream is not None:
                self.memory.stream.device.give_back()
            if replayed:
                return True
            if self.max_batch == 1:
                return False
            self.max_batch //= 2
            return True

    def logits(self, batch: Any) -> np.ndarray:
        """(B, C, H, W) -> (B, classes)."""
        program = self._open(self._program(Kind.CLASSIFY))

        def work(images: Any) -> Any:
            return program.run({"image": images})["logits"]

        parts = []
        for _, part in _chunks(batch, self.max_batch):
            if self._replayed is None:
                parts.append(work(part))
            else:
                parts.append(self.memory.copied(self._replayed.run(("classify", part.shape), (part,), work)))
        return np.concatenate(self.memory.get(*parts))

    def normalized(self, batch: Any) -> Any:
        """(B, C, H, W) -> what masks multiply, where the images are: the images, or what the network's first layer reads."""
        if self.manifest.normalized is None:
            return batch
        program = self._open(self._program(Kind.NORMALIZE))
        return program.run({"image": batch})["normalized"]

    def scored(self, normalized: np.ndarray) -> np.ndarray:
        """Logits (B, classes), on the host, of what `normalized` gives."""
        program = self._open(self._program(Kind.SCORE))
        parts = [
            program.run({"normalized": self.memory.put(p)})["logits"] for _, p in _chunks(normalized, self.max_batch)
        ]
        return np.concatenate(self.memory.get(*parts))

    def parts(self, batch: Any, seeds: np.ndarray, by_image: bool) -> Iterator[Part]:
        """B images with seeds (B, K, classes), image-major. by_image: an image with all of its seeds is one part."""
        if by_image:
            for index, rows in enumerate(seeds):
                yield Part(index, batch[index : index + 1], rows)
        elif seeds.shape[1] == 1:
            for start, images in _chunks(batch, self.max_batch):
                yield Part(start, images, seeds[start : start + len(images), 0])
        else:
            for index, rows in enumerate(seeds):
                for _, some in _chunks(rows, self.max_batch):
                    yield Part(index, batch[index : index + 1], some)

    def explained(
        self, method: Method, part: Part, names: Sequence[str], options: Mapping[str, Any]
    ) -> tuple[Result, np.ndarray]:
        """What the method says of a part, and the logits of its images (or of each seed), on the host.

        CamrtError if the network gives NaN or infinity.
        """
        if not self._there(method, options):
            data = self.read(method, part, names, options)
            with self.stage("method"):
                return method.function(data, **options), data.logits
        if method.needs == "masked_runs":
            data = self._masked_runs(part, names)
            with self.stage("method"):
                return self._fetched(method.function(data, **options))[0], data.logits

        def work(images: Any, seeds: Any) -> tuple[LayerMaps, Result]:
            data = self._layer_maps(Part(part.first, images, seeds), names, "mean", there=True)
            for values in (data.logits, data.alphas, data.maps):
                check_finite_there(values, stream=self.memory.stream)
            with self.stage("method"):
                data = data.select(names)
                return data, method.function(data, **options)

        if self._replayed is None:
            data, result = work(part.images, self.memory.put(part.seeds))
        else:
            key = (method.name, *names, repr(sorted(options.items())), part.images.shape, part.seeds.shape)
            data, result = self._replayed.run(key, (part.images, part.seeds), work)
        # what a later replay writes again: the result is read now, and what it is retuned from copied
        kept = replace(data, alphas=self.memory.copied(data.alphas), maps=self.memory.copied(data.maps))
        fetched, (logits,) = self._fetched(result, data.logits)

        def retune(**changes: Any) -> Result:
            with self.alone():
                again = method.function(kept, **options).retune
                assert again is not None
                return self._fetched(again(**changes))[0]

        return replace(fetched, retune=retune), _repeated(logits[: len(part.seeds)], len(part.seeds))

    def _there(self, method: Method, options: Mapping[str, Any]) -> bool:
        """Whether the method runs on the GPU from its images to its maps."""
        if self.memory.stream is None or not method.on_gpu:
            return False
        return method.needs == "masked_runs" or options.get("gradient_aggregation", "mean") == "mean"

    def _fetched(self, result: Result, *others: Any) -> tuple[Result, list[np.ndarray]]:
        """The result, and what else is named, on the host."""
        try:
            maps, weights, *rest = self.memory.get(result.maps, result.layer_weights, *others)
        except ValueError as error:  # from a kernel that looked for NaN
            raise CamrtError(NOT_FINITE) from error
        again = result.retune
        if again is None:
            return replace(result, maps=maps, layer_weights=weights), rest

        def retune(**changes: Any) -> Result:
            with self.alone():
                return self._fetched(again(**changes))[0]

        return replace(result, maps=maps, layer_weights=weights, retune=retune), rest

    def read(self, method: Method, part: Part, names: Sequence[str], options: Mapping[str, Any]) -> Any:
        """What the method's function takes first, on the host. CamrtError if the network gives NaN or infinity."""
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

    def _layer_maps(self, part: Part, names: Sequence[str], aggregation: str, there: bool = False) -> LayerMaps:
        """An aggregation of gradients other than the mean takes whole gradients out of the network.

        there: the arrays stay on the GPU; they are of all of the program's layers.
        """
        mean = aggregation == "mean"
        program = self._program(Kind.LAYER_MAPS if mean else Kind.GRADIENTS, names)
        out = self._run(program, part, self.manifest.seeds_share_image, there)
        if there:
            taps = self._taps(program.taps)
            return LayerMaps(taps, out["logits"], part.seeds, out["alphas"], out["maps"], self.size, self.memory)
        if mean:
            alphas, maps = out["alphas"], out["maps"]
        else:
            weighed = [_weigh(out, name, aggregation) for name in program.taps]
            alphas, maps = (np.concatenate(parts, axis=1) for parts in zip(*weighed, strict=True))
        joined = LayerMaps(self._taps(program.taps), *self._scores(out, part.seeds), alphas, maps, self.size)
        check_finite(alphas, maps)
        return joined.select(names)

    def _gradients(self, part: Part, names: Sequence[str]) -> Gradients:
        out = self._run(self._program(Kind.GRADIENTS, names), part, self.manifest.seeds_share_image)
        taps, rows = self._taps(names), len(part.seeds)
        activations = tuple(_repeated(out[f"activation:{t.name}"], rows) for t in taps)
        gradients = tuple(out[f"gradient:{t.name}"] for t in taps)
        return Gradients(taps, *self._scores(out, part.seeds), activations, gradients, self.size)

    def _activations(self, part: Part, names: Sequence[str], concurrent: bool = False) -> Gradients:
        program = self._open(self._program(Kind.ACTIVATIONS, names), concurrent)
        out = self._here(program.run({"image": part.images}))
        taps, rows = self._taps(names), len(part.seeds)
        activations = tuple(_repeated(out[f"activation:{t.name}"], rows) for t in taps)
        return Gradients(taps, *self._scores(out, part.seeds), activations, (), self.size)

    def _full_grad(self, part: Part) -> GridMaps:
        program = self._program(Kind.FULL_GRAD)
        out = self._run(program, part, share_image=False)
        maps = tuple(out[name] for name in program.outputs if name.startswith("grid:"))
        return GridMaps((), *self._scores(out, part.seeds), maps, self.size)

    def _masked_runs(self, part: Part, names: Sequence[str]) -> MaskedRuns:
        """On the GPU, where there is one; what decides which masks run, and the seeds, come to the host."""
        memory, there = self.memory, self.memory.stream is not None
        out = self._open(self._program(Kind.ACTIVATIONS, names)).run({"image": part.images})
        taps = self._taps(names)
        activations = tuple(a.reshape(*a.shape[1:]) for a in (out[f"activation:{t.name}"] for t in taps))
        logits, seeds = self._scores({"logits": memory.get(out["logits"])[0]}, part.seeds)
        check_finite(logits)
        entry = "image" if self.manifest.normalized is None else "normalized"
        scored = self._open(self._program(Kind.CLASSIFY if entry == "image" else Kind.SCORE), self.backend.lanes > 1)

        def run(masked: Any) -> Any:
            return scored.run({entry: masked})["logits"]

        def batches(count: int, work: Callable[[slice, Lane], None]) -> None:
            starts = range(0, count, self.max_batch)
            lanes = min(self.backend.lanes, len(starts))

            def drive(number: int) -> None:
                room = min(self.max_batch, count)
                masked = memory.empty((room, *self.manifest.scored_shape))
                lane = Lane(number, run, masked, None if there else np.empty((room, *self.size), np.float32))
                for start in starts[number::lanes]:
                    work(slice(start, min(start + self.max_batch, count)), lane)

            if lanes < 2:
                for number in range(lanes):
                    drive(number)
            else:
                list(self._pool().map(drive, range(lanes)))

        image = self.normalized(part.images)
        image = image.reshape(*image.shape[1:])
        return MaskedRuns(taps, logits, seeds, image, activations, self.manifest.probability, batches, memory)

    def _heads(self, part: Part, names: Sequence[str]) -> Heads:
        taps, heads, activations, logits = self._taps(names), [], [], None
        for tap in taps:
            out = self._here(self._open(self._program(Kind.TRUNK, [tap.name])).run({"image": part.images}))
            context = {name: array for name, array in out.items() if name.startswith("context:")}
            head = self._open(self._program(Kind.HEAD, [tap.name]), self.backend.lanes > 1)

            def run(changed: np.ndarray, head: Executable = head, context: dict = context) -> np.ndarray:
                repeated = {name: np.repeat(array, len(changed), axis=0) for name, array in context.items()}
                return head.run({"activation": changed, **repeated})["logits"]

            heads.append(run)
            activations.append(out["activation"][0])
            logits = out
        assert logits is not None
        read = *self._scores(logits, part.seeds), tuple(activations), tuple(heads)
        return Heads(taps, *read, self._probabilities, self.max_batch, self._in_lanes, self.size)

    def _in_lanes(self, work: Callable[[slice], np.ndarray], parts: Sequence[slice]) -> list[np.ndarray]:
        some = map if self.backend.lanes < 2 or len(parts) < 2 else self._pool().map
        return list(some(work, parts))

    def _probabilities(self, logits: np.ndarray) -> np.ndarray:
        return probabilities(logits, self.manifest)

    def _scores(self, out: Mapping[str, np.ndarray], seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits and seeds (S, classes); a row of zeros becomes the one-hot row of the top class."""
        logits = _repeated(out["logits"][: len(seeds)], len(seeds))
        return logits, top_class_where_zero(seeds, logits)

    def _run(self, program: Program, part: Part, share_image: bool, there: bool = False) -> dict[str, Any]:
        """there: on the GPU, where the results stay."""
        images = part.images
        if not share_image and len(images) != len(part.seeds):
            images = self.memory.repeated(images, len(part.seeds))
        out = self._open(program).run({"image": images, "seed": part.seeds})
        return out if there else self._here(out)

    def _here(self, out: dict[str, Any]) -> dict[str, np.ndarray]:
        """A program's outputs on the host."""
        return dict(zip(out, self.memory.get(*out.values()), strict=True))

    def _program(self, kind: str, layers: Sequence[str] = ()) -> Program:
        return self.bundle.program(kind, layers, self.precision)

    def _open(self, program: Program, concurrent: bool = False) -> Executable:
        with self._lock:
            key = (program.file, concurrent)
            if key not in self._opened:
                self._opened[key] = self.backend.open(self.bundle, program, concurrent)
            executable = self._opened[key]
        return executable if self.stages is None else Timed(executable, self.stages)

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.backend.lanes, thread_name_prefix="camrt-lane")
            return self._threads


def check_finite(*arrays: np.ndarray) -> None:
    """CamrtError if one holds NaN or infinity."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise CamrtError(NOT_FINITE)


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


def _chunks(array: Any, size: int) -> Iterator[tuple[int, Any]]:
    for start in range(0, len(array), size):
        yield start, array[start : start + size]
