"""Launches of kernels, independent of the driver: Launch, the queue that takes it, and helpers for grid sizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import DeviceArray

LARGEST = 2**31 - 1
MAX_GRID = (LARGEST, 65535)  # blocks along x and y; a kernel loops if its work needs more blocks
THREADS = 256
FULL = 1024  # blocks that fill a large GPU: a few for each of 100 to 200 multiprocessors
WARP = 32
NOTHING = np.uint64(0)  # a null pointer
NOT_FINITE = 2
FAULTS = {1: "winsorize: a row holds NaN", NOT_FINITE: "NaN or infinity"}  # the queue's fault -> its message

Argument = DeviceArray | np.number


@dataclass(slots=True)
class Launch:
    """One launch: blocks (x, y), threads per block, bytes of dynamic shared memory, the kernel's arguments in order."""

    module: str  # the .cu file's name
    kernel: str
    grid: tuple[int, int]
    threads: int
    shared: int
    arguments: tuple[Argument, ...]

    def __str__(self) -> str:
        arrays = [a for a in self.arguments if isinstance(a, DeviceArray) and a.dtype.names is None]  # without tables
        return f"{self.kernel}({', '.join(f'{a.dtype}{list(a.shape)}' for a in arrays)})"


class Queue(ABC):
    """A stream of one GPU. handle: its CUDA handle. shared_limit: bytes of shared memory that a block may have.

    fault: an int32 (1,), a key of FAULTS: a kernel sets it if its input is invalid.
    """

    handle: int
    shared_limit: int
    fault: DeviceArray

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: Any = np.float32) -> DeviceArray: ...

    @abstractmethod
    def constant(self, array: np.ndarray) -> DeviceArray:
        """A small array on the GPU, uploaded once."""

    @abstractmethod
    def upload(self, array: np.ndarray) -> DeviceArray: ...

    @abstractmethod
    def launch(self, launch: Launch) -> None: ...

    @abstractmethod
    def wait_for(self, stream: int) -> None:
        """Work queued here later waits for the work that is now queued on `stream` (a handle)."""

    @abstractmethod
    def hold_back(self, stream: int) -> None:
        """Work queued on `stream` (a handle) later waits for the work that is now queued here."""


def int32s(kernel: str, **counts: int) -> tuple[np.int32, ...]:
    """Counts as int32, as kernels take them. ValueError if one is too large."""
    for name, count in counts.items():
        if count > LARGEST:
            raise ValueError(f"{kernel}: {name} is {count}, at most {LARGEST}")
    return tuple(np.int32(count) for count in counts.values())


def strips(size: Sequence[int], vector: int) -> int:
    """Blocks for an image of size (height, width), if each warp computes 32 vectors of one row."""
    height, width = size
    return blocks(height * -(-width // (WARP * vector)), THREADS // WARP)


def blocks(work: int, per_block: int, axis: int = 0) -> int:
    """Blocks for `work` items at `per_block` each, at least 1, at most the grid's limit along `axis`."""
    return max(1, min(-(-work // per_block), MAX_GRID[axis]))


def is_wide(vector: int, width: int, *arrays: DeviceArray) -> bool:
    """Whether rows of `width` entries can be read and written as 16-byte vectors of `vector` entries."""
    return width % vector == 0 and all(a.pointer % 16 == 0 for a in arrays)
