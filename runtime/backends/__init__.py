"""Engines that execute programs. A backend is one module here, found by its name and imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import BackendUnavailable, UnknownMethod

BACKENDS = {"onnxruntime": "ort"}


class Executable(Protocol):
    """A loaded program. `run` may be called from several threads."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...


class Backend(Protocol):
    """Opens program files.

    lanes: how many runs side by side make the best of the machine, when there are many to make; a program that is opened
    `concurrent` is run so.
    """

    name: str
    lanes: int

    def open(self, path: Path, concurrent: bool = False) -> Executable: ...


def create(name: str = "auto", threads: int | None = None) -> Backend:
    """The backend of that name; "auto" is the first that can be used here. BackendUnavailable, UnknownMethod."""
    if name == "auto":
        problems = []
        for candidate in BACKENDS:
            try:
                return create(candidate, threads)
            except BackendUnavailable as error:
                problems.append(str(error))
        raise BackendUnavailable("; ".join(problems))
    if name not in BACKENDS:
        raise UnknownMethod(f"no backend {name!r}: use 'auto', {', '.join(map(repr, BACKENDS))}")
    return importlib.import_module(f".{BACKENDS[name]}", __name__).create(threads)
