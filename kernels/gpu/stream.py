"""A queue of work on a GPU, its memory, and CUDA graphs of captured work."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DeviceError
from . import driver
from .arrays import CUDA, DeviceArray
from .pool import Block, HostMemory, Pool
from .protocol import GpuStream
from .queue import FAULTS, Launch

if TYPE_CHECKING:
    from .device import Device


_ALIGNMENT = 256  # bytes, of the parts of a download


class _Wanted:
    """What an allocation is for, as an error says it."""

    __slots__ = ("_dtype", "_shape", "_what")

    def __init__(self, what: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._what, self._shape, self._dtype = what, shape, dtype

    def __str__(self) -> str:
        size = math.prod(self._shape) * self._dtype.itemsize
        return f"{self._what} {self._dtype}{list(self._shape)} of {size} bytes"


def _block_of(array: np.ndarray) -> Block | None:
    """The block of a pinned array, or of a part of one; None if its memory is pageable."""
    memory: Any = array
    while isinstance(memory, np.ndarray):
        memory = memory.base
    return memory.block if isinstance(memory, HostMemory) else None


class Stream(GpuStream):
    """A queue of work on a GPU, with the memory that it uses. Made by `Device.stream`.

    The memory of a deleted array returns to the stream's pool, and only later work of this stream gets it. So if
    another stream reads an array, keep the array until that is done. Only one thread at a time may use a stream.
    """

    def __init__(self, device: Device, stream: Any) -> None:
        """stream: a PyCUDA stream, None for the legacy default stream.

        handle: e.g. for TensorRT, ONNX Runtime or torch.cuda.ExternalStream; 0 for the default stream.
        """
        self._device = device
        self._stream = stream
        self.handle = 0 if stream is None else stream.handle
        self.shared_limit = device.shared_limit
        self._place = CUDA, device.ordinal
        self._constants: dict[tuple[str, tuple[int, ...], bytes], DeviceArray] = {}
        self._graph: Graph | None = None  # the graph that is being captured
        with device.active() as cuda:
            self._pool = Pool(cuda.mem_alloc, cuda.MemoryError, device.pools)
            self._pinned = Pool(lambda size: cuda.pagelocked_empty(size, np.uint8), cuda.MemoryError, device.pools)
            self._flag = cuda.pagelocked_empty(1, np.int32, mem_flags=cuda.host_alloc_flags.DEVICEMAP)
            self._flag[:] = 0
            pointer = int(self._flag.base.get_device_pointer())
            self._order = driver.StreamOrder()
        self.fault = DeviceArray(pointer, (1,), np.dtype(np.int32), owner=self._flag)

    def __del__(self) -> None:
        if hasattr(self, "fault") and not self.device.closed:
            with self.device.active():  # PyCUDA frees memory only in its context
                self._order.destroy()
                self._constants.clear()
                self._pool.clear()
                self._pinned.clear()
                del self.fault, self._flag, self._stream

    @property
    def device(self) -> Device:
        return self._device

    # ---- memory

    def empty(self, shape: Sequence[int], dtype: Any = np.float32) -> DeviceArray:
        """An uninitialised array on the GPU. OutOfMemory if the GPU's memory runs out."""
        shape, dtype = tuple(map(int, shape)), np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        block, pointer = None, 0
        if size:
            with self.device.active(_Wanted("an array", shape, dtype)):
                block = self._pool.allocate(size)
            pointer = int(block.memory)
        self.hold(block)
        return DeviceArray(pointer, shape, dtype, self.handle, self._place, (block, self), self.hold_back)

    def pinned(self, shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        """An uninitialised array in pinned host memory, which is copied to the GPU faster.

        Do not write to it while a copy from it is queued. OutOfMemory.
        """
        shape, dtype = tuple(map(int, shape)), np.dtype(dtype)
        with self.device.active(_Wanted("a pinned array", shape, dtype)):
            block = self._pinned.allocate(max(1, math.prod(shape) * dtype.itemsize))
        return np.asarray(HostMemory(block.memory.ctypes.data, shape, dtype, block))

    def upload(self, array: np.ndarray, out: DeviceArray | None = None) -> DeviceArray:
        """Queues a copy to the GPU, into `out` or a new array. The array may be changed as soon as this returns.

        An array of `pinned` is read later, when the copy runs. ValueError if it does not fit into `out`; OutOfMemory.
        """
        array = np.asarray(array, order="C")
        out = self.empty(array.shape, array.dtype) if out is None else out
        if out.shape != array.shape or out.dtype != array.dtype:
            raise ValueError(f"upload: {array.dtype}{list(array.shape)} does not fit into {out.dtype}{list(out.shape)}")
        if not array.size:
            return out
        with self.device.active("upload") as cuda:
            block = _block_of(array)
            if block is None:  # the driver may read pageable memory whenever it likes
                block = self._pinned.allocate(array.nbytes)
                staged = block.memory[: array.nbytes]
                staged[:] = array.reshape(-1).view(np.uint8)
                array = staged
            cuda.memcpy_htod_async(out.pointer, array, self._stream)
            if self._graph is not None:
                self.hold((array, block, out))
            else:
                self._keep_until_now(block)
        return out

    def _keep_until_now(self, block: Block) -> None:
        """The block's memory is used again only after what is queued now."""
        if block.event is None:
            block.event = self.device.cuda.Event(driver.NO_TIMING)
        block.event.record(self._stream)
        block.busy = True

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Queues a copy on the GPU."""
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError(f"copy: {source.dtype}{list(source.shape)} into {target.dtype}{list(target.shape)}")
        if not source.nbytes:
            return
        with self.device.active("copy") as cuda:
            cuda.memcpy_dtod_async(target.pointer, source.pointer, source.nbytes, self._stream)
        self.hold((source, target))

    def download(self, array: DeviceArray) -> np.ndarray:
        """Copies an array to the host; waits for the copy and all work queued before. Errors as `synchronize`."""
        return self.download_all([array])[0]

    def download_all(self, arrays: Iterable[DeviceArray]) -> list[np.ndarray]:
        """As `download`, of several arrays, with one wait."""
        arrays = list(arrays)
        starts = [0]
        for array in arrays:
            starts.append(starts[-1] + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT)
        with self.device.active("download") as cuda:
            block = self._pinned.allocate(max(1, starts[-1]))
            staged = block.memory
            for array, start in zip(arrays, starts, strict=False):
                if array.stream is not None and array.stream != self.handle:
                    self.wait_for(array.stream)
                if size := array.nbytes:
                    cuda.memcpy_dtoh_async(staged[start : start + size], array.pointer, self._stream)
            self.synchronize()
        # pinned memory is scarce: the caller gets copies
        return [
            staged[start : start + array.nbytes].view(array.dtype).reshape(array.shape).copy()
            for array, start in zip(arrays, starts, strict=False)
        ]

    def constant(self, array: np.ndarray) -> DeviceArray:
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._constants:
            if self._graph is not None:
                raise DeviceError("capture: run the same work once before it is captured")
            self._constants[key] = self.upload(array)
        return self._constants[key]

    @property
    def capturing(self) -> bool:
        return self._graph is not None

    def hold(self, value: Any) -> None:
        """Keeps `value` alive as long as the graph that is being captured; does nothing outside a capture."""
        if self._graph is not None:
            self._graph.held.append(value)

    # ---- work

    def launch(self, launch: Launch) -> None:
        """Queues a kernel. DeviceError names the kernel and its arrays."""
        arguments = launch.arguments
        with self.device.active(launch):
            self.device.function(launch).prepared_async_call(
                (*launch.grid, 1),
                (launch.threads, 1, 1),
                self._stream,
                *[a.pointer if isinstance(a, DeviceArray) else a for a in arguments],
                shared_size=launch.shared,
            )
        self.hold(arguments)

    def wait_for(self, stream: int) -> None:
        if self._graph is not None:
            self._graph.others.add(stream)
            return
        with self.device.active():
            self._order(stream, self.handle)

    def hold_back(self, stream: int) -> None:
        if self._graph is not None:
            self._graph.others.add(stream)
            return
        with self.device.active():
            self._order(self.handle, stream)

    def event(self) -> Event:
        """The current end of the queue, with a time stamp."""
        with self.device.active("event") as cuda:
            return Event(self.device, cuda.Event().record(self._stream))

    def synchronize(self) -> None:
        """Waits for all queued work.

        ValueError if winsorize found NaN, or check_finite found NaN or infinity; DeviceError if a kernel failed.
        """
        with self.device.active("the kernels queued before"):
            if self._stream is None:
                driver.synchronize(0)
            else:
                self._stream.synchronize()
        if self._flag[0]:
            problem = FAULTS[int(self._flag[0])]
            self._flag[0] = 0
            raise ValueError(problem)

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Records the work queued inside as a CUDA graph, without running it. DeviceError on the default stream.

        The same work must have run once before: that run loads the kernels and uploads the constants.
        """
        if self._stream is None:
            raise DeviceError("capture: the default stream cannot be captured, use Device.stream()")
        if self._graph is not None:
            raise DeviceError("capture: this stream is being captured already")
        self._graph = graph = Graph(self)
        try:
            with self.device.active("capture"):
                driver.begin_capture(self.handle)
                try:
                    yield graph
                except BaseException:
                    driver.abandon_capture(self.handle)
                    raise
                graph.executable = driver.end_capture(self.handle)
        finally:
            self._graph = None


class Event:
    """A point in a stream's queue, with a time stamp."""

    def __init__(self, device: Device, event: Any) -> None:
        self._device, self._event = device, event

    def synchronize(self) -> None:
        """Waits until all work queued before it is done."""
        with self._device.active("the kernels queued before"):
            self._event.synchronize()

    def time_till(self, later: Event) -> float:
        """Milliseconds between this event and a later one; the stream must have reached both."""
        with self._device.active("event"):
            return self._event.time_till(later._event)

    def __del__(self) -> None:
        if not self._device.closed:
            with self._device.active():
                del self._event


class Graph:
    """Work that was captured on a stream. It keeps its arrays alive, and waits for the streams that they come from."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.executable: ctypes.c_void_p | None = None
        self.held: list[Any] = []
        self.others: set[int] = set()

    def launch(self) -> None:
        """Queues all of it again, on the stream that it was captured on."""
        if self.executable is None:
            raise DeviceError("graph: nothing was captured")
        with self._stream.device.active("graph"):
            for stream in self.others:
                self._stream.wait_for(stream)
            driver.launch_graph(self.executable, self._stream.handle)
            for stream in self.others:
                self._stream.hold_back(stream)

    def __del__(self) -> None:
        if self.executable is not None and not self._stream.device.closed:
            with self._stream.device.active():  # `held` may include other libraries' GPU objects
                driver.destroy_graph(self.executable)
                self.held.clear()
