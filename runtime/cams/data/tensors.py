"""Whole activations and gradients of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.kinds import Kind
from ...bundle.manifest import Tap
from ...session.batches import repeated, scores_of
from .base import MethodData

if TYPE_CHECKING:
    from ...session.batches import Batch
    from ...session.session import Session


@dataclass(frozen=True)
class Activations(MethodData):
    """Activations of L layers: (S, K, h, w) each, in the order of `taps`. Other fields as in LayerMaps.

    If one image has several seeds, its activation is repeated S times, without a copy.
    """

    kinds = (Kind.ACTIVATIONS,)

    taps: tuple[Tap, ...]
    logits: np.ndarray
    seeds: np.ndarray
    activations: tuple[np.ndarray, ...]
    size: tuple[int, int]

    @classmethod
    def read(
        cls, session: Session, batch: Batch, layers: Sequence[str], options: Mapping[str, Any], on_gpu: bool = False
    ) -> Activations:
        program = session.open(session.program(Kind.ACTIVATIONS, layers))
        out, taps = session.on_host(program.run({"image": batch.images})), session.taps(layers)
        activations = tuple(repeated(out[f"activation:{t.name}"], len(batch.seeds)) for t in taps)
        return cls(taps, *scores_of(out, batch), activations, session.size)


@dataclass(frozen=True)
class Gradients(MethodData):
    """Activations and gradients of L layers: (S, K, h, w) each, as Activations."""

    kinds = (Kind.GRADIENTS,)

    taps: tuple[Tap, ...]
    logits: np.ndarray
    seeds: np.ndarray
    activations: tuple[np.ndarray, ...]
    gradients: tuple[np.ndarray, ...]
    size: tuple[int, int]

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(activation, gradient) per layer."""
        return zip(self.activations, self.gradients, strict=True)

    @classmethod
    def read(
        cls, session: Session, batch: Batch, layers: Sequence[str], options: Mapping[str, Any], on_gpu: bool = False
    ) -> Gradients:
        out = session.run(session.program(Kind.GRADIENTS, layers), batch, session.manifest.seeds_share_image)
        taps = session.taps(layers)
        activations = tuple(repeated(out[f"activation:{t.name}"], len(batch.seeds)) for t in taps)
        gradients = tuple(out[f"gradient:{t.name}"] for t in taps)
        return cls(taps, *scores_of(out, batch), activations, gradients, session.size)
