"""What the runtime uses of a GPU, whatever drives it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from .arrays import DeviceArray
from .queue import Queue


class GpuDevice(Protocol):
    """A GPU that is here. model: tells cards apart that need engines of their own; closed: the process ends."""

    @property
    def ordinal(self) -> int: ...

    @property
    def compute_capability(self) -> tuple[int, int]: ...

    @property
    def model(self) -> str: ...

    @property
    def closed(self) -> bool: ...

    def active(self, what: str = ...) -> AbstractContextManager[Any]:
        """Makes the GPU's context this thread's; errors inside become DeviceError, with `what` in front."""
        ...

    def memory(self) -> tuple[int, int]:
        """Free and all bytes."""
        ...

    def give_back(self) -> None:
        """Frees the memory that is kept for later arrays."""
        ...


class GpuEvent(Protocol):
    """A moment in a stream's queue."""

    def synchronize(self) -> None:
        """Waits until it has come."""
        ...


class GpuGraph(Protocol):
    """Work that was captured."""

    def launch(self) -> None:
        """Queues all of it again."""
        ...


class GpuStream(Queue, Protocol):
    """A queue of kernels, copies and engines on one GPU, with the memory that they use."""

    @property
    def device(self) -> GpuDevice: ...

    @property
    def capturing(self) -> bool: ...

    def upload(self, array: np.ndarray, out: DeviceArray | None = None) -> DeviceArray:
        """Queues a copy to the GPU, into `out` or a new array."""
        ...

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Queues a copy on the GPU."""
        ...

    def download_all(self, arrays: Iterable[DeviceArray]) -> list[np.ndarray]:
        """Copies to the host; waits once, for all that was queued before."""
        ...

    def hold(self, value: Any) -> None:
        """Keeps what the graph that is being captured will use."""
        ...

    def capture(self) -> AbstractContextManager[GpuGraph]:
        """Records what is queued inside, without running it."""
        ...

    def event(self) -> GpuEvent:
        """The moment in the queue that comes now."""
        ...
