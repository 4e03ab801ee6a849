"""Runs side by side, where a backend makes more of the machine so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Lanes:
    """count: how many runs side by side; their threads start when they are first needed."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """What work gives for each item, in their order."""
        if self.count < 2 or len(items) < 2:
            return [work(item) for item in items]
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.count, thread_name_prefix="camrt-lane")
        return list(self._threads.map(work, items))
