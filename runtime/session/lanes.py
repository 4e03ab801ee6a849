"""Runs a program several times at once, on backends that are faster this way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Lanes:
    """Threads that run work at the same time. count: how many; they start on first use."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """[work(item) for item in items], several at the same time if count is above 1. Errors of `work`."""
        if self.count < 2 or len(items) < 2:
            return [work(item) for item in items]
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.count, thread_name_prefix="camrt-lane")
        return list(self._threads.map(work, items))
