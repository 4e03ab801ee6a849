"""A network to run masked images through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.kinds import Kind
from ...bundle.manifest import Tap
from ...session.batches import check_finite, scores_of
from ...session.memory import HOST, Memory
from .base import MethodData

if TYPE_CHECKING:
    from ...session.batches import Batch
    from ...session.session import Session


@dataclass(frozen=True)
class Lane:
    """A place where batches run one after the other: run(masked (n, C, H, W)) -> logits (n, classes), and its buffers,
    masked (N, C, H, W) and on the host gates (N, H, W), N the most that a part holds.
    """

    number: int
    run: Callable[[Any], Any]
    masked: Any
    gates: np.ndarray | None


@dataclass(frozen=True)
class MaskedRuns(MethodData):
    """One image (C, H, W), its activations (K, h, w) per layer, and the network to run masked images through.

    logits and seeds (S, classes) are on the host, the image and the activations in `memory`. probability: the kind of
    kernels.class_scores that makes logits probabilities. batches(count, work): calls work(part, lane) for parts of
    0..count, several at a time where the backend has several lanes; a part always goes to the same lane.
    """

    kinds = (Kind.ACTIVATIONS, Kind.CLASSIFY)
    on_gpu = True
    by_image = True

    taps: tuple[Tap, ...]
    logits: np.ndarray
    seeds: np.ndarray
    image: Any
    activations: tuple[Any, ...]
    probability: str
    batches: Callable[[int, Callable[[slice, Lane], None]], None]
    memory: Memory = HOST

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[1:]

    @classmethod
    def read(
        cls, session: Session, batch: Batch, layers: Sequence[str], options: Mapping[str, Any], on_gpu: bool = False
    ) -> MaskedRuns:
        """On the GPU, where there is one; what decides which masks run, and the seeds, come to the host."""
        memory = session.memory
        out = session.open(session.program(Kind.ACTIVATIONS, layers)).run({"image": batch.images})
        taps = session.taps(layers)
        activations = tuple(a.reshape(*a.shape[1:]) for a in (out[f"activation:{t.name}"] for t in taps))
        logits, seeds = scores_of({"logits": memory.get(out["logits"])[0]}, batch)
        check_finite(logits)
        entry = "image" if session.manifest.normalized is None else "normalized"
        scored = session.open(
            session.program(Kind.CLASSIFY if entry == "image" else Kind.SCORE), concurrent=session.lanes.count > 1
        )

        def run(masked: Any) -> Any:
            return scored.run({entry: masked})["logits"]

        def batches(count: int, work: Callable[[slice, Lane], None]) -> None:
            starts = range(0, count, session.max_batch)
            lanes = min(session.lanes.count, len(starts))

            def drive(number: int) -> None:
                room = min(session.max_batch, count)
                masked = memory.empty((room, *session.manifest.scored_shape))
                gates = None if memory.stream is not None else np.empty((room, *session.size), np.float32)
                lane = Lane(number, run, masked, gates)
                for start in starts[number::lanes]:
                    work(slice(start, min(start + session.max_batch, count)), lane)

            session.lanes.map(drive, range(lanes))

        image = session.normalized(batch.images)
        image = image.reshape(*image.shape[1:])
        return cls(taps, logits, seeds, image, activations, session.manifest.probability, batches, memory)
