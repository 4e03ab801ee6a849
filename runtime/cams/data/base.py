"""What the classes of data have in common."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from ...bundle.kinds import Kind
from ...bundle.manifest import Tap

if TYPE_CHECKING:
    from ...session.batches import Batch
    from ...session.session import Session


class MethodData:
    """The first argument of a method's function: data of S explanations that run together.

    taps: its layers. logits: (S, classes) float32. kinds: the programs that compute it. on_gpu: whether its arrays can
    be on a GPU. captured: whether its computation there can be replayed as a CUDA graph. by_image: whether each image
    runs in its own batch, with all of its targets.
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
        """Runs the programs and returns their outputs as this class. on_gpu: the arrays stay on the GPU.

        layers: names of taps; options: the method's options. CamrtError if the bundle has no program for it. NaN and
        infinity: `explain_batch` checks the logits, `Explainer.explain` the maps; a class may check more.
        """
        raise NotImplementedError

    @classmethod
    def stays_on_gpu(cls, options: Mapping[str, Any]) -> bool:
        """Whether its arrays stay on the GPU, if the backend has one, with these options of the method."""
        return cls.on_gpu


@functools.lru_cache(maxsize=64)
def columns(widths: tuple[int, ...], indices: tuple[int, ...]) -> np.ndarray:
    """Column numbers of the arrays at `indices`, of arrays with these widths side by side."""
    ends = np.cumsum([0, *widths])
    found = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in indices])
    found.flags.writeable = False
    return found
