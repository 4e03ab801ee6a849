"""Runs a program several times at once, on backends that are faster this way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Lanes:
    """Threads that run work at the same time, the caller's among them. count: how many; they start on first use."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """[work(item) for item in items], several at the same time if count is above 1. Errors of `work`."""
        helpers = min(self.count, len(items)) - 1
        if helpers < 1:
            return [work(item) for item in items]
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.count - 1, thread_name_prefix="camrt-lane")
        todo, found = iter(enumerate(items)), {}

        def in_lane() -> None:
            nonlocal todo
            while True:
                with self._lock:
                    number, item = next(todo, (None, None))
                if number is None:
                    return
                try:
                    found[number] = work(item)  # type: ignore[arg-type]
                except BaseException:
                    todo = iter(())  # the others end after the item that they are at
                    raise

        helping = [self._threads.submit(in_lane) for _ in range(helpers)]
        try:
            in_lane()
        finally:
            late = [future for future in helping if not future.cancel()]
            wait(late)
        for future in late:
            future.result()
        return [found[number] for number in range(len(items))]
