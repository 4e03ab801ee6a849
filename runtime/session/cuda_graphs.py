"""Work on a GPU that is queued again and again: once its shapes are known, as one CUDA graph."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...kernels import DeviceError, GpuStream, OutOfMemory
from ..errors import EngineError

MOST = 16  # graphs that are kept; each holds the memory that its work uses


@dataclass
class _Captured:
    inputs: list[Any]
    graph: Any = None
    eager: bool = False
    result: Any = None


class CudaGraphs:
    """For one stream. The second run of a key is captured as well, every later one replayed.

    What a run returns lies in memory that the next run of its key writes again: read or copy it before.
    """

    def __init__(self, stream: GpuStream) -> None:
        self._stream = stream
        self._kept: OrderedDict[Hashable, _Captured] = OrderedDict()

    def run(self, key: Hashable, inputs: Sequence[Any], work: Callable[..., Any]) -> Any:
        """work(*inputs), its inputs first taken to memory of the GPU that stays theirs. Errors of `work`."""
        kept = self._kept.pop(key, None)
        first = kept is None
        if kept is None:
            kept = _Captured([self._stream.empty(a.shape) for a in inputs])
        for given, place in zip(inputs, kept.inputs, strict=True):
            if isinstance(given, np.ndarray):
                self._stream.upload(given, out=place)
            else:
                self._stream.copy(given, place)
        if kept.graph is not None:
            kept.graph.launch()
            result = kept.result
        else:  # loads kernels and engines, uploads constants, sets an engine's shapes: what cannot be captured
            result = work(*kept.inputs)
            if not first and not kept.eager:
                self._capture(kept, work)
        self._kept[key] = kept
        while len(self._kept) > MOST:
            self._kept.popitem(last=False)
        return result

    def _capture(self, kept: _Captured, work: Callable[..., Any]) -> None:
        """Right after the same work was run. What an engine cannot have captured is run as it is from now on."""
        try:
            with self._stream.capture() as graph:
                kept.result = work(*kept.inputs)
            kept.graph = graph
        except OutOfMemory:
            raise
        except (DeviceError, EngineError) as error:
            kept.eager, kept.result = True, None
            warnings.warn(f"not replayed as a CUDA graph, and so slower: {error}", stacklevel=2)

    def clear(self) -> bool:
        """Gives the memory back; whether there was any."""
        held = bool(self._kept)
        self._kept.clear()
        return held
