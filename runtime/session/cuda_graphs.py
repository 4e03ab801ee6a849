"""Work on a GPU that runs again with the same shapes: captured once, then replayed as one CUDA graph."""

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
    """The CUDA graphs of one stream. The first two runs of a key run as usual; the second is then also captured; later
    runs replay it.

    The next run of the same key overwrites a run's result: read or copy it before.
    """

    def __init__(self, stream: GpuStream) -> None:
        self._stream = stream
        self._kept: OrderedDict[Hashable, _Captured] = OrderedDict()

    def run(self, key: Hashable, inputs: Sequence[Any], work: Callable[..., Any]) -> Any:
        """Returns work(*inputs), or replays it. key: of the same work with the same shapes.

        The inputs are first copied to GPU memory that is fixed for the key. Raises the errors of `work`.
        """
        capture = self._kept.pop(key, None)
        first = capture is None
        if capture is None:
            capture = _Captured([self._stream.empty(a.shape, a.dtype) for a in inputs])
        for array, place in zip(inputs, capture.inputs, strict=True):
            if isinstance(array, np.ndarray):
                self._stream.upload(array, out=place)
            else:
                self._stream.copy(array, place)
        if capture.graph is not None:
            capture.graph.launch()
            result = capture.result
        else:  # this loads kernels and engines, uploads constants and sets shapes, which a capture cannot do
            result = work(*capture.inputs)
            if not first and not capture.eager:
                self._capture(capture, work)
        self._kept[key] = capture
        while len(self._kept) > MOST:
            self._kept.popitem(last=False)
        return result

    def _capture(self, capture: _Captured, work: Callable[..., Any]) -> None:
        """Captures the work, after the same work ran. If that fails, warns, and later runs are not captured."""
        self._stream.event().synchronize()  # nothing runs while the work is recorded
        try:
            with self._stream.capture() as graph:
                capture.result = work(*capture.inputs)
            capture.graph = graph
        except OutOfMemory:
            raise
        except (DeviceError, EngineError) as error:
            capture.eager, capture.result = True, None
            warnings.warn(f"this call cannot be replayed as a CUDA graph, so it is slower: {error}", stacklevel=2)

    def clear(self) -> bool:
        """Frees all graphs and their memory. Returns whether there were any."""
        held = bool(self._kept)
        self._kept.clear()
        return held
