"""The TensorRT library: which of the two is installed, the GPUs that it builds for, its log."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from .... import install
from ...errors import BackendUnavailable, EngineError, first_line

# library -> alternatives; each imports its modules in order: the last is the library, those before load its binaries
_MODULES = {
    "tensorrt": [("tensorrt",)],
    "tensorrt_rtx": [("tensorrt_rtx",), ("onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_bindings")],
}
_OLDEST = (10, 1)  # the oldest TensorRT with the Python API that is used here
Capability = tuple[int, int]


@dataclass(frozen=True)
class Library:
    """name: tensorrt or tensorrt_rtx; trt: its module."""

    name: str
    trt: Any

    @property
    def version(self) -> str:
        return self.trt.__version__

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds engines for GPUs that are not in this machine."""
        return self.name == "tensorrt_rtx"

    @property
    def capabilities(self) -> list[Capability]:
        """Compute capabilities that one can name to it for a build; none for `tensorrt`."""
        members = self.trt.ComputeCapability.__members__ if self.ahead_of_time else ()
        return [(int(m[2:-1]), int(m[-1])) for m in members if m.startswith("SM")]


def installed() -> bool:
    """Whether a TensorRT library seems to be installed; it is not imported."""
    return any(importlib.util.find_spec(modules[0]) for rows in _MODULES.values() for modules in rows)


def find_library(name: str | None = None) -> Library:
    """TensorRT if it is installed, else TensorRT for RTX; with `name`, only that one. BackendUnavailable if missing."""
    problems = []
    for candidate in _MODULES if name is None else [name]:
        for modules in _MODULES[candidate]:
            try:
                library = Library(candidate, [importlib.import_module(m) for m in modules][-1])
            except (ImportError, OSError) as error:
                problems.append(first_line(error))
                continue
            if candidate == "tensorrt_rtx" or tuple(map(int, library.version.split(".")[:2])) >= _OLDEST:
                return library
            problems.append(f"tensorrt {library.version} is older than {_OLDEST[0]}.{_OLDEST[1]}")
    raise BackendUnavailable(f"TensorRT cannot be used ({'; '.join(problems)}): {_advice()}")


def _advice() -> str:
    """TensorRT for RTX is made for GeForce and RTX cards, `tensorrt` for datacentre GPUs; a Jetson has its own."""
    rtx, datacentre = install.extra("tensorrt-rtx"), install.extra("tensorrt")
    return f"{rtx} for GeForce and RTX GPUs, {datacentre} for datacentre GPUs; on a Jetson take JetPack's tensorrt"


def compute_capability_member(library: Library, capability: Capability) -> Any:
    if capability not in library.capabilities:
        capabilities = ", ".join(f"{a}.{b}" for a, b in library.capabilities)
        raise EngineError(
            f"{library.name} {library.version} has no compute capability {capability[0]}.{capability[1]}, only "
            f"{capabilities}: on such a GPU use NVIDIA's tensorrt, or backend='onnxruntime-cuda'"
        )
    return getattr(library.trt.ComputeCapability, "SM{}{}".format(*capability))


_SCRATCH = re.compile(r"Total Activation Memory: (\d+) bytes")
KEPT = 20  # messages: an explainer may live for weeks


def logger(trt: Any) -> Any:
    """A logger that keeps the last warnings and errors, and, of a build, the scratch memory of each profile in bytes.

    clear() forgets the messages, so that none explains a later failure.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.warned: deque[str] = deque(maxlen=KEPT)
            self.failed: deque[str] = deque(maxlen=KEPT)
            self.scratch: deque[int] = deque(maxlen=KEPT)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.failed.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warned.append(message)
            elif said := _SCRATCH.match(message):
                self.scratch.append(int(said[1]))

        def clear(self) -> None:
            self.warned.clear()
            self.failed.clear()

        def problem(self) -> str:
            return first_line_of(self.failed[0]) if self.failed else ""

    return Log()


def first_line_of(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0]
