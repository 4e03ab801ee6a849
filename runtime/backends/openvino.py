"""OpenVINO, on the CPU: in float32; or with convolutions and products in bfloat16, where only scores are wanted."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import install
from ..bundle.manifest import Program
from ..bundle.reading import Bundle
from ..errors import BackendUnavailable, BundleError, first_line
from .cores import cores
from .cpu import CpuExecutable

if TYPE_CHECKING:
    from . import Settings


class OpenVinoExecutable(CpuExecutable):
    """Each thread has an inference request of its own."""

    engine = "OpenVINO"

    def __init__(self, backend: OpenVinoBackend, program: Program, path: Path, concurrent: bool) -> None:
        super().__init__(program, concurrent)
        self._backend = backend
        self._path = path
        self._requests = threading.local()  # `made`: this thread's, by the id of the compiled model

    def _load(self, single: bool) -> Any:
        return self._backend.compiled(self._path, single, self._concurrent)

    def _infer(self, loaded: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        requests: dict[int, Any] = self._requests.__dict__.setdefault("made", {})
        if id(loaded) not in requests:
            requests[id(loaded)] = loaded.create_infer_request()
        inputs = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        results = requests[id(loaded)].infer(inputs, share_inputs=True)
        return {name: results[name] for name in self._program.outputs}


class OpenVinoBackend:
    """OpenVINO's CPU plugin; `threads` per run, by default one per core. precision: "f32" or "bf16"."""

    name = "openvino"
    gpu = None
    prunes = False

    def __init__(self, runtime: Any, threads: int | None, precision: str = "f32") -> None:
        self._version = runtime.__version__.partition("-")[0]
        self._core = runtime.Core()
        self._precision = precision
        self.lanes = threads or cores()

    def __str__(self) -> str:
        return f"openvino {self._version} on the CPU, {self.lanes} threads"

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> OpenVinoExecutable:
        return OpenVinoExecutable(self, program, bundle.file(program), concurrent)

    def has_bfloat16(self) -> bool:
        """Whether this CPU has arithmetic of bfloat16."""
        return "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def compiled(self, path: Path, single: bool, concurrent: bool) -> Any:
        """An OpenVINO CompiledModel. single: every symbolic size is 1. BundleError if the file cannot be loaded."""
        settings = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": self.lanes if concurrent else 1,
            "INFERENCE_NUM_THREADS": self.lanes,
        }
        try:
            model = self._core.read_model(str(path))
            if single:
                sizes = {i.any_name: [1 if d.is_dynamic else d for d in i.partial_shape] for i in model.inputs}
                model.reshape(sizes)
            return self._core.compile_model(model, "CPU", settings)
        except Exception as error:
            raise BundleError(f"{path}: OpenVINO cannot load it: {first_line(error)}") from error


def create(settings: Settings) -> OpenVinoBackend:
    """BackendUnavailable if OpenVINO is not installed."""
    return OpenVinoBackend(_openvino("backend 'openvino'"), settings.threads)


def create_bfloat16(threads: int | None) -> OpenVinoBackend:
    """Computes convolutions and products in bfloat16. BackendUnavailable if OpenVINO is not installed, or if this CPU
    has no arithmetic of bfloat16.
    """
    backend = OpenVinoBackend(_openvino("precision 'bf16'"), threads, "bf16")
    if not backend.has_bfloat16():
        raise BackendUnavailable("precision 'bf16': this CPU has no arithmetic of bfloat16: use fp32")
    return backend


def _openvino(purpose: str) -> Any:
    try:
        import openvino  # pyright: ignore[reportMissingImports]

        return openvino
    except ImportError as error:
        raise BackendUnavailable(install.repair(purpose, "openvino", "openvino", error)) from None
