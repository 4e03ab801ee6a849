"""A program's engine on a GPU: loaded or built when it is first needed, and run in stream order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ....kernels import DeviceArray, GpuStream, OutOfMemory
from ...bundle.manifest import Program
from ...bundle.reading import Bundle
from ...errors import EngineError
from .build import build_engine
from .target import chosen, engine_key, profiles_of

if TYPE_CHECKING:
    from .backend import TensorRtBackend

_ALIGNMENT = 512  # bytes: tensors need 256, scratch memory needs the GPU's texture alignment


class Scratch:
    """Scratch memory that all engines of a stream share, since they run one after another.

    A captured graph keeps the memory that it uses; a later, larger engine gets other memory.
    """

    def __init__(self, stream: GpuStream) -> None:
        self._stream = stream
        self._memory: DeviceArray | None = None
        self._size = -1

    def of(self, size: int) -> tuple[DeviceArray, int]:
        """At least `size` bytes: (their owner, the first address)."""
        if self._memory is None or size > self._size:
            self._memory, self._size = self._stream.empty((size + _ALIGNMENT,), "uint8"), size
        return self._memory, -(-self._memory.pointer // _ALIGNMENT) * _ALIGNMENT


@dataclass
class _Context:
    """An execution context of one profile. shapes: of its last run's inputs; scratch: the memory that it was given."""

    context: Any
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    scratch: Any = None


@dataclass
class _Loaded:
    """An engine in the GPU's memory. It is valid only while its runtime exists.

    contexts: profile -> the context of its next run, which a captured graph takes away. compiled: the kernels that
    TensorRT for RTX compiled, shared by all contexts, None for the other library; kept: the shapes whose kernels are in
    the cache.
    """

    key: dict[str, Any]
    runtime: Any
    engine: Any
    contexts: dict[int, _Context] = field(default_factory=dict)
    compiled: Any = None
    kept: set[tuple[Any, ...]] = field(default_factory=set)


class TensorRtEngine:
    """A program's engine, which has a profile for each kind of run; built or loaded when it is first needed."""

    def __init__(self, backend: TensorRtBackend, bundle: Bundle, program: Program) -> None:
        self._backend = backend
        self._bundle = bundle
        self._program = program
        self._profiles = profiles_of(bundle, program, backend.max_batch, backend.mask_batch)
        self._loaded: _Loaded | None = None

    def __del__(self) -> None:
        device = self._backend.gpu.stream.device
        if not device.closed:
            with device.active():  # engines free their memory in the current context
                self._loaded = None

    def enqueue(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        backend, stream, file = self._backend, self._backend.gpu.stream, self._program.file
        described = self._program.inputs.items()
        sizes = {d: inputs[n].shape[i] for n, shape in described for i, d in enumerate(shape) if isinstance(d, str)}
        with stream.device.active(file):
            backend.log.clear()
            loaded = self._load() if self._loaded is None else self._loaded
            profile = chosen(self._profiles, sizes)
            run = self._context(loaded, profile)
            shapes = {name: array.shape for name, array in inputs.items()}
            if run.shapes != shapes:
                self._set_shapes(loaded, run, shapes)
            if stream.capturing:  # the graph keeps the context: no later run may use it
                del loaded.contexts[profile]
                stream.hold((run.context, run.scratch, loaded))
            context = run.context
            for name, array in {**{n: self._aligned(a) for n, a in inputs.items()}, **outputs}.items():
                if tuple(context.get_tensor_shape(name)) != array.shape:
                    raise EngineError(
                        f"{file}: the engine's {name!r} is {context.get_tensor_shape(name)}, not {array.shape}"
                    )
                if not context.set_tensor_address(name, array.pointer):
                    raise EngineError(f"{file}: the engine does not take the memory of {name!r}: {backend.problem()}")
            capturable = getattr(context, "is_stream_capturable", lambda _: True)  # only TensorRT for RTX has it
            if stream.capturing and not capturable(stream.handle):
                raise EngineError(f"{file}: the engine cannot be captured for these shapes")
            if not context.execute_async_v3(stream.handle):
                raise backend.failure(f"{file}: the engine could not be run")
            if loaded.compiled is not None and tuple(shapes.values()) not in loaded.kept:
                self._keep_compiled(loaded)
                loaded.kept.add(tuple(shapes.values()))

    def _set_shapes(self, loaded: _Loaded, run: _Context, shapes: dict[str, tuple[int, ...]]) -> None:
        """Also gives the context its scratch memory. Never in a capture: it may compile kernels."""
        self._refuse_in_capture()
        backend, file = self._backend, self._program.file
        run.shapes = {}
        for name, shape in shapes.items():
            if not run.context.set_input_shape(name, shape):
                raise EngineError(f"{file}: the engine takes no input {name!r} of shape {shape}")
        size = run.context.update_device_memory_size_for_shapes()
        if size == 0 and loaded.engine.device_memory_size_v2 > 0:
            raise EngineError(f"{file}: the engine does not say what memory it needs: {backend.problem()}")
        run.scratch, address = backend.scratch.of(size)
        run.context.set_device_memory(address, size)
        run.shapes = shapes

    def _aligned(self, array: DeviceArray) -> DeviceArray:
        """The array, or an aligned copy: one image of a batch may start at any address."""
        if array.pointer % _ALIGNMENT == 0:
            return array
        stream = self._backend.gpu.stream
        copy = stream.empty(array.shape, array.dtype)
        stream.copy(array, copy)
        return copy

    def _context(self, loaded: _Loaded, profile: int) -> _Context:
        """The execution context for the next run with a profile, made if there is none."""
        if profile not in loaded.contexts:
            self._refuse_in_capture()
            loaded.contexts[profile] = _Context(self._new_context(loaded, profile))
        return loaded.contexts[profile]

    def _refuse_in_capture(self) -> None:
        if self._backend.gpu.stream.capturing:
            raise EngineError(f"{self._program.file}: run the same work once before it is captured")

    def _load(self) -> _Loaded:
        """EngineError where the engine cannot be built or loaded; OutOfMemory."""
        self._refuse_in_capture()
        backend = self._backend
        library, file = backend.tensorrt, self._bundle.file(self._program)
        key = engine_key(library, self._bundle, self._program, backend.target, self._profiles)

        def build() -> bytes:
            backend.progress(f"building an engine of {self._program.file}")
            return build_engine(library, file, self._program, backend.target, self._profiles).engine

        runtime = library.trt.Runtime(backend.log)
        engine = runtime.deserialize_cuda_engine(backend.cache.fetch(key, build))
        if engine is None:
            if backend.out_of_memory():
                raise backend.failure(f"{file}: the engine could not be loaded")
            backend.cache.discard(key)  # another build of the same library version wrote it
            engine = runtime.deserialize_cuda_engine(backend.cache.fetch(key, build))
        if engine is None:
            card = backend.gpu.stream.device
            raise backend.failure(f"{file}: the engine does not load on {card}, update the driver")
        self._loaded = _Loaded(key, runtime, engine)
        return self._loaded

    def _new_context(self, loaded: _Loaded, profile: int) -> Any:
        """A context without scratch memory: its runs get that from the backend. OutOfMemory."""
        backend, engine = self._backend, loaded.engine
        trt = backend.tensorrt.trt
        how: Any = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if backend.tensorrt.ahead_of_time:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(how)
            # EAGER: compile kernels for these shapes now; else a graph would keep the slow general kernels for ever
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if loaded.compiled is None:
                loaded.compiled = config.create_runtime_cache()
                kept = backend.cache.get(self._key_of_compiled(loaded))
                if kept is not None and not loaded.compiled.deserialize(kept):
                    backend.cache.discard(self._key_of_compiled(loaded))  # of another driver
            config.set_runtime_cache(loaded.compiled)
            how = config
        context = engine.create_execution_context(how)
        if context is None:
            raise OutOfMemory(f"{self._program.file}: no execution context: {backend.problem()}")
        handle = backend.gpu.stream.handle
        if profile > 0 and not context.set_optimization_profile_async(profile, handle):
            raise EngineError(f"{self._program.file}: the engine has no profile {profile}: {backend.problem()}")
        return context

    # ---- kernels that TensorRT for RTX compiled: kept beside the engine, so that the next process compiles none

    def _key_of_compiled(self, loaded: _Loaded) -> dict[str, Any]:
        return {**loaded.key, "compiled on": self._backend.gpu.stream.device.model}

    def _keep_compiled(self, loaded: _Loaded) -> None:
        serialized = loaded.compiled.serialize()
        if serialized is not None:
            self._backend.cache.put(self._key_of_compiled(loaded), bytes(serialized))
