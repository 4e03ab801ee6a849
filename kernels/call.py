"""How a kernel is called: NumPy's arrays by its specification, a GPU's arrays by CUDA.

A GPU's array is anything that speaks __cuda_array_interface__ or DLPack (PyTorch, CuPy, camrt.kernels.gpu.device). The
work is queued and not waited for; results are `DeviceArray`s. `stream` is a `Stream`, or the handle of another
library's (`torch.cuda.current_stream().cuda_stream`); without one it is the legacy default stream, PyTorch's default.
All arrays lie on the stream's GPU. What another library's stream still reads must be held until that is done, as with
any two streams.
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
    """The queue and the values as arrays for it, where one lies on a GPU; else None and NumPy's arrays. None stays
    None.

    written: the value that the kernel writes. Streams that arrays come from wait for what is queued.
    """
    if not any(map(is_device_array, values.values())):
        yield None, list(values.values())
        return
    if not isinstance(stream, int | Queue | None):
        raise ValueError(f"{kernel}: stream {stream!r}: use a camrt Stream, a handle (an int) or None")
    handle = stream.handle if isinstance(stream, Queue) else stream or 0
    found = [
        None if v is None else device_array(v, f"{kernel}: {name}", handle, name == written)
        for name, v in values.items()
    ]
    arrays = [a for a in found if a is not None]
    with _queue(stream, arrays) as queue:
        others = {a.stream for a in arrays if a.stream is not None} - {handle, queue.handle}
        for other in others:
            queue.wait_for(other)
        yield queue, found
        for other in others:
            queue.hold_back(other)


def _queue(stream: Stream, arrays: Sequence[DeviceArray]) -> AbstractContextManager[Queue]:
    if isinstance(stream, Queue):
        return nullcontext(stream)
    from .gpu.device import in_order_of

    return in_order_of(stream or 0, next((a.pointer for a in arrays if a.pointer), 0))
