"""CUDA driver functions that PyCUDA lacks: graphs, and waiting between streams of different libraries."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

from ..errors import DeviceError

NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: other threads may allocate meanwhile
_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(function: str, *arguments: Any) -> None:
    code = getattr(_library(), function)(*arguments)
    if code:
        name = ctypes.c_char_p()
        _library().cuGetErrorName(code, ctypes.byref(name))
        raise DeviceError(f"{function}: {(name.value or str(code).encode()).decode()}")


class StreamOrder:
    """Makes one stream wait for another; both are handles, of any library. The context must be current.

    Calling it with (before, after): later work on `after` waits for the work queued on `before` until now.
    """

    def __init__(self) -> None:
        self._event = ctypes.c_void_p()
        _call("cuEventCreate", ctypes.byref(self._event), NO_TIMING)
        self._lock = threading.Lock()

    def __call__(self, before: int, after: int) -> None:
        with self._lock:  # no other thread may record the event between these two calls
            _call("cuEventRecord", self._event, ctypes.c_void_p(before))
            _call("cuStreamWaitEvent", ctypes.c_void_p(after), self._event, 0)

    def destroy(self) -> None:
        _call("cuEventDestroy_v2", self._event)


def ordinal_of(pointer: int) -> int:
    """The number of the GPU that holds the memory at this address."""
    ordinal = ctypes.c_int()
    _call("cuPointerGetAttribute", ctypes.byref(ordinal), _ORDINAL, ctypes.c_void_p(pointer))
    return ordinal.value


def synchronize(stream: int) -> None:
    _call("cuStreamSynchronize", ctypes.c_void_p(stream))


def begin_capture(stream: int) -> None:
    _call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), _RELAXED)


def abandon_capture(stream: int) -> None:
    """Ends a capture and drops what it recorded, even if it is invalid; never raises."""
    graph = ctypes.c_void_p()
    _library().cuStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph))
    if graph:
        _library().cuGraphDestroy(graph)


def end_capture(stream: int) -> ctypes.c_void_p:
    """Ends a capture and returns the graph, ready for launch_graph. DeviceError if the capture is invalid."""
    graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
    try:
        _call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
    finally:
        _call("cuGraphDestroy", graph)
    return executable


def launch_graph(executable: ctypes.c_void_p, stream: int) -> None:
    _call("cuGraphLaunch", executable, ctypes.c_void_p(stream))


def destroy_graph(executable: ctypes.c_void_p) -> None:
    _library().cuGraphExecDestroy(executable)
