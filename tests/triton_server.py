"""Starts Triton Inference Server from the pytriton wheel of an environment of its own (make triton)."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    """log: what it printed."""

    http: str
    grpc: str
    log: Path


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def serving(environment: Path, repository: Path, folder: Path, seconds: float = 90) -> Iterator[Server]:
    """A server of the repository, until the block ends. environment: a venv with nvidia-pytriton and camrt."""
    site = next((environment / "lib").glob("python3.*")) / "site-packages"
    own = site / "pytriton" / "tritonserver"
    backend = folder / "backends" / "python"
    shutil.copytree(own / "backends" / "python", backend)
    version = site.parent.name.removeprefix("python")
    stub = shutil.copy(own / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
    Path(stub).chmod(0o755)
    http, grpc, metrics = free_ports(3)
    command = [
        str(own / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backend.parent}",
    ]
    command += ["--exit-on-error=false", "--strict-readiness=false"]
    for kind, port in (("http", http), ("grpc", grpc), ("metrics", metrics)):
        command += [f"--{kind}-address=127.0.0.1", f"--{kind}-port={port}"]
    libraries = f"{site / 'nvidia_pytriton.libs'}"
    paths = {"LD_LIBRARY_PATH": libraries, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **paths})
        try:
            _wait(f"http://127.0.0.1:{http}/v2/health/live", process, log, time.monotonic() + seconds)
            yield Server(f"http://127.0.0.1:{http}", f"grpc://127.0.0.1:{grpc}", log)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, until: float) -> None:
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.2)
    raise AssertionError(f"Triton did not start:\n{log.read_text()[-3000:]}")
