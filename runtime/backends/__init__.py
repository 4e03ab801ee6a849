"""Engines that execute programs. A backend is found by its name and imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..bundle.manifest import Program
from ..bundle.reading import Bundle
from ..errors import BackendUnavailable, UnknownName
from .gpu import Gpu


class BackendRow(NamedTuple):
    """Where a backend is: function `create` of `module`. on_gpu: it needs a GPU; automatic: "auto" may choose it."""

    module: str
    create: str
    on_gpu: bool
    automatic: bool = True


BACKENDS = {  # the best first
    "tensorrt": BackendRow("tensorrt.backend", "create", True),
    "onnxruntime-cuda": BackendRow("ort", "create_cuda", True),
    "onnxruntime": BackendRow("ort", "create", False),
    "openvino": BackendRow("openvino", "create", False, automatic=False),
}


MASK_BATCH = 64  # masked images in one run on a GPU; halved while its memory does not suffice


def masks_on_gpu(max_batch: int, mask_batch: int | None) -> int:
    """The most masked images in one run on a GPU: what was asked for, else MASK_BATCH, or max_batch if that is more."""
    return max(max_batch, MASK_BATCH) if mask_batch is None else mask_batch


@dataclass(frozen=True)
class Settings:
    """threads: CPU threads of one run, None for one per core; device: the GPU's number; max_batch: the most images or
    targets in one run; mask_batch: the most masked images. keeps_memory: programs on a CPU keep the memory of a run for
    the next, which is faster.

    progress: called with one line of text before work that takes seconds, such as building an engine.
    """

    threads: int | None = None
    device: int = 0
    max_batch: int = 16
    progress: Callable[[str], None] = lambda _: None
    mask_batch: int = MASK_BATCH
    keeps_memory: bool = True


class Executable(Protocol):
    """A loaded program. `run` may be called from several threads.

    run: inputs by name, of the program's dtype, -> outputs by name, float32. NumPy arrays in give NumPy arrays out. On
    a backend with a GPU, GPU arrays in give GPU arrays out: they are ready in the order of the stream.
    """

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]: ...


class Backend(Protocol):
    """Opens programs.

    lanes: how many runs at the same time give the best throughput; a program that is opened with `concurrent` is run
    in lanes. gpu: the GPU that its programs run on, None on the CPU. prunes: a program that is opened with some of its
    file's outputs computes nothing else. str() describes the backend for users.
    """

    name: str
    lanes: int
    prunes: bool

    @property
    def gpu(self) -> Gpu | None: ...

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> Executable: ...


def create(name: str = "auto", settings: Settings | None = None) -> Backend:
    """Opens the backend `name`; "auto" opens the best one that works on this machine.

    BackendUnavailable if it cannot be used here; UnknownName if no backend has that name.
    """
    settings = settings or Settings()
    if name == "auto":
        problems = []
        for candidate in (name for name, row in BACKENDS.items() if row.automatic):
            try:
                return create(candidate, settings)
            except BackendUnavailable as error:
                problems.append(f"{candidate}: {error}")
        raise BackendUnavailable("no backend can be used here; " + "; ".join(problems))
    if name not in BACKENDS:
        raise UnknownName(f"no backend {name!r}: use 'auto', {', '.join(map(repr, BACKENDS))}")
    row = BACKENDS[name]
    return getattr(importlib.import_module(f".{row.module}", __name__), row.create)(settings)


def survey(settings: Settings | None = None) -> list[tuple[str, Backend | BackendUnavailable]]:
    """Every backend, the best first, or why it cannot be used here."""
    backends: list[tuple[str, Backend | BackendUnavailable]] = []
    for name in BACKENDS:
        try:
            backends.append((name, create(name, settings)))
        except BackendUnavailable as error:
            backends.append((name, error))
    return backends
