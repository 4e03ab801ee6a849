"""What the GPU backends share: the stream, and programs whose arrays are on the host or on the GPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ...kernels import DeviceArray, DeviceError, GpuStream
from ..bundle.manifest import Program
from ..errors import BackendUnavailable, InputError


@dataclass(frozen=True)
class Gpu:
    """One stream, which runs programs and kernels one after the other. A thread holds `lock` while it uses the stream.

    captures: whether programs can be captured in a CUDA graph.
    """

    stream: GpuStream
    captures: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)


class Engine(Protocol):
    """What runs a program on a GPU's arrays."""

    def enqueue(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Queues the work. DeviceError, EngineError."""
        ...


class GpuProgram:
    """A program on a GPU.

    If all inputs are host arrays, they are uploaded and the results are downloaded. If at least one input is on the
    GPU, the results stay on the GPU, in the order of the stream. InputError for a wrong shape; DeviceError.
    """

    def __init__(self, program: Program, engine: Engine, gpu: Gpu) -> None:
        self._program = program
        self._engine = engine
        self._gpu = gpu

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        stream = self._gpu.stream
        with self._gpu.lock:
            on_host = all(isinstance(array, np.ndarray) for array in feeds.values())
            inputs = {n: stream.upload(a) if isinstance(a, np.ndarray) else a for n, a in feeds.items()}
            sizes = self._sizes(inputs)
            outputs = {
                name: stream.empty([sizes[d] if isinstance(d, str) else d for d in shape])
                for name, shape in self._program.outputs.items()
            }
            self._engine.enqueue(inputs, outputs)
            return dict(zip(outputs, stream.download_all(outputs.values()), strict=True)) if on_host else outputs

    def _sizes(self, inputs: Mapping[str, DeviceArray]) -> dict[str, int]:
        """The values of the symbolic sizes. InputError if an input has the wrong dtype or shape."""
        sizes: dict[str, int] = {}
        for name, shape in self._program.inputs.items():
            array = inputs.get(name)
            dtype = self._program.input_dtype
            if array is None or array.dtype != dtype or not _fits(array.shape, shape, sizes):
                got = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
                raise InputError(f"{self._program.file}: input {name!r} is {got}, it takes {dtype}{list(shape)}")
        return sizes


def _fits(got: Sequence[int], want: Sequence[Any], sizes: dict[str, int]) -> bool:
    if len(got) != len(want):
        return False
    for size, expected in zip(got, want, strict=True):
        if sizes.setdefault(expected, size) != size if isinstance(expected, str) else expected != size:
            return False
    return True


def open_gpu(ordinal: int, captures: bool) -> Gpu:
    """A new stream on GPU `ordinal`. BackendUnavailable says what is missing if our kernels cannot run there."""
    try:
        from ...kernels.gpu.device import device

        card = device(ordinal)
        card.check()
        return Gpu(card.stream(), captures)
    except DeviceError as error:
        raise BackendUnavailable(str(error)) from error
