"""Memory that is used again. PyCUDA's pools want the context current whenever an array dies, and abort where it is
not.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np


class Block:
    """Memory of a pool, which gets it back when nobody holds the block any more: in any thread, without a context.

    busy: an event of PyCUDA's before which the memory may not be used again.
    """

    __slots__ = ("_pool", "_size", "busy", "memory")

    def __init__(self, pool: Pool, memory: Any, size: int) -> None:
        self._pool, self.memory, self._size = pool, memory, size
        self.busy: Any = None

    def __del__(self) -> None:
        self._pool.give_back(self._size, self.memory, self.busy)


class Pool:
    """Allocations by size, for one stream's work: what is given back may still be read by work queued there before.

    make(size): allocates or raises `exhausted`; then what the `siblings` hold is freed and it is asked again.
    Allocating and freeing need the context current.
    """

    def __init__(self, make: Callable[[int], Any], exhausted: type[Exception], siblings: weakref.WeakSet[Pool]) -> None:
        self._make, self._exhausted, self._siblings = make, exhausted, siblings
        self._free: dict[int, list[tuple[Any, Any]]] = {}
        self._returned: deque[tuple[int, Any, Any]] = deque()  # not yet sorted by size
        self._lock = threading.Lock()
        siblings.add(self)

    def allocate(self, size: int) -> Block:
        step = max(size.bit_length() - 4, 9)  # sizes in steps of a sixteenth, so that similar ones share memory
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

    def give_back(self, size: int, memory: Any, busy: Any) -> None:  # without the lock: it may interrupt its holder
        self._returned.append((size, memory, busy))

    def _sort(self) -> None:
        for _ in range(len(self._returned)):
            size, memory, busy = self._returned.popleft()
            self._free.setdefault(size, []).append((memory, busy))

    def clear(self) -> None:
        """Frees what nobody holds. Needs the context current."""
        with self._lock:
            self._sort()
            self._free.clear()


class HostMemory:
    """What NumPy wraps, and keeps, as an array's memory."""

    def __init__(self, pointer: int, shape: tuple[int, ...], dtype: np.dtype, block: Block) -> None:
        self.block = block
        self.__array_interface__ = {"shape": shape, "typestr": dtype.str, "data": (pointer, False), "version": 3}
