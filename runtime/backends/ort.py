"""ONNX Runtime, on the CPU and on a GPU by its CUDA provider."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import install
from ...kernels import DeviceArray, OutOfMemory
from ..bundle.blocking import blocked
from ..bundle.kinds import KINDS, Kind
from ..bundle.manifest import Program
from ..bundle.pruning import pruned
from ..bundle.reading import Bundle
from ..errors import BackendUnavailable, BundleError, EngineError, first_line
from .cores import allowed, cores
from .cpu import CpuExecutable, give_back_freed, shapes_of
from .gpu import Gpu, GpuProgram, open_gpu

if TYPE_CHECKING:
    from . import Settings

_CUDA = "CUDAExecutionProvider"
_FATAL = 4  # the log level that prints nothing: errors come as exceptions
# an ONNX model with one Relu of one number: a session of it shows whether the CUDA provider works
_SMALLEST = (
    b'\x08\x08:3\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
_DISABLED = ["Pad_Fusion"]  # it breaks a graph that also returns the padded tensor (ONNX Runtime 1.31)
_FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"
_BLOCKS = platform.machine().lower() in ("x86_64", "amd64")  # elsewhere nothing was measured
# Four large images together take 3.8 (ResNet-18) to 4.4 times (MobileNet v2) as long as one, sixteen 21 times, and a
# second copy of the weights; of smaller ones, batches are faster. On more threads than these nothing was measured.
_ONE_BY_ONE = (Kind.LAYER_MAPS, Kind.SIGNED_MAPS, Kind.FULL_GRAD)
_LARGE_IMAGE, _FEW_THREADS = 200 * 200, 4
_SYMBOLS = ("batch", "seeds")  # the symbolic sizes of programs


class OrtExecutable(CpuExecutable):
    """With fixed sizes, ONNX Runtime keeps the backward pass in the blocked layout of its convolutions: ResNet-50's
    layer maps then run a quarter faster.
    """

    engine = "ONNX Runtime"

    def __init__(self, backend: OrtBackend, bundle: Bundle, program: Program, concurrent: bool) -> None:
        manifest = bundle.manifest
        large = math.prod(manifest.input_shape[1:]) >= _LARGE_IMAGE and backend.lanes <= _FEW_THREADS
        super().__init__(program, concurrent, one_by_one=large and program.kind in _ONE_BY_ONE)
        self._backend = backend
        self._path = bundle.file(program)
        self._maps_only = all(t.layout == "NCHW" for t in manifest.taps)  # its matrix products have one row per image
        whole = any(p.file == program.file and p.outputs == program.outputs for p in manifest.programs)
        self._outputs = None if whole else program.outputs
        self._spins = not KINDS[program.kind].runs_once

    def _load(self, single: bool) -> Any:
        packs = not (single and self._maps_only)  # a product of one row is as fast without
        return self._backend.session(
            self._path, single, self._concurrent, self._spins, outputs=self._outputs, packs=packs
        )

    def _infer(self, loaded: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [o.name for o in loaded.get_outputs()]
        return dict(zip(names, loaded.run(names, dict(feeds)), strict=True))


class OrtBackend:
    """Sessions of the CPU provider; `threads` per run, by default one per core."""

    name = "onnxruntime"
    gpu = None

    def __init__(self, runtime: Any, threads: int | None, keeps_memory: bool = True):
        self._runtime = runtime
        # ONNX Runtime 1.20 does not find the weights of a model that is given as bytes
        self.prunes = tuple(map(int, runtime.__version__.split(".")[:2])) >= (1, 21)
        self.lanes = threads or cores()
        # by itself (0) ONNX Runtime takes all cores of the machine, also those that this process may not use
        self._threads = 0 if not threads and self.lanes == os.cpu_count() else self.lanes
        self._places = _places(self._threads)
        self._keeps_memory = keeps_memory

    def __str__(self) -> str:
        return f"onnxruntime {self._runtime.__version__} on the CPU, {self.lanes} threads"

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> OrtExecutable:
        return OrtExecutable(self, bundle, program, concurrent)

    def session(
        self,
        path: Path,
        single: bool,
        concurrent: bool = False,
        spins: bool = True,
        outputs: Collection[str] | None = None,
        packs: bool = True,
    ) -> Any:
        """An ONNX Runtime InferenceSession.

        single: fixes the symbolic sizes to 1. concurrent: one thread per run. spins: threads wait busily for the next
        run, too. outputs: of the file, by default all.
        packs: copies the weights of matrix products into the order in which products of many rows read them.
        BundleError if the file cannot be loaded.
        """
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = self._keeps_memory
        options.enable_mem_pattern = False  # a planned block of memory, beside that of the first run, is not faster
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # else arenas keep them
        if not packs:
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.intra_op_num_threads = 1 if concurrent else self._threads
        if self._places and not concurrent:
            options.add_session_config_entry("session.intra_op_thread_affinities", self._places)
        if not spins:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if single:
            for symbol in _SYMBOLS:
                options.add_free_dimension_override_by_name(symbol, 1)
        try:
            model: Any = str(path)
            blocks = single and self.prunes and _BLOCKS
            if blocks or outputs is not None:
                model = path.read_bytes()
                model = blocked(model) if blocks else model
                model = pruned(model, outputs) if outputs is not None else model
                options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(path.parent))
            session = self._runtime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"], disabled_optimizers=_DISABLED
            )
        except Exception as error:
            raise BundleError(f"{path}: ONNX Runtime cannot load it: {first_line(error)}") from error
        give_back_freed()
        return session


def _places(threads: int) -> str:
    """The CPU of each thread but the caller's, in ONNX Runtime's notation, if they take all cores that the process may
    use: a virtual machine may otherwise wake a thread on the caller's core. Else "".
    """
    cpus = allowed()
    return ";".join(str(cpu + 1) for cpu in cpus[1:]) if threads == len(cpus) else ""


class OrtCudaEngine:
    """A session of the CUDA provider, bound to a GPU's arrays."""

    def __init__(self, runtime: Any, session: Any, file: str, gpu: Gpu, place: tuple[str, int]) -> None:
        """place: the arrays' device type and number, e.g. ("cuda", 0)."""
        self._session = session
        self._file = file
        self._gpu = gpu
        self._place = place
        self._options = runtime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the stream keeps order

    def enqueue(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        binding = self._session.io_binding()
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, a in arrays.items():
                bind(name, *self._place, a.dtype.type, a.shape, a.pointer)
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as error:
            message = first_line(error)
            if _out_of_memory(error):
                raise OutOfMemory(f"{self._file}: {message}") from error
            raise EngineError(f"{self._file}: ONNX Runtime refused {shapes_of(inputs)}: {message}") from error


class OrtCudaBackend:
    """Sessions of the CUDA provider, whose work is queued on the GPU's stream with that of our kernels."""

    name = "onnxruntime-cuda"
    lanes = 1
    prunes = False

    def __init__(self, runtime: Any, gpu: Gpu) -> None:
        self._runtime = runtime
        self.gpu = gpu

    def __str__(self) -> str:
        return f"onnxruntime {self._runtime.__version__}, {_CUDA}, on {self.gpu.stream.device}"

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> GpuProgram:
        """BundleError if the program cannot be loaded; OutOfMemory."""
        session = self.session(bundle.file(program))
        place = "cuda", self.gpu.stream.device.ordinal
        return GpuProgram(program, OrtCudaEngine(self._runtime, session, program.file, self.gpu, place), self.gpu)

    def session(self, model: Path | bytes) -> Any:
        """An InferenceSession; model: a file, or an ONNX model's bytes.

        BundleError, OutOfMemory as `open`; BackendUnavailable if ONNX Runtime falls back to the CPU.
        """
        what = str(model) if isinstance(model, Path) else "a program"
        options = self._runtime.SessionOptions()
        options.log_severity_level = _FATAL
        settings = {
            "device_id": str(self.gpu.stream.device.ordinal),
            "user_compute_stream": str(self.gpu.stream.handle),
            "use_tf32": "0",
            "cudnn_conv_algo_search": "HEURISTIC",  # as fast (ResNet-50, H200), without a search at every new shape
            "arena_extend_strategy": "kSameAsRequested",
        }
        path_or_bytes = str(model) if isinstance(model, Path) else model
        with self.gpu.lock, self.gpu.stream.device.active(what):
            try:
                # no fallback: it would run on the CPU, without an error, what failed on the GPU
                session = self._runtime.InferenceSession(
                    path_or_bytes,
                    options,
                    providers=[(_CUDA, settings)],
                    enable_fallback=False,
                    disabled_optimizers=_DISABLED,
                )
            except Exception as error:
                message = first_line(error)
                if _out_of_memory(error):
                    raise OutOfMemory(f"{what}: {message}") from error
                raise BundleError(f"{what}: ONNX Runtime cannot load it: {message}") from error
        if session.get_providers()[0] != _CUDA:  # ONNX Runtime drops it silently if its libraries are missing
            raise BackendUnavailable(f"ONNX Runtime did not take {_CUDA}: its CUDA or cuDNN libraries are missing")
        return session


def _out_of_memory(error: Exception) -> bool:
    said = str(error).lower()
    words = ("allocate memory", "out of memory", "alloc_failed", "allocation failed", "allocation_failed")
    return any(w in said for w in words)


def _onnxruntime(extra: str) -> Any:
    try:
        import onnxruntime

        return onnxruntime
    except ImportError as error:
        raise BackendUnavailable(install.repair("it", "onnxruntime", extra, error)) from None


def create(settings: Settings) -> OrtBackend:
    """BackendUnavailable if onnxruntime is not installed."""
    return OrtBackend(_onnxruntime("cpu"), settings.threads, settings.keeps_memory)


def create_cuda(settings: Settings) -> OrtCudaBackend:
    """BackendUnavailable if onnxruntime-gpu or its CUDA libraries are not installed, or there is no GPU."""
    runtime = _onnxruntime("cuda")
    if _CUDA not in runtime.get_available_providers():
        raise BackendUnavailable(
            f"onnxruntime {runtime.__version__} was built without CUDA: pip uninstall onnxruntime, then "
            f"{install.extra('cuda')}"
        )
    gpu = open_gpu(settings.device, captures=False)
    if hasattr(runtime, "preload_dlls"):
        runtime.preload_dlls()  # loads CUDA and cuDNN from NVIDIA's installed wheels
    # it would print an error for every convolution that cuDNN tries in vain before it takes another one
    runtime.set_default_logger_severity(_FATAL)
    backend = OrtCudaBackend(runtime, gpu)
    backend.session(_SMALLEST)
    return backend
