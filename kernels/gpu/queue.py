"""How kernels are launched, whatever the driver: a launch, the queue that takes it, and what launches are planned
with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .arrays import DeviceArray

LARGEST = 2**31 - 1
MAX_GRID = (LARGEST, 65535)  # blocks along x and y; every kernel strides over what a grid does not cover
THREADS = 256
WARP = 32
NOTHING = np.uint64(0)  # a null pointer
NOT_FINITE = 2
FAULTS = {1: "winsorize: a row holds NaN", NOT_FINITE: "NaN or infinity"}  # what a kernel says in the queue's fault

Argument = DeviceArray | np.number


@dataclass(frozen=True)
class Launch:
    """One launch: blocks (x, y), threads per block, bytes of dynamic shared memory, the kernel's arguments in order."""

    module: str  # the .cu file's name
    kernel: str
    grid: tuple[int, int]
    threads: int
    shared: int
    arguments: tuple[Argument, ...]

    def __str__(self) -> str:
        arrays = [a for a in self.arguments if isinstance(a, DeviceArray) and a.dtype.names is None]  # no tables
        return f"{self.kernel}({', '.join(f'{a.dtype}{list(a.shape)}' for a in arrays)})"


@runtime_checkable
class Queue(Protocol):
    """A stream of one GPU."""

    @property
    def handle(self) -> int: ...

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that a block may have."""
        ...

    @property
    def fault(self) -> DeviceArray:
        """An int32 that a kernel sets where its input was refused."""
        ...

    def empty(self, shape: Sequence[int], dtype: Any = np.float32) -> DeviceArray: ...

    def constant(self, array: np.ndarray) -> DeviceArray:
        """A small array on the GPU, uploaded once."""
        ...

    def upload(self, array: np.ndarray) -> DeviceArray: ...

    def launch(self, launch: Launch) -> None: ...

    def wait_for(self, stream: int) -> None:
        """What is queued here from now on waits for what is queued there until now."""
        ...

    def hold_back(self, stream: int) -> None:
        """What is queued there from now on waits for what is queued here until now."""
        ...


def int32s(kernel: str, **counts: int) -> tuple[np.int32, ...]:
    """Counts as a kernel takes them. ValueError for one that does not fit."""
    for name, count in counts.items():
        if count > LARGEST:
            raise ValueError(f"{kernel}: {name} is {count}, at most {LARGEST}")
    return tuple(np.int32(count) for count in counts.values())


def strips(size: Sequence[int], vector: int) -> int:
    """Blocks of warps that take a row of 32 vectors each."""
    height, width = size
    return blocks(height * -(-width // (WARP * vector)), THREADS // WARP)


def blocks(work: int, per_block: int, axis: int = 0) -> int:
    """How many blocks take `work`, as far as a grid reaches."""
    return max(1, min(-(-work // per_block), MAX_GRID[axis]))


def is_wide(vector: int, width: int, *arrays: DeviceArray) -> bool:
    """Whether rows of `width` can be read and written 16 bytes at a time."""
    return width % vector == 0 and all(a.pointer % 16 == 0 for a in arrays)
