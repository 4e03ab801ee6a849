"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import BackendUnavailable, BundleError, InputError


class OrtExecutable:
    """One inference session."""

    def __init__(self, session):
        self._session = session
        self._outputs = [o.name for o in session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))
        except Exception as error:
            shapes = ", ".join(f"{k} {v.shape}" for k, v in feeds.items())
            raise InputError(f"ONNX Runtime refused {shapes}: {str(error).splitlines()[0]}") from error


class OrtBackend:
    """Sessions on the CPU provider, one thread per core unless told."""

    name = "onnxruntime"

    def __init__(self, runtime, threads: int | None):
        self._runtime = runtime
        self._threads = threads

    def open(self, path: Path) -> OrtExecutable:
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads or 0
        try:
            session = self._runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BundleError(f"{path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}") from error
        return OrtExecutable(session)


def create(threads: int | None = None) -> OrtBackend:
    """BackendUnavailable if onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise BackendUnavailable("onnxruntime is not installed: pip install 'camrt[cpu]'") from None
    return OrtBackend(onnxruntime, threads)
