"""Opens the programs of one bundle on first use, and runs them batch after batch.

With a GPU, images and seeds are uploaded once. Methods that run on the GPU read their arrays and leave their maps
there; for other methods only the programs' outputs are downloaded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from ...kernels import DeviceError, OutOfMemory
from ..backends import Backend, Executable
from ..bundle.kinds import Kind
from ..bundle.manifest import Manifest, Program, Tap
from ..bundle.reading import Bundle
from ..errors import CamrtError, InputError
from .batches import Batch, chunks
from .cuda_graphs import CudaGraphs
from .lanes import Lanes
from .memory import Memory
from .timing import Stages, TimedExecutable

T = TypeVar("T")
_MOST_KEPT = 256


class Session:
    """Runs the programs of one bundle. May be used from several threads.

    max_batch: the most images or targets in one run; mask_batch: the most masked images. They are halved when the
    GPU's memory runs out. stages: measures the time of each stage while `Explainer.timed` is active, else None.
    InputError, BackendUnavailable for a precision that cannot be had here.
    """

    def __init__(self, bundle: Bundle, backend: Backend, max_batch: int, mask_batch: int, precision: str) -> None:
        self.bundle = bundle
        self.backend = backend
        self.precision = precision
        one = bundle.manifest.batch == 1
        self.max_batch, self.mask_batch = (1, 1) if one else (max_batch, mask_batch)
        self.memory = Memory(None if backend.gpu is None else backend.gpu.stream)
        self.lanes = Lanes(backend.lanes)
        self.stages: Stages | None = None
        self._scoring = backend  # of masked images
        if precision == "bf16":
            from ..backends.openvino import create_bfloat16

            if backend.gpu is not None:
                raise InputError("precision 'bf16' is for the CPU: use backend='onnxruntime'")
            self._scoring = create_bfloat16(backend.lanes)
        self._cuda_graphs = None if backend.gpu is None or not backend.gpu.captures else CudaGraphs(backend.gpu.stream)
        self._opened: dict[tuple[str, tuple[str, ...], bool, bool], Executable] = {}
        self._kept: dict[Hashable, Any] = {}
        self._lock = threading.Lock()

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave at an earlier call with this key; it must depend on the bundle and the key alone."""
        kept = self._kept.get(key)
        if kept is None:
            kept = make()
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[key] = kept
        return kept

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return self.manifest.input_shape[1:]

    @property
    def cuda_graphs(self) -> CudaGraphs | None:
        """None if the backend has none, and while stages are timed: a graph does not separate stages."""
        return self._cuda_graphs if self.stages is None else None

    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.stages is None else self.stages(name)

    # ---- programs

    def taps(self, names: Sequence[str]) -> tuple[Tap, ...]:
        """The taps of these names, in the bundle's order; unknown names are ignored."""

        def found() -> tuple[Tap, ...]:
            wanted = set(names)
            return tuple(t for t in self.manifest.taps if t.name in wanted)

        return self.once(("taps", *names), found)

    def program(self, kind: Kind, layers: Sequence[str] = ()) -> Program:
        """The program of a kind with the fewest taps that has all the layers. CamrtError if there is none.

        Of the gradients, where the backend prunes, without the first quarters of the taps that no layer lies in: the
        backward pass ends there. Quarters, as every program that is opened holds weights.
        """

        def found() -> Program:
            program = self.bundle.program(kind, layers, self.precision)
            if kind == Kind.GRADIENTS and self.backend.prunes and layers:
                return program.part(program.taps[quarter(program, layers) :])
            return program

        return self.once(("program", kind, self.backend.prunes, *layers), found)

    def spares(self, layers: Sequence[str]) -> bool:
        """Whether the gradients program for these layers leaves out a part of the backward pass that the layer_maps
        program runs.
        """
        if not self.backend.prunes:
            return False
        key = ("quarter", *layers)
        return self.once(key, lambda: quarter(self.program(Kind.LAYER_MAPS, layers), layers)) > 0

    def open(self, program: Program, concurrent: bool = False) -> Executable:
        """The opened program; it is opened once. concurrent: for runs in lanes, one thread each."""
        return self._open_on(self.backend, program, concurrent)

    def open_for_masks(self, program: Program) -> Executable:
        """As `open`, for masked images, in lanes: in bf16 on the backend that computes so."""
        return self._open_on(self._scoring, program, self.lanes.count > 1)

    def _open_on(self, backend: Backend, program: Program, concurrent: bool) -> Executable:
        with self._lock:
            key = (program.file, program.taps, concurrent, backend is self.backend)
            if key not in self._opened:
                self._opened[key] = backend.open(self.bundle, program, concurrent)
            executable = self._opened[key]
        return executable if self.stages is None else TimedExecutable(executable, self.stages)

    def run(
        self,
        program: Program,
        batch: Batch,
        share_image: bool,
        on_gpu: bool = False,
        feeds: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Runs a program that takes images and seeds. Returns output name -> array.

        share_image: the program accepts one image with several seeds. on_gpu: the results stay on the GPU. feeds: what
        it takes beside them, one row per seed.
        """
        images = batch.images
        if not share_image and len(images) != len(batch.seeds):
            images = self.memory.repeated(images, len(batch.seeds))
        out = self.open(program).run({"image": images, "seed": batch.seeds, **feeds})
        return out if on_gpu else self.on_host(out)

    def on_host(self, out: dict[str, Any]) -> dict[str, np.ndarray]:
        """A program's outputs as NumPy's arrays."""
        return dict(zip(out, self.memory.get(*out.values()), strict=True))

    def logits(self, images: Any) -> np.ndarray:
        """Logits (B, classes) on the host, of images (B, C, H, W)."""
        program = self.open(self.program(Kind.CLASSIFY))

        def work(batch: Any) -> Any:
            return program.run({"image": batch})["logits"]

        batch_logits = []
        for _, batch in chunks(images, self.max_batch):
            if self.cuda_graphs is None:
                batch_logits.append(work(batch))
            else:
                batch_logits.append(self.memory.copied(self.cuda_graphs.run(("classify", batch.shape), (batch,), work)))
        return np.concatenate(self.memory.get(*batch_logits))

    @property
    def exact_logits_program(self) -> Program:
        """A program whose logits are computed in float32, whatever the precision: close scores keep their order."""
        classify = self.program(Kind.CLASSIFY)
        return classify if classify.precision == "float32" else self.program(Kind.ACTIVATIONS)

    def exact_logits(self, images: Any) -> np.ndarray:
        """As `logits`, in float32."""
        program = self.exact_logits_program
        if program.kind == Kind.CLASSIFY:
            return self.logits(images)
        executable = self.open(program)
        found = [executable.run({"image": batch})["logits"] for _, batch in chunks(images, self.max_batch)]
        return np.concatenate(self.memory.get(*found))

    def normalized(self, images: Any) -> Any:
        """The tensor that masks multiply, on the host or GPU as the images are: the images (B, C, H, W); or, if the
        network normalises its input itself, the tensor that its first layer reads, (B, C', H, W).
        """
        if self.manifest.normalized is None:
            return images
        return self.open(self.program(Kind.NORMALIZE)).run({"image": images})["normalized"]

    def scored(self, normalized: np.ndarray) -> np.ndarray:
        """Logits (B, classes) on the host, of tensors (B, C', H, W) as `normalized` returns them."""
        program = self.open(self.program(Kind.SCORE))
        batch_logits = [
            program.run({"normalized": self.memory.put(batch)})["logits"]
            for _, batch in chunks(normalized, self.max_batch)
        ]
        return np.concatenate(self.memory.get(*batch_logits))

    # ---- a GPU

    @contextmanager
    def exclusive(self, halving: bool = False) -> Iterator[None]:
        """Only one thread at a time is inside, if there is a GPU. A DeviceError inside becomes a CamrtError.

        halving: OutOfMemory passes unchanged, because the caller tries again with a smaller batch.
        """
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

    def make_room(self, masks: bool = False) -> bool:
        """Makes room after the GPU's memory ran out: frees unused memory and CUDA graphs; if there were no graphs,
        halves max_batch, or mask_batch if masked images ran.

        Returns False if there were no graphs and it is 1 already.
        """
        with self.exclusive():
            cleared = self._cuda_graphs is not None and self._cuda_graphs.clear()
            if self.memory.stream is not None:
                self.memory.stream.device.give_back()
            if cleared:
                return True
            if masks:
                halved, self.mask_batch = self.mask_batch > 1, max(1, self.mask_batch // 2)
            else:
                halved, self.max_batch = self.max_batch > 1, max(1, self.max_batch // 2)
            return halved


def quarter(program: Program, layers: Sequence[str]) -> int:
    """The first tap of the quarter in which the first of the layers lies."""
    count, first = len(program.taps), min(program.taps.index(layer) for layer in layers)
    return (4 * first // count * count + 3) // 4
