"""What the signed_maps program gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.kinds import Kind
from ...bundle.manifest import Tap
from ...session.batches import scores_of
from ..smooth import SCORE_FREE, terms
from .base import MethodData, columns

if TYPE_CHECKING:
    from ...session.batches import Batch
    from ...session.session import Session

LARGEST_RATIO = 1e20  # of |f'''/f''|, which is infinite where f'' is zero: the maps are then their limit, but for scale


@dataclass(frozen=True)
class SignedMaps(MethodData):
    """The outputs of the signed_maps program for L layers, concatenated in the order of `taps`.

    maps (S, sum h w): sum_k u_k y_k with u = sign(f') G / (2 + |f'''/f''| |G| sum_mn |y_k,mn|), not rectified; y is the
    layer, or the output of the norm that alone reads it, and G its gradient. f: the option `smooth`. magnitudes (S, L):
    sum_k,mn |u_k y_k|.
    logits, seeds and size: as in LayerMaps.
    """

    kinds = (Kind.SIGNED_MAPS,)

    taps: tuple[Tap, ...]
    logits: np.ndarray
    seeds: np.ndarray
    maps: np.ndarray
    magnitudes: np.ndarray
    size: tuple[int, int]

    def map_of_layers(self) -> Iterator[np.ndarray]:
        """(S, h, w) per layer."""
        end = 0
        for h, w in (t.grid for t in self.taps):
            start, end = end, end + h * w
            yield self.maps[:, start:end].reshape(-1, h, w)

    @classmethod
    def read(
        cls, session: Session, batch: Batch, layers: Sequence[str], options: Mapping[str, Any], on_gpu: bool = False
    ) -> SignedMaps:
        """As MethodData.read. Runs `classify` before, where the ratio of f's derivatives depends on the score."""
        program, smooth = session.program(Kind.SIGNED_MAPS, layers), options.get("smooth", "identity")
        independent = isinstance(smooth, str) and smooth in SCORE_FREE
        logits = np.zeros_like(batch.seeds) if independent else session.logits(batch.images)
        of_score = terms(smooth, *scores_of({"logits": logits}, batch))
        ratio = np.minimum(np.abs(of_score.ratio), LARGEST_RATIO).astype(np.float32)[:, None]
        out = session.run(program, batch, session.manifest.seeds_share_image, feeds={"ratio": ratio})
        taps, maps, magnitudes = session.taps(program.taps), out["maps"], out["magnitudes"]
        if len(taps) != len(layers):
            wanted = set(layers)
            indices = tuple(i for i, t in enumerate(taps) if t.name in wanted)
            magnitudes = magnitudes[:, indices]
            maps = maps[:, columns(tuple(h * w for h, w in (t.grid for t in taps)), indices)]
        sign = of_score.sign.astype(np.float32)[:, None]
        return cls(session.taps(layers), *scores_of(out, batch), sign * maps, magnitudes, session.size)
