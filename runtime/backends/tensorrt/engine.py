"""A program's engines on a GPU: loaded or built when they are first needed, and run in stream order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....kernels import DeviceArray, OutOfMemory
from ...bundle.manifest import Program
from ...bundle.reading import Bundle
from ...errors import EngineError
from .build import build_engine
from .target import Shapes, engine_key

if TYPE_CHECKING:
    from .backend import TensorRtBackend

_ALIGNMENT = 512  # bytes: tensors need 256, scratch memory needs the GPU's texture alignment


@dataclass
class _EngineState:
    """An engine in the GPU's memory. It is valid only while its runtime exists.

    context: the execution context of the next run; None before the first run, and after a captured graph has taken it.
    compiled: the kernels that TensorRT for RTX compiled, shared by all contexts.
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
        self._loaded: dict[Shapes, _EngineState] = {}

    def __del__(self) -> None:
        device = self._backend.gpu.stream.device
        if not device.closed:
            with device.active():  # engines free their memory in the current context
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
            scratch = stream.empty((size + _ALIGNMENT,), "uint8")  # may be used again once this work is queued
            context.set_device_memory(-(-scratch.pointer // _ALIGNMENT) * _ALIGNMENT, size)
            capturable = getattr(context, "is_stream_capturable", lambda _: True)  # only TensorRT for RTX has it
            if stream.capturing and not capturable(stream.handle):
                raise EngineError(f"{file}: the engine cannot be captured for these shapes")
            if not context.execute_async_v3(stream.handle):
                raise self._backend.failure(f"{file}: the engine could not be run")

    def _aligned(self, array: DeviceArray) -> DeviceArray:
        """The array, or an aligned copy: one image of a batch may start at any address."""
        if array.pointer % _ALIGNMENT == 0:
            return array
        stream = self._backend.gpu.stream
        copy = stream.empty(array.shape, array.dtype)
        stream.copy(array, copy)
        return copy

    def _engine(self, shapes: Shapes) -> _EngineState:
        if shapes not in self._loaded:
            self._refuse_in_capture()
            self._loaded[shapes] = self._load(shapes)
        return self._loaded[shapes]

    def _context(self, loaded: _EngineState) -> Any:
        """The execution context for the next run.

        A captured graph keeps its context: no later run may use it. A capture must not change a context's shapes, so
        it needs a run with the same shapes before it.
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

    def _load(self, shapes: Shapes) -> _EngineState:
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
            backend.cache.discard(key)  # another build of the same library version wrote it
            engine = runtime.deserialize_cuda_engine(backend.cache.fetch(key, build))
        if engine is None:
            card = backend.gpu.stream.device
            raise backend.failure(f"{file}: the engine does not load on {card}, update the driver")
        return _EngineState(runtime, engine)

    def _new_context(self, loaded: _EngineState) -> Any:
        """A context without scratch memory: each run gets it from the stream's pool. OutOfMemory."""
        trt, engine = self._backend.tensorrt.trt, loaded.engine
        how: Any = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._backend.tensorrt.ahead_of_time:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(how)
            # EAGER: compile kernels for these shapes now; else a graph would keep the slow general kernels for ever
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if loaded.compiled is None:
                loaded.compiled = config.create_runtime_cache()
            config.set_runtime_cache(loaded.compiled)
            how = config
        context = engine.create_execution_context(how)
        if context is None:
            raise OutOfMemory(f"{self._program.file}: no execution context: {self._backend.problem()}")
        return context
