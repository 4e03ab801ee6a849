"""How a kernel is called: NumPy arrays run its NumPy specification, GPU arrays run its CUDA kernel.

A GPU array is any object with __cuda_array_interface__ or DLPack (PyTorch, CuPy, camrt.kernels.gpu.device). The call
queues the work and returns at once; results are `DeviceArray`s. `stream` is a `Stream`, or the handle of another
library's stream (`torch.cuda.current_stream().cuda_stream`); without it the legacy default stream is used, which is
PyTorch's default. All arrays must be on the stream's GPU. Keep an array alive while another library's stream still
reads it, as with any two streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from .gpu.arrays import DeviceArray, device_array, is_device_array
from .gpu.queue import Queue

Stream = Queue | int | None


@contextmanager
def prepared(kernel: str, stream: Stream, written: str = "", **values: Any) -> Iterator[tuple[Queue | None, list[Any]]]:
    """(queue, values as DeviceArrays) if at least one value is on a GPU; else (None, the values as they are).

    A value that is None stays None. written: the name of the value that the kernel writes. The queue first waits for
    the streams that the arrays come from; afterwards these streams wait for the queued work. ValueError; DeviceError.
    """
    if not any(map(is_device_array, values.values())):
        yield None, list(values.values())
        return
    if not isinstance(stream, int | Queue | None):
        raise ValueError(f"{kernel}: stream {stream!r}: use a camrt Stream, a handle (an int) or None")
    handle = stream.handle if isinstance(stream, Queue) else stream or 0
    device_values = [
        None if v is None else device_array(v, f"{kernel}: {name}", handle, name == written)
        for name, v in values.items()
    ]
    arrays = [a for a in device_values if a is not None]
    with _queue(stream, arrays) as queue:
        others = {a.stream for a in arrays if a.stream is not None} - {handle, queue.handle}
        for other in others:
            queue.wait_for(other)
        yield queue, device_values
        for other in others:
            queue.hold_back(other)


def _queue(stream: Stream, arrays: Sequence[DeviceArray]) -> AbstractContextManager[Queue]:
    if isinstance(stream, Queue):
        return nullcontext(stream)
    from .gpu.device import in_order_of

    return in_order_of(stream or 0, next((a.pointer for a in arrays if a.pointer), 0))
