"""One image, its activations, and the network, to run masked images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ....kernels import channel_extremes, mask_batch, take_channels
from ...bundle.kinds import Kind
from ...bundle.manifest import Program, Tap
from ...session.batches import check_finite, scores_of
from ...session.cuda_graphs import CudaGraphs
from ...session.lanes import Lanes
from ...session.memory import HOST, Memory
from .base import MethodData

if TYPE_CHECKING:
    from ...backends import Executable
    from ...session.batches import Batch
    from ...session.session import Session

T = TypeVar("T")
APPROXIMATE = ("int8", "bf16")  # precisions in which a map says how far it may be from float32's


@dataclass(frozen=True)
class Lane:
    """A part of a layer's masks, which runs batch after batch.

    batches: slices of the masks, at most N each. run: masked images (n, C, H, W) -> logits (n, classes). masked
    (N, C, H, W), and on the host gates (N, H, W): buffers that every batch overwrites, float32 on the host, of the
    program's dtype on a GPU; gates is None on a GPU.
    """

    batches: tuple[slice, ...]
    run: Callable[[Any], Any]
    masked: Any
    gates: np.ndarray | None


@dataclass(frozen=True)
class MaskedRuns(MethodData):
    """One image (C, H, W), its activations (K, h, w) per layer, and the network, to run masked images.

    logits and seeds (S, classes) are on the host, as extremes are: per layer, each channel's lowest and highest value
    (K, 2). The image and the activations are in `memory`. probability: "softmax" or "sigmoid", the `kind` of
    kernels.class_scores. run: masked images (n, C, H, W) -> logits (n, classes); on a GPU they are of `dtype`. exact:
    None; or, where `run` is in a precision of APPROXIMATE, the same in float32. mask_batch: the most masked images in
    one run. graphs: of the GPU, None without one.
    """

    kinds = (Kind.ACTIVATIONS, Kind.CLASSIFY)
    on_gpu = True
    by_image = True

    taps: tuple[Tap, ...]
    logits: np.ndarray
    seeds: np.ndarray
    image: Any
    activations: tuple[Any, ...]
    extremes: tuple[np.ndarray, ...]
    probability: str
    run: Callable[[Any], Any]
    mask_batch: int
    lanes: Lanes
    memory: Memory = HOST
    dtype: str = "float32"
    exact: Callable[[Any], Any] | None = None
    precision: str = "fp32"
    graphs: CudaGraphs | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[1:]

    def share(self, count: int, work: Callable[[Lane], T]) -> list[T]:
        """Divides `count` masks among lanes and returns work(lane) of each; lanes run at the same time if there are
        several.
        """
        room, starts = min(self.mask_batch, count), range(0, count, self.mask_batch)
        number = min(self.lanes.count, len(starts))

        def in_lane(first: int) -> T:
            on_gpu = self.memory.stream is not None
            masked = self.memory.empty((room, *self.image.shape), self.dtype if on_gpu else "float32")
            gates = None if on_gpu else np.empty((room, *self.size), np.float32)
            batches = tuple(slice(s, min(s + self.mask_batch, count)) for s in starts[first::number])
            return work(Lane(batches, self.run, masked, gates))

        return self.lanes.map(in_lane, range(number))

    def logits_under_masks(self, activation: Any, channels: np.ndarray, kind: str, interpolation: str) -> Any:
        """On a GPU: the logits (n, classes) of the image under the masks of n channels, without a wait.

        Every run has the same number of masks, the last one some of them twice, so that one CUDA graph serves them all.
        """
        memory, stream = self.memory, self.memory.stream
        assert stream is not None
        count = len(channels)
        room = min(self.mask_batch, 1 << (count - 1).bit_length())
        padded = np.resize(channels.astype(np.int32), -(-count // room) * room)
        index, found = memory.put(padded), memory.empty((len(padded), self.logits.shape[1]))

        def work(image: Any, activation: Any, index: Any) -> Any:
            taken = take_channels(activation, index, stream=stream)
            masked = memory.empty((room, *image.shape), self.dtype)
            mask_batch(image, taken, kind, interpolation, out=masked, stream=stream)
            return self.run(masked)

        key = "masks", kind, interpolation, room, activation.shape
        for start in range(0, len(padded), room):
            inputs = self.image, activation, index[start : start + room]
            logits = work(*inputs) if self.graphs is None else self.graphs.run(key, inputs, work)
            stream.copy(logits, found[start : start + room])
        return found[:count]

    def exact_logits(self, activation: Any, channels: np.ndarray, kind: str, interpolation: str) -> Any:
        """The logits (n, classes), in float32, of the image under the masks of a few channels."""
        assert self.exact is not None
        memory, stream = self.memory, self.memory.stream
        found = memory.empty((len(channels), self.logits.shape[1]))
        for start in range(0, len(channels), self.mask_batch):
            part = channels[start : start + self.mask_batch].astype(np.int32)
            taken = take_channels(activation, memory.put(part), stream=stream)
            logits = self.exact(mask_batch(self.image, taken, kind, interpolation, stream=stream))
            if stream is None:
                found[start : start + len(part)] = logits
            else:
                stream.copy(logits, found[start : start + len(part)])
        return found

    @classmethod
    def read(
        cls, session: Session, batch: Batch, layers: Sequence[str], options: Mapping[str, Any], on_gpu: bool = False
    ) -> MaskedRuns:
        """As MethodData.read; the image and activations stay on the GPU if there is one, logits and seeds do not.

        CamrtError if the logits hold NaN or infinity.
        """
        memory, manifest = session.memory, session.manifest
        out = session.open(session.program(Kind.ACTIVATIONS, layers)).run({"image": batch.images})
        taps = session.taps(layers)
        activations = tuple(a.reshape(*a.shape[1:]) for a in (out[f"activation:{t.name}"] for t in taps))
        fetched, *extremes = memory.get(
            out["logits"], *(channel_extremes(a, stream=memory.stream) for a in activations)
        )
        logits, seeds = scores_of({"logits": fetched}, batch)
        check_finite(logits)
        program = session.bundle.mask_program(session.precision, memory.stream is not None)
        image, exact = session.normalized(batch.images), None
        if session.precision in APPROXIMATE:
            exact_program = session.bundle.mask_program("fp32", False)
            exact = _runner(exact_program, session.open(exact_program))
        return cls(
            taps=taps,
            logits=logits,
            seeds=seeds,
            image=image.reshape(*image.shape[1:]),
            activations=activations,
            extremes=tuple(extremes),
            probability=manifest.probability,
            run=_runner(program, session.open_for_masks(program)),
            mask_batch=session.mask_batch,
            lanes=session.lanes,
            memory=memory,
            dtype=program.input_dtype,
            exact=exact,
            precision=session.precision,
            graphs=session.cuda_graphs,
        )


def _runner(program: Program, executable: Executable) -> Callable[[Any], Any]:
    """masked images (n, C, H, W) -> logits (n, classes)."""
    (entry,), dtype = program.inputs, program.input_dtype

    def run(masked: Any) -> Any:
        masked = masked.astype(dtype, copy=False) if isinstance(masked, np.ndarray) else masked
        return executable.run({entry: masked})["logits"]

    return run
