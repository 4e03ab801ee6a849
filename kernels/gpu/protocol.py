"""The GPU as the runtime uses it; gpu/device.py and gpu/stream.py implement it with PyCUDA."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from .arrays import DeviceArray
from .queue import Queue


class GpuDevice(Protocol):
    """A GPU of this machine. model: names the card; cards of one model share engines. closed: the process is ending."""

    @property
    def ordinal(self) -> int: ...

    @property
    def compute_capability(self) -> tuple[int, int]: ...

    @property
    def model(self) -> str: ...

    @property
    def closed(self) -> bool: ...

    def active(self, what: object = ...) -> AbstractContextManager[Any]:
        """Makes the GPU's context current on this thread. Errors inside become DeviceError, starting with `what`."""
        ...

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the GPU's memory."""
        ...

    def give_back(self) -> None:
        """Frees the memory that is kept for later arrays."""
        ...


class GpuEvent(Protocol):
    """A point in a stream's queue."""

    def synchronize(self) -> None:
        """Waits until all work queued before it is done."""
        ...


class GpuGraph(Protocol):
    """Work that was captured."""

    def launch(self) -> None:
        """Queues all of it again."""
        ...


class GpuStream(Queue):
    """A queue of kernels, copies and engines on one GPU, with the memory that they use."""

    @property
    @abstractmethod
    def device(self) -> GpuDevice: ...

    @property
    @abstractmethod
    def capturing(self) -> bool: ...

    @abstractmethod
    def upload(self, array: np.ndarray, out: DeviceArray | None = None) -> DeviceArray:
        """Queues a copy to the GPU, into `out` or a new array."""

    @abstractmethod
    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Queues a copy on the GPU."""

    @abstractmethod
    def download_all(self, arrays: Iterable[DeviceArray]) -> list[np.ndarray]:
        """Copies arrays to the host. Waits once, for all work queued before."""

    @abstractmethod
    def hold(self, value: Any) -> None:
        """Keeps `value` alive as long as the graph that is being captured."""

    @abstractmethod
    def capture(self) -> AbstractContextManager[GpuGraph]:
        """Records the work queued inside as a graph, without running it."""

    @abstractmethod
    def event(self) -> GpuEvent:
        """The current end of the queue."""
