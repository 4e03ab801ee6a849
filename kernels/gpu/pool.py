"""Memory pools. Unlike PyCUDA's pools, they need no current context when an array is deleted."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np


class Block:
    """Memory of a pool. When the block is deleted, in any thread and without a context, the pool gets its memory back.

    busy: a PyCUDA event; the memory must not be used again before it has happened. None: no need to wait.
    """

    __slots__ = ("_pool", "_size", "busy", "memory")

    def __init__(self, pool: Pool, memory: Any, size: int) -> None:
        self._pool, self.memory, self._size = pool, memory, size
        self.busy: Any = None

    def __del__(self) -> None:
        self._pool.give_back(self._size, self.memory, self.busy)


class Pool:
    """Memory for one stream's work, kept by size. Returned memory may still be read by work queued there before.

    make(size): allocates bytes, or raises `exhausted`; the pool then frees the unused memory of all `siblings` and
    tries again. `allocate` and `clear` need the context to be current.
    """

    def __init__(self, make: Callable[[int], Any], exhausted: type[Exception], siblings: weakref.WeakSet[Pool]) -> None:
        self._make, self._exhausted, self._siblings = make, exhausted, siblings
        self._free: dict[int, list[tuple[Any, Any]]] = {}
        self._returned: deque[tuple[int, Any, Any]] = deque()  # not yet sorted by size
        self._lock = threading.Lock()
        siblings.add(self)

    def allocate(self, size: int) -> Block:
        step = max(size.bit_length() - 4, 9)  # rounded up in steps of at most 1/8, so that similar sizes share memory
        size = -(-size >> step) << step
        memory = self._take(size)
        if memory is None:
            try:
                memory = self._make(size)
            except self._exhausted:
                gc.collect()
                memory = self._take(size)
        if memory is None:
            for pool in list(self._siblings):
                pool.clear()
            memory = self._make(size)
        return Block(self, memory, size)

    def _take(self, size: int) -> Any:
        with self._lock:
            self._sort()
            free = self._free.get(size, [])
            for i, (memory, busy) in enumerate(free):
                if busy is None or busy.query():
                    del free[i]
                    return memory
        return None

    def give_back(self, size: int, memory: Any, busy: Any) -> None:  # no lock: __del__ may run inside one
        self._returned.append((size, memory, busy))

    def _sort(self) -> None:
        for _ in range(len(self._returned)):
            size, memory, busy = self._returned.popleft()
            self._free.setdefault(size, []).append((memory, busy))

    def clear(self) -> None:
        """Frees all unused memory. The context must be current."""
        with self._lock:
            self._sort()
            self._free.clear()


class HostMemory:
    """Pinned memory that NumPy wraps as an array; the array keeps its block alive."""

    def __init__(self, pointer: int, shape: tuple[int, ...], dtype: np.dtype, block: Block) -> None:
        self.block = block
        self.__array_interface__ = {"shape": shape, "typestr": dtype.str, "data": (pointer, False), "version": 3}
