"""Works through tasks on a Ray cluster, by Ray Data: actors hold one explainer each."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import install
from ..runtime.bundle.manifest import MANIFEST
from ..runtime.errors import CamrtError, first_line
from .tasks import Task
from .worker import Done, Job, Worker


def _ray() -> Any:
    """CamrtError without the ray extra."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    try:
        import ray
        import ray.data  # pyright: ignore[reportMissingImports]

        return ray
    except ImportError as error:
        raise CamrtError(install.repair("--address", "ray", "ray", error)) from None


def connect(address: str) -> Any:
    """Joins a cluster, or starts one on this machine ("local"). CamrtError."""
    ray = _ray()
    _check_reachable(address)
    try:
        kind = {} if address == "local" else {"address": address}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True, **kind)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise CamrtError(f"--address {address}: no Ray cluster there ({str(error).splitlines()[0]})") from None
    return ray


def _check_reachable(address: str) -> None:
    """CamrtError if nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():  # "local", "auto"
        return
    try:
        socket.create_connection((host.strip("[]") or "127.0.0.1", int(port)), timeout=10).close()
    except OSError as error:
        raise CamrtError(f"--address {address}: no Ray cluster there ({first_line(error)})") from None


def nodes(ray: Any) -> int:
    return sum(1 for node in ray.nodes() if node["Alive"])


def default_actors(ray: Any) -> int:
    """One for each GPU; without one, for each core but one in four, which is left for reading and writing."""
    resources = ray.cluster_resources()
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    return gpus or max(1, cores - max(1, cores // 4))


class TaskActor:
    """Runs tasks. The bundle travels with it, to nodes that do not have it."""

    def __init__(self, job: Job, files: Any) -> None:
        self._folder: str | None = None
        contents: dict[str, bytes] = _ray().get(files[0])
        here = Path(job.bundle) / MANIFEST
        if not (here.is_file() and here.read_bytes() == contents[MANIFEST]):
            self._folder = tempfile.mkdtemp(prefix="camrt-bundle-")
            for name, data in contents.items():
                (Path(self._folder) / name).write_bytes(data)
            job = replace(job, bundle=self._folder)
        self._worker = Worker(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = [self._worker.run(pickle.loads(task)) for task in batch["task"]]
        return {"done": [json.dumps(asdict(d)) for d in done]}

    def __del__(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def run_on_ray(ray: Any, job: Job, tasks: Sequence[Task], actors: int) -> Iterator[Done]:
    """Yields each task when its part is written. What a lost worker or node had begun runs again elsewhere."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    bundle = Path(job.bundle)
    files = ray.put({f.name: f.read_bytes() for f in bundle.iterdir() if f.is_file()})
    gpus = ray.cluster_resources().get("GPU", 0) > 0 and job.backend != "onnxruntime"
    rows = [{"task": pickle.dumps(task)} for task in tasks]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    mapped = dataset.map_batches(
        TaskActor,
        fn_constructor_args=(job, [files]),  # in a list, so that each actor fetches it itself
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    for row in mapped.iter_rows():
        yield Done(**json.loads(row["done"]))
