"""Works through tasks by processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

from ..runtime.errors import CamrtError
from .tasks import Task
from .worker import Done, Job, Worker

_LOSSES = 3  # of a worker, one after the other without a task that ends

_worker: Worker | None = None


def _open(job: Job, gpus: int, parent: int) -> None:
    """parent: the number of the process that started this one, which may be gone already."""
    global _worker
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    number = multiprocessing.current_process()._identity[-1] - 1  # 0, 1, ... of this parent's processes
    _worker = Worker(replace(job, device=number % gpus) if gpus else job)


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run(task: Task) -> Done:
    assert _worker is not None
    return _worker.run(task)


def run_processes(job: Job, tasks: Sequence[Task], workers: int, gpus: int = 0) -> Iterator[Done]:
    """Yields each task when its part is written. A worker that dies is replaced, and its task runs again.

    CamrtError if workers die and no task ends any more, or a worker cannot open its explainer.
    """
    if workers == 1:
        worker = Worker(job)
        yield from map(worker.run, tasks)
        return
    waiting, losses = {task.number: task for task in tasks}, 0
    while waiting:
        try:
            for done in _round(job, list(waiting.values()), workers, gpus):
                del waiting[done.number]
                losses = 0
                yield done
        except BrokenProcessPool:
            losses += 1
            if losses == _LOSSES:
                first = next(iter(waiting.values()))
                raise CamrtError(
                    f"workers died {_LOSSES} times without finishing a task, at or after "
                    f"{first.places[0][0].label}: is the memory used up? Try fewer workers or a smaller batch"
                ) from None


def _round(job: Job, tasks: Sequence[Task], workers: int, gpus: int) -> Iterator[Done]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _open, (job, gpus, os.getpid())) as pool:
        try:
            ahead, running = iter(tasks), set()
            for task in ahead:
                running.add(pool.submit(_run, task))
                if len(running) < 2 * workers:
                    continue
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
