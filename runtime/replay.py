"""Work on a GPU that is queued again and again: once its shapes are known, as one CUDA graph."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels import DeviceError
from .errors import EngineError

MOST = 16  # graphs that are kept; each holds the memory that its work uses


@dataclass
class _Replay:
    inputs: list[Any]
    graph: Any = None
    eager: bool = False
    result: Any = None


class Replays:
    """For one stream. The second run of a key is captured, every later one replayed.

    What a run returns lies in memory that the next run of its key writes again: read or copy it before.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._kept: OrderedDict[Hashable, _Replay] = OrderedDict()

    def run(self, key: Hashable, inputs: Sequence[Any], work: Callable[..., Any]) -> Any:
        """work(*inputs), its inputs first taken to memory of the GPU that stays theirs. Errors of `work`."""
        replay = self._kept.pop(key, None)
        first = replay is None
        if replay is None:
            replay = _Replay([self._stream.empty(a.shape) for a in inputs])
        for given, place in zip(inputs, replay.inputs, strict=True):
            if isinstance(given, np.ndarray):
                self._stream.upload(given, out=place)
            else:
                self._stream.copy(given, place)
        if first:  # loads kernels and engines, uploads constants: what cannot be captured
            replay.result = work(*replay.inputs)
        else:
            if replay.graph is None and not replay.eager:
                replay.graph = self._captured(replay, work)
            if replay.graph is None:
                replay.result = work(*replay.inputs)
            else:
                replay.graph.launch()
        self._kept[key] = replay
        while len(self._kept) > MOST:
            self._kept.popitem(last=False)
        return replay.result

    def _captured(self, replay: _Replay, work: Callable[..., Any]) -> Any:
        """The graph; None, from now on, where an engine cannot be captured."""
        try:
            with self._stream.capture() as graph:
                replay.result = work(*replay.inputs)
            return graph
        except (DeviceError, EngineError) as error:
            replay.eager = True
            warnings.warn(f"not replayed as a CUDA graph, and so slower: {error}", stacklevel=2)
            return None

    def clear(self) -> None:
        """Gives the memory back."""
        self._kept.clear()
