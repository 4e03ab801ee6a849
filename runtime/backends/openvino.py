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
from ..errors import BackendUnavailable, BundleError, InputError, first_line
from .ort import cores

if TYPE_CHECKING:
    from . import Settings


class OpenVinoExecutable:
    """A program, compiled up to twice on first use: with every size fixed, for single images, and for all other sizes.
    A concurrent program's runs take one thread each.
    """

    def __init__(self, backend: OpenVinoBackend, program: Program, path: Path, concurrent: bool) -> None:
        self._backend = backend
        self._program = program
        self._path = path
        self._concurrent = concurrent
        self._compiled: dict[bool, Any] = {}
        self._lock = threading.Lock()
        self._requests = threading.local()  # `opened`: of each thread, by the same key

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        request = self._request(all(len(array) == 1 for array in feeds.values()))
        try:
            results = request.infer({name: np.ascontiguousarray(a) for name, a in feeds.items()}, share_inputs=True)
            out = {name: results[name] for name in self._program.outputs}
        except Exception as error:
            shapes = ", ".join(f"{k} {v.shape}" for k, v in feeds.items())
            raise InputError(f"OpenVINO refused {shapes}: {first_line(error)}") from error
        self._program.check_outputs(feeds, out)
        return out

    def _request(self, single: bool) -> Any:
        requests: dict[bool, Any] = self._requests.__dict__.setdefault("opened", {})
        if single not in requests:
            with self._lock:
                if single not in self._compiled:
                    self._compiled[single] = self._backend.compiled(self._path, single, self._concurrent)
            requests[single] = self._compiled[single].create_infer_request()
        return requests[single]


class OpenVinoBackend:
    """OpenVINO's CPU plugin; `threads` per run, by default one per core. precision: "f32" or "bf16"."""

    name = "openvino"
    gpu = None
    prunes = False

    def __init__(self, runtime: Any, threads: int | None, precision: str = "f32") -> None:
        self._runtime = runtime
        self._core = runtime.Core()
        self._threads = threads
        self._precision = precision
        self.lanes = threads or cores()

    def __str__(self) -> str:
        version = self._runtime.__version__.partition("-")[0]
        return f"openvino {version} on the CPU, {self.lanes} threads"

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> OpenVinoExecutable:
        return OpenVinoExecutable(self, program, bundle.file(program), concurrent)

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
    """Where convolutions and products are in bfloat16. BackendUnavailable if OpenVINO is not installed, or if this CPU
    has no arithmetic of bfloat16.
    """
    backend = OpenVinoBackend(_openvino("precision 'bf16'"), threads, "bf16")
    if "BF16" not in backend._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise BackendUnavailable("precision 'bf16': this CPU has no arithmetic of bfloat16: use fp32")
    return backend


def _openvino(purpose: str) -> Any:
    try:
        import openvino  # pyright: ignore[reportMissingImports]

        return openvino
    except ImportError as error:
        raise BackendUnavailable(install.repair(purpose, "openvino", "openvino", error)) from None
