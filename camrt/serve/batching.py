"""Collects what several requests ask for into one run of the network."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Generic, TypeVar

from .errors import Refused
from .settings import Settings

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass(eq=False)
class _Waiting(Generic[Asked]):
    key: Hashable
    asked: Asked
    answer: asyncio.Future[Any]
    since: float = field(default_factory=perf_counter)


class Batcher(Generic[Asked, Answer]):
    """Runs one batch after another, in a thread of its own, so that the network has all cores to itself.

    run: what was asked, all with the same key -> as many answers; an answer that is an exception is raised where it was
    asked. observe: ("queue", seconds), ("network", seconds) or ("batch", size). Items of one key are taken in their
    order, and the oldest of all decides the key, so that none waits for ever.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Asked]], Sequence[Answer | Exception]],
        settings: Settings,
        observe: Callable[[str, float], None],
    ) -> None:
        self._run, self._settings, self._observe = run, settings, observe
        self._waiting: deque[_Waiting[Asked]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="camrt-network")
        self._task = asyncio.create_task(self._work())

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def ask(self, items: Sequence[tuple[Hashable, Asked]]) -> list[Answer]:
        """The answers of all items. Refused (429) if they do not fit into the queue: then none of them runs."""
        if len(self._waiting) + len(items) > self._settings.queue:
            raise Refused(429, f"{len(self._waiting)} images wait already: ask again later", retry=1)
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(key, asked, loop.create_future()) for key, asked in items]
        self._waiting.extend(waiting)
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(w.answer for w in waiting)))
        finally:
            for w in waiting:
                w.answer.cancel()  # of a request that timed out: what has not run yet does not run

    async def close(self) -> None:
        """Returns when everything that was accepted has its answer."""
        while self._waiting:
            await asyncio.sleep(0.01)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._thread.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._filled()
            batch = self._taken()
            if not batch:
                continue
            began = perf_counter()
            for w in batch:
                self._observe("queue", began - w.since)
            self._observe("batch", len(batch))
            try:
                answers = await asyncio.shield(loop.run_in_executor(self._thread, self._run, [w.asked for w in batch]))
            except Exception as error:
                answers = [error] * len(batch)
            self._observe("network", perf_counter() - began)
            for w, answer in zip(batch, answers, strict=True):
                if w.answer.done():
                    continue
                if isinstance(answer, Exception):
                    w.answer.set_exception(answer)
                else:
                    w.answer.set_result(answer)

    async def _filled(self) -> None:
        """Returns when a batch is full, or its oldest item has waited long enough."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        oldest = self._waiting[0]
        while sum(w.key == oldest.key for w in self._waiting) < self._settings.batch:
            left = oldest.since + self._settings.wait - perf_counter()
            if left <= 0:
                return
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _taken(self) -> list[_Waiting[Asked]]:
        """Up to a batch of items with the oldest one's key, taken out of the queue."""
        self._waiting = deque(w for w in self._waiting if not w.answer.done())
        if not self._waiting:
            return []
        key, batch, rest = self._waiting[0].key, [], deque()
        for w in self._waiting:
            (batch if w.key == key and len(batch) < self._settings.batch else rest).append(w)
        self._waiting = rest
        return batch
