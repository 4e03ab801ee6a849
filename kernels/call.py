"""How a kernel is called: NumPy arrays run its NumPy specification, GPU arrays run its CUDA kernel.

A GPU array is any object with __cuda_array_interface__ or DLPack (PyTorch, CuPy, camrt.kernels.gpu.device). The call
queues the work and returns at once; results are `DeviceArray`s. `stream` is a `Stream`, or the handle of another
library's stream (`torch.cuda.current_stream().cuda_stream`); without it the legacy default stream is used, which is
PyTorch's default. All arrays must be on the stream's GPU. Keep an array alive while another library's stream still
reads it, as with any two streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from .gpu.arrays import DeviceArray, device_array, is_device_array
from .gpu.queue import Queue

Stream = Queue | int | None


class prepared:
    """Gives (queue, values as DeviceArrays) if at least one value is on a GPU; else (None, the values as they are).

    A value that is None stays None. written: the name of the value that the kernel writes. The queue first waits for
    the streams that the arrays come from; afterwards these streams wait for the queued work. ValueError; DeviceError.
    """

    __slots__ = ("_following", "_kernel", "_others", "_queue", "_stream", "_values", "_written")

    def __init__(self, kernel: str, stream: Stream, written: str = "", **values: Any) -> None:
        self._kernel, self._stream, self._written, self._values = kernel, stream, written, values
        self._queue: Queue | None = None
        self._others: set[int] = set()
        self._following: AbstractContextManager[Queue] | None = None

    def __enter__(self) -> tuple[Queue | None, list[Any]]:
        values, kernel, stream = self._values, self._kernel, self._stream
        if not any(map(is_device_array, values.values())):
            return None, list(values.values())
        if not (isinstance(stream, Queue | int) or stream is None):
            raise ValueError(f"{kernel}: stream {stream!r}: use a camrt Stream, a handle (an int) or None")
        handle = stream.handle if isinstance(stream, Queue) else stream or 0
        arrays = [
            v
            if v is None or isinstance(v, DeviceArray)
            else device_array(v, f"{kernel}: {name}", handle, name == self._written)
            for name, v in values.items()
        ]
        queue = stream if isinstance(stream, Queue) else self._follow(handle, arrays)
        self._queue = queue
        for array in arrays:
            if array is not None and array.stream is not None and array.stream not in (handle, queue.handle):
                self._others.add(array.stream)
        for other in self._others:
            queue.wait_for(other)
        return queue, arrays

    def _follow(self, handle: int, arrays: Sequence[DeviceArray | None]) -> Queue:
        from .gpu.device import in_order_of

        pointer = next((a.pointer for a in arrays if a is not None and a.pointer), 0)
        self._following = in_order_of(handle, pointer)
        return self._following.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._queue is None:
            return
        if error[0] is None:
            for other in self._others:
                self._queue.hold_back(other)
        if self._following is not None:
            self._following.__exit__(*error)
