"""Works through tasks: reading, the network and writing side by side."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.cams.sampled_error import LARGE_ERROR
from ..runtime.explainer import Explainer, load
from .places import Place
from .rows import Prepared, Wanted, as_table, explain_rows, prepare, schema
from .tasks import Task, read


@dataclass(frozen=True)
class Job:
    """What every worker needs. out: the folder of the parts. batch: images in one run; threads: of one run; readers:
    threads that read and decode, beside them.
    """

    bundle: str
    out: Place
    wanted: Wanted
    backend: str = "auto"
    precision: str | None = None
    batch: int = 16
    threads: int | None = None
    readers: int = 2
    device: int = 0

    def open(self) -> Explainer:
        return load(self.bundle, self.backend, self.batch, self.precision, self.threads, self.device)


@dataclass(frozen=True)
class Done:
    """A task whose part is written. problems: reason -> images. inexact: maps whose map_error is above LARGE_ERROR."""

    number: int
    images: int
    problems: dict[str, int]
    inexact: int = 0


def part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def done_before(part: Place, number: int) -> Done | None:
    """The task of a part that is there; None if it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with part.open(seeks=True) as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            table = parquet.read([n for n in ("error", "map_error") if n in parquet.schema_arrow.names])
    except (pyarrow.ArrowException, OSError):
        return None
    if "error" not in table.column_names:
        return None
    problems = Counter(_reason(problem) for problem in table["error"].drop_null().to_pylist())
    inexact = 0
    if "map_error" in table.column_names:
        inexact = int((table["map_error"].drop_null().to_numpy() > LARGE_ERROR).sum())
    return Done(number, len(table), dict(problems), inexact)


class Worker:
    """One explainer, and the tasks that it is given one after the other."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._explainer = job.open()
        self._schema = schema(self._explainer.manifest, job.wanted, self._explainer.precision)

    def run(self, task: Task) -> Done:
        """Explains a task's images and writes its part, all or nothing. OSError if it cannot be written."""
        import pyarrow.parquet

        problems, images, inexact = Counter(), 0, 0
        # a dictionary of the numbers of maps costs much time, and saves nothing
        form = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": ["path"]}
        with (
            self._job.out.child(part_name(task.number)).written() as file,
            pyarrow.parquet.ParquetWriter(file, self._schema, **form) as writer,
            ThreadPoolExecutor(1, "camrt-write") as beside,
        ):
            writing = None
            for batch in self._batches(task):
                told, columns = explain_rows(self._explainer, batch, self._job.wanted)
                table = as_table([i.path for i in batch], told, columns, self._schema)
                if writing is not None:
                    writing.result()
                writing = beside.submit(writer.write_table, table)
                problems.update(_reason(problem) for problem in told if problem)
                images += len(batch)
                inexact += int((columns.get("map_error", np.zeros(0)) > LARGE_ERROR).sum())
            if writing is not None:
                writing.result()
        return Done(task.number, images, dict(problems), inexact)

    def _batches(self, task: Task) -> Iterator[list[Prepared]]:
        """The images, read and decoded ahead of the network, which does not wait for them."""
        batch: list[Prepared] = []
        for image in self._prepared(task):
            batch.append(image)
            if len(batch) == self._job.batch:
                yield batch
                batch = []
        if batch:
            yield batch

    def _prepared(self, task: Task) -> Iterator[Prepared]:
        ahead: queue.Queue[Future[Prepared] | BaseException | None] = queue.Queue(4 * self._job.batch)
        stop = threading.Event()
        manifest, wanted = self._explainer.manifest, self._job.wanted

        def put(what: Future[Prepared] | BaseException | None) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    ahead.put(what, timeout=0.2)
                    break

        def one(path: str, fetch: Any) -> Prepared:
            return prepare(path, fetch(), manifest, wanted)

        with ThreadPoolExecutor(self._job.readers, "camrt-read") as pool:

            def feed() -> None:
                try:
                    for path, fetch in read(task):
                        put(pool.submit(one, path, fetch))
                        if stop.is_set():
                            return
                    put(None)
                except BaseException as error:
                    put(error)

            feeder = threading.Thread(target=feed, name="camrt-feed", daemon=True)
            feeder.start()
            try:
                while (found := ahead.get()) is not None:
                    if isinstance(found, BaseException):
                        raise found
                    yield found.result()
            finally:
                stop.set()
                feeder.join()


def _reason(problem: str) -> str:
    """Of a problem, without what is particular to the image."""
    plain = problem.partition(" (")[0]
    return "".join("N" if c.isdigit() else c for c in plain)[:100]
