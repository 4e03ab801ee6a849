"""What the full_grad program gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.kinds import Kind
from ...bundle.manifest import Tap
from ...session.batches import scores_of
from .base import MethodData

if TYPE_CHECKING:
    from ...session.batches import Batch
    from ...session.session import Session


@dataclass(frozen=True)
class GridMaps(MethodData):
    """The outputs of the full_grad program. maps: for each grid size, the sum (S, h, w) of its maps.

    logits, seeds (S, classes) and size (H, W): as in LayerMaps. taps is empty.
    """

    kinds = (Kind.FULL_GRAD,)

    taps: tuple[Tap, ...]
    logits: np.ndarray
    seeds: np.ndarray
    maps: tuple[np.ndarray, ...]
    size: tuple[int, int]

    @classmethod
    def read(
        cls, session: Session, batch: Batch, layers: Sequence[str], options: Mapping[str, Any], on_gpu: bool = False
    ) -> GridMaps:
        program = session.program(Kind.FULL_GRAD)
        out = session.run(program, batch, share_image=False)
        maps = tuple(out[name] for name in program.outputs if name.startswith("grid:"))
        return cls((), *scores_of(out, batch), maps, session.size)
