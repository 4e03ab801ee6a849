"""GPU arrays, exchanged with other libraries without a copy by __cuda_array_interface__ or DLPack.

Sources: the CUDA array interface, version 3 (Numba's documentation); DLPack 0.8's C header.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CPU, CUDA = 1, 2  # DLPack's device types
LEGACY_STREAM = 1  # both protocols' name for the default stream


@dataclass(slots=True, weakref_slot=True, eq=False)
class DeviceArray:
    """A C-contiguous array in a GPU's memory.

    pointer: its address. stream: handle of the stream that writes it, 0 for the legacy default stream, None if no wait
    is needed. device: DLPack's (type, number). owner: keeps the memory alive. follow(handle): makes the stream `handle`
    wait for the array.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype
    stream: int | None = None
    device: tuple[int, int] = (CUDA, 0)
    owner: Any = field(default=None, repr=False)
    follow: Callable[[int], None] | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> DeviceArray:
        """Adjacent rows along the first axis, in the same memory. ValueError for a step other than 1."""
        start, stop, step = part.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"array[{part}]: neighbouring rows only")
        rows = max(stop - start, 0)
        row = self.dtype.itemsize * math.prod(self.shape[1:])
        return self._viewed(self.pointer + start * row, (rows, *self.shape[1:]))

    def reshape(self, *shape: int) -> DeviceArray:
        """The same memory in another shape; one length may be -1. ValueError if the sizes differ."""
        product = math.prod(n for n in shape if n >= 0)
        size = math.prod(self.shape)
        full = tuple(size // product if n < 0 and product else n for n in shape)
        if math.prod(full) != size:
            raise ValueError(f"an array of shape {self.shape} does not take the shape {shape}")
        return self._viewed(self.pointer, full)

    def _viewed(self, pointer: int, shape: tuple[int, ...]) -> DeviceArray:
        return DeviceArray(pointer, shape, self.dtype, self.stream, self.device, self.owner, self.follow)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("this array is on a GPU: copy it to the host with Stream.download")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
            "stream": LEGACY_STREAM if self.stream == 0 else self.stream,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(
        self, *, stream: int | None = None, dl_device: Any = None, copy: bool | None = None, **_: Any
    ) -> Any:
        """A DLPack capsule. The consumer's stream waits for the array (None: the default stream, -1: no waiting)."""
        if copy or dl_device not in (None, self.device):
            raise BufferError("an array on a GPU is exported without a copy: leave copy and dl_device out")
        if self.follow is not None and stream != -1:
            self.follow(0 if stream in (None, LEGACY_STREAM) else stream)
        return _capsule(self)


def is_device_array(value: Any) -> bool:
    """Whether a value is an array on a GPU, by __cuda_array_interface__ or DLPack."""
    if isinstance(value, DeviceArray):
        return True
    if value is None or isinstance(value, np.ndarray):
        return False
    if _cuda_interface(value) is not None:
        return True
    device = getattr(value, "__dlpack_device__", None)
    return device is not None and device()[0] == CUDA


def _cuda_interface(value: Any) -> dict[str, Any] | None:
    try:
        return value.__cuda_array_interface__
    except (AttributeError, TypeError):  # PyTorch's host tensors have the attribute, but it raises
        return None


def device_array(value: Any, name: str, stream: int = 0, written: bool = False) -> DeviceArray:
    """Another library's GPU array as a DeviceArray, without a copy.

    name: for messages. stream: handle of the stream that will use it. written: whether a kernel will write it.
    ValueError if it is on the host, not C-contiguous, not aligned to its dtype, or read-only although `written`.
    """
    if isinstance(value, DeviceArray):
        return value
    if not is_device_array(value):
        raise ValueError(f"{name} is on the host and another array on the GPU: upload it first")
    interface = _cuda_interface(value)
    if interface is None or ("stream" not in interface and hasattr(value, "__dlpack__")):
        array = _opened(value.__dlpack__(stream=stream or LEGACY_STREAM), name)  # PyTorch makes our stream wait
    else:
        shape, dtype = tuple(map(int, interface["shape"])), np.dtype(interface["typestr"])
        _refuse_strides(name, shape, dtype, interface.get("strides"))
        if not dtype.isnative:
            raise ValueError(f"{name} {shape} is {dtype.str}: its byte order is not this machine's")
        pointer, read_only = interface["data"]
        if written and read_only:
            raise ValueError(f"{name} {shape} is read-only")
        ready = interface.get("stream")
        array = DeviceArray(pointer or 0, shape, dtype, 0 if ready == LEGACY_STREAM else ready, owner=value)
    if array.pointer % array.dtype.itemsize:
        raise ValueError(f"{name} {array.shape}: its address is not a multiple of {array.dtype.itemsize} bytes")
    return array


def _refuse_strides(name: str, shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...] | None) -> None:
    """ValueError if the array is not C-contiguous. strides: in bytes; those of axes of length 1 are ignored."""
    if strides is None or 0 in shape:
        return
    expected = dtype.itemsize
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != expected:
            raise ValueError(f"{name} {shape} is not C-contiguous: make it contiguous first")
        expected *= length


# ---- DLPack


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_CODES = {0: "i", 1: "u", 2: "f"}
_NAME, _USED = b"dltensor", b"used_dltensor"

_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_rename_capsule = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_SetName", ctypes.pythonapi)
)


class _AsIfOnHost:
    """Makes NumPy wrap a GPU array, only to get a DLPack capsule. Its data must never be read on the host."""

    def __init__(self, array: DeviceArray) -> None:
        self.array = array
        data = array.pointer, False
        self.__array_interface__ = {"shape": array.shape, "typestr": array.dtype.str, "data": data, "version": 3}


def _capsule(array: DeviceArray) -> Any:
    """NumPy's DLPack capsule with the pointer and device corrected. A deleter in Python would be unsafe: consumers may
    call it on any thread, without the GIL.
    """
    capsule = np.asarray(_AsIfOnHost(array)).__dlpack__()
    tensor = ctypes.cast(_capsule_pointer(id(capsule), _NAME), ctypes.POINTER(_Managed)).contents.tensor
    tensor.data, (tensor.device_type, tensor.device_id) = array.pointer, array.device
    return capsule


class _Lender:
    """Keeps a producer's tensor until no DeviceArray needs it."""

    def __init__(self, managed: Any) -> None:
        self._managed = managed

    def __del__(self) -> None:
        if self._managed.contents.deleter:
            self._managed.contents.deleter(self._managed)


def _opened(capsule: Any, name: str) -> DeviceArray:
    managed = ctypes.cast(_capsule_pointer(id(capsule), _NAME), ctypes.POINTER(_Managed))
    _rename_capsule(id(capsule), _USED)
    owner = _Lender(managed)
    tensor = managed.contents.tensor
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.code not in _CODES or tensor.lanes != 1:
        raise ValueError(f"{name} {shape} has a dtype that NumPy does not have")
    dtype = np.dtype(f"{_CODES[tensor.code]}{tensor.bits // 8}")
    if tensor.strides:
        _refuse_strides(name, shape, dtype, tuple(s * dtype.itemsize for s in tensor.strides[: tensor.ndim]))
    device = tensor.device_type, tensor.device_id
    return DeviceArray((tensor.data or 0) + tensor.byte_offset, shape, dtype, device=device, owner=owner)
