"""The backend: engines from the user's cache, built where they are missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....kernels import OutOfMemory
from ...bundle.manifest import Program
from ...bundle.reading import Bundle
from ...errors import BackendUnavailable, EngineError
from ..gpu import Gpu, GpuProgram, open_gpu
from .bindings import Library, compute_capability_member, find_library, first_line_of, installed, logger
from .cache import EngineCache
from .engine import Scratch, TensorRtEngine
from .target import Target

if TYPE_CHECKING:
    from .. import Settings


class TensorRtBackend:
    """Engines from the user's cache, built where they are missing."""

    name = "tensorrt"
    lanes = 1
    prunes = False

    def __init__(self, library: Library, gpu: Gpu, target: Target, settings: Settings) -> None:
        self.tensorrt = library
        self.gpu = gpu
        self.target = target
        self.max_batch, self.mask_batch = settings.max_batch, settings.mask_batch
        self.scratch = Scratch(gpu.stream)
        self.progress = settings.progress
        self.cache = EngineCache()
        self.log = logger(library.trt)

    def __str__(self) -> str:
        return f"{self.tensorrt.name} {self.tensorrt.version} on {self.gpu.stream.device}"

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> GpuProgram:
        return GpuProgram(program, TensorRtEngine(self, bundle, program), self.gpu)

    def problem(self) -> str:
        """The library's last error."""
        return first_line_of(self.log.failed[-1]) if self.log.failed else "no reason given"

    def out_of_memory(self) -> bool:
        """Whether the library's last error says that memory ran out."""
        return "out of memory" in self.problem().lower() or "outofmemory" in self.problem().lower()

    def failure(self, text: str) -> EngineError | OutOfMemory:
        """The error to raise: `text`, then the library's last error."""
        return (OutOfMemory if self.out_of_memory() else EngineError)(f"{text}: {self.problem()}")


def create(settings: Settings) -> TensorRtBackend:
    """BackendUnavailable without TensorRT, without a GPU, or with one that the library does not know."""
    if not installed():
        find_library()  # raises: says what to install
    gpu = open_gpu(settings.device, captures=True)  # first: without a GPU, the library would hold 115 MB for nothing
    library = find_library()
    card = gpu.stream.device
    if library.ahead_of_time:
        try:
            compute_capability_member(library, card.compute_capability)
        except EngineError as error:
            raise BackendUnavailable(f"{card}: {error}") from None
    return TensorRtBackend(library, gpu, Target.of(library, card), settings)
