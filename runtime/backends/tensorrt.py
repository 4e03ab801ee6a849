"""TensorRT and TensorRT for RTX: programs become engines, which run on a GPU. One file: their Python APIs agree."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...kernels import DeviceArray, OutOfMemory
from ..bundle.manifest import Program
from ..bundle.onnx_symbols import rename_symbol
from ..bundle.reading import Bundle
from ..errors import BackendUnavailable, EngineError, first_line
from .engine_cache import EngineCache
from .gpu import Gpu, GpuProgram, open_gpu

if TYPE_CHECKING:
    from . import Settings

# a library's name -> modules to import, the last of which is the library; the ones before it load its libraries
_MODULES = {
    "tensorrt": [("tensorrt",)],
    "tensorrt_rtx": [("tensorrt_rtx",), ("onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_bindings")],
}
_ALIGNMENT = 512  # bytes, of what an engine is given: tensors want 256, scratch memory the GPU's alignment of textures
_OLDEST = (10, 1)  # TensorRT whose Python API is as here
_RECIPE = 2  # of engines: to be raised with every change of build_engine that changes what it builds
_INSTALL = "pip install 'camrt[tensorrt-rtx]', or on datacentre GPUs and Jetson NVIDIA's tensorrt"
Progress = Callable[[str], None]
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
        """Whether it builds engines for GPUs that are not here."""
        return self.name == "tensorrt_rtx"

    @property
    def capabilities(self) -> list[Capability]:
        """Compute capabilities that it can be told to build for."""
        members = self.trt.ComputeCapability.__members__ if self.ahead_of_time else ()
        return [(int(m[2:-1]), int(m[-1])) for m in members if m.startswith("SM")]


def find_library(name: str | None = None) -> Library:
    """TensorRT where it is installed, else TensorRT for RTX; or the named one. BackendUnavailable."""
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
    raise BackendUnavailable(f"TensorRT cannot be used ({'; '.join(problems)}): {_INSTALL}")


@dataclass(frozen=True)
class Target:
    """Whom engines are built for: a model of GPU, None for any of its compute capability."""

    capability: Capability
    gpu: str | None


SHAPES = ("single", "batch", "targets")  # one image; as many images as seeds; one image with several seeds


@dataclass(frozen=True)
class Shapes:
    """For which sizes an engine is: a kind of SHAPES, and where they vary the largest.

    An engine for each, because one that must allow image and seed to differ in size, or to be one, takes many times as long
    to build and is slower.
    """

    kind: str
    largest: int = 1

    @classmethod
    def of(cls, sizes: Mapping[str, int], max_batch: int) -> Shapes:
        """What a run needs; sizes: of the program's symbols."""
        if all(size == 1 for size in sizes.values()):
            return cls("single")
        return cls.of_kind("targets" if "seeds" in sizes and sizes.get("batch", 1) == 1 else "batch", max_batch)

    @classmethod
    def of_kind(cls, kind: str, max_batch: int) -> Shapes:
        """Largest sizes go in steps, so that an engine serves more than one setting."""
        largest = 1 if kind == "single" else 16
        while largest < max_batch and kind != "single":
            largest *= 2
        return cls(kind, largest)

    def of_input(self, shape: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest and the largest shape of an input."""

        def sized(batch: int, seeds: int) -> tuple[int, ...]:
            return tuple(batch if d == "batch" else seeds if d == "seeds" else d for d in shape)

        return sized(1, 1), sized(1 if self.kind == "targets" else self.largest, self.largest)


@dataclass
class Built:
    """An engine's bytes, and what the library warned of while it was built."""

    engine: bytes
    warnings: list[str] = field(default_factory=list)


def engine_key(library: Library, bundle: Bundle, program: Program, target: Target, shapes: Shapes) -> dict[str, Any]:
    """All that determines an engine."""
    return {
        "recipe": _RECIPE,
        "program": program.sha256,
        "weights": bundle.manifest.weights["sha256"],
        "model": bundle.manifest.name,
        "file": program.file,
        "precision": program.precision,
        "library": f"{library.name} {library.version}",
        "platform": f"{platform.system()} {platform.machine()}".lower(),
        "compute_capability": list(target.capability),
        "gpu": target.gpu,
        "shapes": shapes.kind,
        "largest": shapes.largest,
    }


def build_engine(
    library: Library,
    file: Path,
    program: Program,
    target: Target,
    shapes: Shapes,
    progress: Progress = lambda _: None,
) -> Built:
    """Builds a program's engine; TensorRT for RTX needs no GPU for it. progress is called with what is being done.

    float32 stays float32: TF32 is off. EngineError names the layer that it fails at.
    """
    trt = library.trt
    log = _log(trt)
    try:
        builder = trt.Builder(log)
    except (RuntimeError, TypeError) as error:
        raise EngineError(
            f"{library.name} {library.version} cannot build here: {log.problem() or first_line(error)}"
        ) from error
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # from TensorRT 11 on they all are
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    model = file.read_bytes()
    if shapes.kind == "batch":  # then the builder knows that they are equal
        model = rename_symbol(model, "seeds", "batch")
    if not parser.parse(model, str(file)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = [f"{e.node_operator() or 'node'} {e.node_name()!r}: {first_line_of(e.desc())}" for e in errors]
        raise EngineError(
            f"{file}: {library.name} {library.version} does not take it: {'; '.join(said) or log.problem()}"
        )
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # what allocates while it runs cannot be captured
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if library.ahead_of_time:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_member(library, target.capability), 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        least, most = shapes.of_input(program.inputs[tensor.name])
        if least[0] == most[0]:
            tensor.shape = least
        profile.set_shape(tensor.name, least, most, most)
    config.add_optimization_profile(profile)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if engine is None:
        raise EngineError(f"{file}: {library.name} {library.version} could not build it: {log.problem()}")
    return Built(bytes(engine), log.warned)


def first_line_of(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0]


def _member(library: Library, capability: Capability) -> Any:
    if capability not in library.capabilities:
        known = ", ".join(f"{a}.{b}" for a, b in library.capabilities)
        raise EngineError(
            f"{library.name} {library.version} has no compute capability {capability[0]}.{capability[1]}, only {known}: on such a "
            "GPU use NVIDIA's tensorrt, or backend='onnxruntime-cuda'"
        )
    return getattr(library.trt.ComputeCapability, "SM{}{}".format(*capability))


def _log(trt: Any) -> Any:
    """A logger that keeps warnings and errors."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.warned: list[str] = []
            self.failed: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.failed.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warned.append(message)

        def problem(self) -> str:
            return first_line_of(self.failed[0]) if self.failed else ""

    return Log()


def _monitor(trt: Any, progress: Progress) -> Any:
    """Passes the builder's phases on; an interruption ends the build at its next step."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self.steps: dict[str, int] = {}

        def _tell(self, text: str) -> None:
            try:
                progress(text)
            except KeyboardInterrupt:  # not through the library's own code
                self.interrupted = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(f"{phase_name} {step + 1}/{self.steps.get(phase_name, 0)}")
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


@dataclass
class _Loaded:
    """An engine in the GPU's memory; it dies with its runtime.

    context: what runs it next; None before the first run, and when a captured graph has taken it. compiled: the kernels that
    TensorRT for RTX compiled for any of its contexts.
    """

    runtime: Any
    engine: Any
    context: Any = None
    compiled: Any = None


class TensorRtEngine:
    """A program's engines, one for each kind of shapes, built or loaded when they are first needed."""

    def __init__(self, backend: TensorRtBackend, bundle: Bundle, program: Program) -> None:
        self._backend = backend
        self._bundle = bundle
        self._program = program
        self._loaded: dict[Shapes, _Loaded] = {}

    def __del__(self) -> None:
        device = self._backend.gpu.stream.device
        if not device.closed:
            with device.active():  # where the engines' memory is
                self._loaded.clear()

    def enqueue(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        stream, file = self._backend.gpu.stream, self._program.file
        described = self._program.inputs.items()
        sizes = {d: inputs[n].shape[i] for n, shape in described for i, d in enumerate(shape) if isinstance(d, str)}
        with stream.device.active(file):
            loaded = self._engine(Shapes.of(sizes, self._backend.max_batch))
            context = self._context(loaded)
            for name, array in inputs.items():
                if not context.set_input_shape(name, array.shape):
                    raise EngineError(f"{file}: the engine takes no input {name!r} of shape {array.shape}")
            for name, array in {**{n: self._aligned(a) for n, a in inputs.items()}, **outputs}.items():
                if tuple(context.get_tensor_shape(name)) != array.shape:
                    raise EngineError(
                        f"{file}: the engine's {name!r} is {context.get_tensor_shape(name)}, not {array.shape}"
                    )
                if not context.set_tensor_address(name, array.pointer):
                    raise EngineError(
                        f"{file}: the engine does not take the memory of {name!r}: {self._backend.problem()}"
                    )
            size = context.update_device_memory_size_for_shapes()
            if size == 0 and loaded.engine.device_memory_size_v2 > 0:
                raise EngineError(f"{file}: the engine does not say what memory it needs: {self._backend.problem()}")
            scratch = stream.empty((size + _ALIGNMENT,), "uint8")  # given back once this work is queued
            context.set_device_memory(-(-scratch.pointer // _ALIGNMENT) * _ALIGNMENT, size)
            capturable = getattr(context, "is_stream_capturable", lambda _: True)  # which TensorRT for RTX can say
            if stream.capturing and not capturable(stream.handle):
                raise EngineError(f"{file}: the engine cannot be captured for these shapes")
            if not context.execute_async_v3(stream.handle):
                raise self._backend.failure(f"{file}: the engine could not be run")

    def _aligned(self, array: DeviceArray) -> DeviceArray:
        """The array, or a copy: one image of a batch may lie anywhere."""
        if array.pointer % _ALIGNMENT == 0:
            return array
        stream = self._backend.gpu.stream
        copy = stream.empty(array.shape, array.dtype)
        stream.copy(array, copy)
        return copy

    def _engine(self, shapes: Shapes) -> _Loaded:
        if shapes not in self._loaded:
            self._refuse_in_capture()
            self._loaded[shapes] = self._load(shapes)
        return self._loaded[shapes]

    def _context(self, loaded: _Loaded) -> Any:
        """What runs the engine.

        A captured graph holds its context's state: nobody else may use that context from then on. The run before set the same
        shapes, which a capture must not do.
        """
        stream = self._backend.gpu.stream
        if loaded.context is None:
            self._refuse_in_capture()
            loaded.context = self._new_context(loaded)
        context = loaded.context
        if stream.capturing:
            loaded.context = None
            stream.hold((context, loaded))
        return context

    def _refuse_in_capture(self) -> None:
        if self._backend.gpu.stream.capturing:
            raise EngineError(f"{self._program.file}: run the same work once before it is captured")

    def _load(self, shapes: Shapes) -> _Loaded:
        """EngineError where the engine cannot be built or loaded; OutOfMemory."""
        backend = self._backend
        library, file = backend.tensorrt, self._bundle.file(self._program)
        key = engine_key(library, self._bundle, self._program, backend.target, shapes)

        def build() -> bytes:
            backend.progress(f"building an engine of {self._program.file} ({shapes.kind})")
            return build_engine(library, file, self._program, backend.target, shapes).engine

        runtime = library.trt.Runtime(backend.log)
        engine = runtime.deserialize_cuda_engine(backend.cache.fetch(key, build))
        if engine is None:
            if backend.out_of_memory():
                raise backend.failure(f"{file}: the engine could not be loaded")
            backend.cache.discard(key)  # from another build of the same version
            engine = runtime.deserialize_cuda_engine(backend.cache.fetch(key, build))
        if engine is None:
            card = backend.gpu.stream.device
            raise backend.failure(f"{file}: the engine does not load on {card}, update the driver")
        return _Loaded(runtime, engine)

    def _new_context(self, loaded: _Loaded) -> Any:
        """Its scratch memory is ours, so that it is given back between runs."""
        trt, engine = self._backend.tensorrt.trt, loaded.engine
        how: Any = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._backend.tensorrt.ahead_of_time:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(how)
            # a graph would replay for ever the slow kernels that stand in until those for its shapes are compiled
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if loaded.compiled is None:
                loaded.compiled = config.create_runtime_cache()
            config.set_runtime_cache(loaded.compiled)
            how = config
        context = engine.create_execution_context(how)
        if context is None:
            raise OutOfMemory(f"{self._program.file}: no execution context: {self._backend.problem()}")
        return context


class TensorRtBackend:
    """Engines from the user's cache, built where they are missing."""

    name = "tensorrt"
    lanes = 1

    def __init__(self, library: Library, gpu: Gpu, target: Target, settings: Settings) -> None:
        self.tensorrt = library
        self.gpu = gpu
        self.target = target
        self.max_batch = settings.max_batch
        self.progress = settings.progress
        self.cache = EngineCache()
        self.log = _log(library.trt)

    def __str__(self) -> str:
        return f"{self.tensorrt.name} {self.tensorrt.version} on {self.gpu.stream.device}"

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> GpuProgram:
        return GpuProgram(program, TensorRtEngine(self, bundle, program), self.gpu)

    def problem(self) -> str:
        """The library's last error."""
        return first_line_of(self.log.failed[-1]) if self.log.failed else "no reason given"

    def out_of_memory(self) -> bool:
        """Whether that was why."""
        return "out of memory" in self.problem().lower() or "outofmemory" in self.problem().lower()

    def failure(self, text: str) -> EngineError | OutOfMemory:
        return (OutOfMemory if self.out_of_memory() else EngineError)(f"{text}: {self.problem()}")


def create(settings: Settings) -> TensorRtBackend:
    """BackendUnavailable without TensorRT, without a GPU, or with one that the library does not know."""
    library = find_library()
    gpu = open_gpu(settings.device, captures=True)
    card = gpu.stream.device
    if library.ahead_of_time:
        try:
            _member(library, card.compute_capability)
        except EngineError as error:
            raise BackendUnavailable(f"{card}: {error}") from None
    target = Target(card.compute_capability, None if library.ahead_of_time else card.model)
    return TensorRtBackend(library, gpu, target, settings)
