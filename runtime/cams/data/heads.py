"""The part of the network after a layer, to run on changed activations."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Heads(MethodData):
    """One image: its activations (K, h, w) per layer, and the rest of the network after each layer.

    heads: per layer, changed activations (N, K, h, w) -> logits (N, classes), for any N. probabilities: logits
    (N, classes) -> (N, classes). batch: the most activations in one run. in_lanes(work, parts): [work(part) for part in
    parts], several at the same time if the backend has several lanes.
    """

    kinds = (Kind.TRUNK, Kind.HEAD)
    by_image = True

    taps: tuple[Tap, ...]
    logits: np.ndarray
    seeds: np.ndarray
    activations: tuple[np.ndarray, ...]
    heads: tuple[Callable[[np.ndarray], np.ndarray], ...]
    probabilities: Callable[[np.ndarray], np.ndarray]
    batch: int
    in_lanes: Callable[[Callable[[slice], np.ndarray], Sequence[slice]], list[np.ndarray]]
    size: tuple[int, int]

    @classmethod
    def read(
        cls, session: Session, batch: Batch, layers: Sequence[str], options: Mapping[str, Any], on_gpu: bool = False
    ) -> Heads:
        taps, heads, activations, last = session.taps(layers), [], [], None
        for tap in taps:
            trunk = session.open(session.program(Kind.TRUNK, [tap.name]))
            out = session.on_host(trunk.run({"image": batch.images}))
            context = {name: array for name, array in out.items() if name.startswith("context:")}
            head = session.open(session.program(Kind.HEAD, [tap.name]), concurrent=session.lanes.count > 1)

            def run(changed: np.ndarray, head: Executable = head, context: dict = context) -> np.ndarray:
                beside = {name: np.repeat(array, len(changed), axis=0) for name, array in context.items()}
                return head.run({"activation": changed, **beside})["logits"]

            heads.append(run)
            activations.append(out["activation"][0])
            last = out
        assert last is not None
        logits, seeds = scores_of(last, batch)
        return cls(
            taps=taps,
            logits=logits,
            seeds=seeds,
            activations=tuple(activations),
            heads=tuple(heads),
            probabilities=partial(probabilities, manifest=session.manifest),
            batch=session.max_batch,
            in_lanes=session.lanes.map,
            size=session.size,
        )
