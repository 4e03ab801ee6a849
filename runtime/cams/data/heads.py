"""The part of the network after a layer, to run on changed activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...backends import Executable
from ...bundle.kinds import Kind
from ...bundle.manifest import Tap
from ...scores import probabilities
from ...session.batches import scores_of
from .base import MethodData

if TYPE_CHECKING:
    from ...session.batches import Batch
    from ...session.session import Session


_FOR_LANES = 2**16  # numbers that a head reads: with fewer, another thread takes longer to wake than to help


@dataclass(frozen=True)
class Heads(MethodData):
    """One image: its activations (K, h, w) per layer, and the rest of the network after each layer.

    heads: per layer, changed activations (N, K, h, w) -> logits (N, classes), for any N; where `means` has the layer's
    means over the grid (K,), changed means (N, K) instead: the network reads nothing else of it. probabilities: logits
    (N, classes) -> (N, classes). batch: the most activations in one run; by_number: of means a run may have more, as
    many as hold as many numbers. in_lanes(work, parts): [work(part) for part in parts], `lanes` at the same time.
    """

    kinds = (Kind.TRUNK, Kind.HEAD)
    by_image = True

    taps: tuple[Tap, ...]
    logits: np.ndarray
    seeds: np.ndarray
    activations: tuple[np.ndarray, ...]
    means: tuple[np.ndarray | None, ...]
    heads: tuple[Callable[[np.ndarray], np.ndarray], ...]
    probabilities: Callable[[np.ndarray], np.ndarray]
    batch: int
    lanes: int
    by_number: bool
    in_lanes: Callable[[Callable[[slice], np.ndarray], Sequence[slice]], list[np.ndarray]]
    size: tuple[int, int]

    def parts(self, index: int, count: int) -> list[slice]:
        """Divides `count` changed activations, or means, of a layer into runs."""
        size, tap = self.batch, self.taps[index]
        if self.by_number and self.means[index] is not None:
            lanes = self.lanes if count * tap.channels >= _FOR_LANES else 1
            rounds = -(-count // (size * math.prod(tap.grid) * lanes))  # as many equal runs in each lane
            size = max(size, -(-count // (rounds * lanes)))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    @classmethod
    def read(
        cls, session: Session, batch: Batch, layers: Sequence[str], options: Mapping[str, Any], on_gpu: bool = False
    ) -> Heads:
        taps, heads, activations, means, last = session.taps(layers), [], [], [], None
        for tap in taps:
            trunk = session.open(session.program(Kind.TRUNK, [tap.name]))
            out = session.on_host(trunk.run({"image": batch.images}))
            context = {name: array for name, array in out.items() if name.startswith("context:")}
            program = session.program(Kind.HEAD, [tap.name])
            head = session.open(program, concurrent=session.lanes.count > 1)
            reads = "means" if "means" in program.inputs else "activation"

            def run(changed: np.ndarray, head: Executable = head, reads: str = reads, context: dict = context) -> Any:
                beside = {name: np.repeat(array, len(changed), axis=0) for name, array in context.items()}
                return head.run({reads: changed, **beside})["logits"]

            heads.append(run)
            means.append(out["means"][0] if reads == "means" else None)
            activations.append(out["activation"][0])
            last = out
        assert last is not None
        logits, seeds = scores_of(last, batch)
        return cls(
            taps=taps,
            logits=logits,
            seeds=seeds,
            activations=tuple(activations),
            means=tuple(means),
            heads=tuple(heads),
            probabilities=partial(probabilities, manifest=session.manifest),
            batch=session.max_batch,
            lanes=session.lanes.count,
            by_number=session.memory.stream is None and session.manifest.batch != 1,
            in_lanes=session.lanes.map,
            size=session.size,
        )
