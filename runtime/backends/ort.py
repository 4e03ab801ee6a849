"""ONNX Runtime on the CPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendUnavailable, BundleError, InputError, first_line

_SYMBOLS = ("batch", "seeds")  # the symbolic sizes of programs


class OrtExecutable:
    """A program in up to two sessions: one for single images, whose sizes are then all known, and one for the rest.

    Knowing every size lets ONNX Runtime keep a backward pass in the blocked layout of its convolutions: a ResNet-50 with
    all of its layer maps runs a quarter faster. A session is made when it is first needed. A concurrent program has one
    session, whose runs take one thread each.
    """

    def __init__(self, backend: OrtBackend, path: Path, concurrent: bool):
        self._backend = backend
        self._path = path
        self._concurrent = concurrent
        self._sessions: dict[bool, Any] = {}
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = self._session(not self._concurrent and all(len(array) == 1 for array in feeds.values()))
        names = [o.name for o in session.get_outputs()]
        try:
            return dict(zip(names, session.run(names, dict(feeds)), strict=True))
        except Exception as error:
            shapes = ", ".join(f"{k} {v.shape}" for k, v in feeds.items())
            raise InputError(f"ONNX Runtime refused {shapes}: {first_line(error)}") from error

    def _session(self, single: bool) -> Any:
        with self._lock:
            if single not in self._sessions:
                self._sessions[single] = self._backend.session(self._path, single, self._concurrent)
            return self._sessions[single]


class OrtBackend:
    """Sessions on the CPU provider, one thread per core unless told."""

    name = "onnxruntime"

    def __init__(self, runtime: Any, threads: int | None):
        self._runtime = runtime
        self._threads = threads
        self.lanes = threads or _cores()

    def open(self, path: Path, concurrent: bool = False) -> OrtExecutable:
        return OrtExecutable(self, path, concurrent)

    def session(self, path: Path, single: bool, concurrent: bool = False) -> Any:
        """An inference session; `single` fixes the symbolic sizes to 1, `concurrent` gives a run one thread.

        BundleError if it cannot be loaded.
        """
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1 if concurrent else self._threads or 0
        if single:
            for symbol in _SYMBOLS:
                options.add_free_dimension_override_by_name(symbol, 1)
        try:
            return self._runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BundleError(f"{path}: ONNX Runtime cannot load it: {first_line(error)}") from error


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def create(threads: int | None = None) -> OrtBackend:
    """BackendUnavailable if onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise BackendUnavailable("onnxruntime is not installed: pip install 'camrt[cpu]'") from None
    return OrtBackend(onnxruntime, threads)
