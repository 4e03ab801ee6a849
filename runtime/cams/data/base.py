"""What the classes of data have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from ...bundle.kinds import Kind
from ...bundle.manifest import Tap

if TYPE_CHECKING:
    from ...session.batches import Batch
    from ...session.session import Session


class MethodData:
    """What a method's function takes first, for S explanations that run together.

    taps: of the layers that it is of; logits (S, classes). kinds: of the programs that give it. on_gpu: whether it can
    lie on a GPU; captured: whether what computes it there can be replayed as a CUDA graph. by_image: whether one image
    with all of its targets is a batch of its own.
    """

    kinds: ClassVar[tuple[Kind, ...]]
    on_gpu: ClassVar[bool] = False
    captured: ClassVar[bool] = False
    by_image: ClassVar[bool] = False

    taps: tuple[Tap, ...]
    logits: np.ndarray

    @classmethod
    def read(
        cls, session: Session, batch: Batch, layers: Sequence[str], options: Mapping[str, Any], on_gpu: bool = False
    ) -> Self:
        """Runs the programs. on_gpu: the arrays stay on the GPU. CamrtError for NaN or infinity."""
        raise NotImplementedError

    @classmethod
    def stays_on_gpu(cls, options: Mapping[str, Any]) -> bool:
        """Whether it lies on a GPU, if there is one, with these options of the method."""
        return cls.on_gpu
