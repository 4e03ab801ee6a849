"""Engines that execute programs. A backend is found by its name and imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..bundle.manifest import Program
from ..bundle.reading import Bundle
from ..errors import BackendUnavailable, UnknownName
from .gpu import Gpu

BACKENDS = {  # the best first: module, function
    "tensorrt": ("tensorrt.backend", "create"),
    "onnxruntime-cuda": ("ort", "create_cuda"),
    "onnxruntime": ("ort", "create"),
}


@dataclass(frozen=True)
class Settings:
    """threads: of a run on the CPU, None for one per core; device: which GPU; max_batch: the most images in a run.

    progress: called with a line before work that takes seconds, such as building an engine.
    """

    threads: int | None = None
    device: int = 0
    max_batch: int = 16
    progress: Callable[[str], None] = lambda _: None


class Executable(Protocol):
    """A loaded program. `run` may be called from several threads.

    NumPy's arrays give NumPy's arrays; a GPU's arrays, with a backend that has a GPU, give arrays there, in stream
    order.
    """

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]: ...


class Backend(Protocol):
    """Opens programs.

    lanes: how many runs side by side make the best of the machine, when there are many to make; a program that is
    opened `concurrent` is run so. gpu: where its programs run, None on the CPU. str() says what it is, in words.
    """

    name: str
    lanes: int

    @property
    def gpu(self) -> Gpu | None: ...

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> Executable: ...


def create(name: str = "auto", settings: Settings | None = None) -> Backend:
    """The backend of that name; "auto" is the best that can be used here. BackendUnavailable, UnknownName."""
    settings = settings or Settings()
    if name == "auto":
        problems = []
        for candidate in BACKENDS:
            try:
                return create(candidate, settings)
            except BackendUnavailable as error:
                problems.append(f"{candidate}: {error}")
        raise BackendUnavailable("no backend can be used here; " + "; ".join(problems))
    if name not in BACKENDS:
        raise UnknownName(f"no backend {name!r}: use 'auto', {', '.join(map(repr, BACKENDS))}")
    module, function = BACKENDS[name]
    return getattr(importlib.import_module(f".{module}", __name__), function)(settings)


def survey(settings: Settings | None = None) -> list[tuple[str, Backend | BackendUnavailable]]:
    """Every backend, the best first, or why it cannot be used here."""
    found: list[tuple[str, Backend | BackendUnavailable]] = []
    for name in BACKENDS:
        try:
            found.append((name, create(name, settings)))
        except BackendUnavailable as error:
            found.append((name, error))
    return found
