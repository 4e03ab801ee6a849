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

    event: a PyCUDA event that the memory keeps for good, None until it is first needed. busy: the memory must not be
    used again before the event has happened.
    """

    __slots__ = ("_pool", "_size", "busy", "event", "memory")

    def __init__(self, pool: Pool, memory: Any, size: int, event: Any) -> None:
        self._pool, self.memory, self._size, self.event = pool, memory, size, event
        self.busy = False

    def __del__(self) -> None:
        self._pool.give_back(self._size, self.memory, self.event, self.busy)


class Pool:
    """Memory for one stream's work, kept by size. Returned memory may still be read by work queued there before.

    make(size): allocates bytes, or raises `exhausted`; the pool then frees the unused memory of all `siblings` and
    tries again. `allocate` and `clear` need the context to be current.
    """

    def __init__(self, make: Callable[[int], Any], exhausted: type[Exception], siblings: weakref.WeakSet[Pool]) -> None:
        self._make, self._exhausted, self._siblings = make, exhausted, siblings
        self._free: dict[int, list[tuple[Any, Any, bool]]] = {}
        self._returned: deque[tuple[int, Any, Any, bool]] = deque()  # not yet sorted by size
        self._lock = threading.Lock()
        siblings.add(self)

    def allocate(self, size: int) -> Block:
        step = max(size.bit_length() - 4, 9)  # rounded up in steps of at most 1/8, so that similar sizes share memory
        size = -(-size >> step) << step
        block = self._take(size)
        if block is not None:
            return block
        try:
            return Block(self, self._make(size), size, None)
        except self._exhausted:
            gc.collect()
            block = self._take(size)
        if block is not None:
            return block
        for pool in list(self._siblings):
            pool.clear()
        return Block(self, self._make(size), size, None)

    def _take(self, size: int) -> Block | None:
        with self._lock:
            if self._returned:
                self._sort()
            free = self._free.get(size, [])
            for i, (memory, event, busy) in enumerate(free):
                if not busy or event.query():
                    del free[i]
                    return Block(self, memory, size, event)
        return None

    def give_back(self, size: int, memory: Any, event: Any, busy: bool) -> None:  # no lock: __del__ may run inside one
        self._returned.append((size, memory, event, busy))

    def _sort(self) -> None:
        for _ in range(len(self._returned)):
            size, memory, event, busy = self._returned.popleft()
            self._free.setdefault(size, []).append((memory, event, busy))

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
