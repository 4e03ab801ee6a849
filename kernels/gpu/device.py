"""A GPU: its primary context and its loaded kernels. The only file that imports PyCUDA.

TensorRT, ONNX Runtime and PyTorch use the primary context too, so arrays and streams can be shared with them.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..build import sources_hash
from ..errors import DeviceError, OutOfMemory
from .arrays import DeviceArray
from .driver import ordinal_of
from .pool import Pool
from .queue import Launch
from .stream import Stream

BINARIES = Path(__file__).parents[1] / "cuda"
BUILD = "python -m camrt.kernels.build"
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy default stream


@functools.cache
def _pycuda() -> Any:
    try:
        import pycuda.driver as cuda  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        if "libcuda" in str(error) or "undefined symbol" in str(error):
            raise DeviceError(f"no GPU to use: the NVIDIA driver is missing or too old ({error})") from error
        raise DeviceError(f"the kernels need PyCUDA: pip install pycuda ({error})") from error
    try:
        cuda.init()
    except cuda.Error as error:
        raise DeviceError(f"no GPU to use: {error}") from error
    return cuda


class Device:
    """GPU number `ordinal`. Made by `device()`. DeviceError if it does not exist.

    cuda: pycuda.driver. context: the primary context.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self.cuda = cuda = _pycuda()
        count = cuda.Device.count()
        if not 0 <= ordinal < count:
            raise DeviceError(f"no GPU {ordinal}: this machine has {count}")
        self.ordinal = ordinal
        self._device = cuda.Device(ordinal)
        self.name: str = self._device.name()
        self.compute_capability: tuple[int, int] = self._device.compute_capability()
        processors = self._device.get_attribute(cuda.device_attribute.MULTIPROCESSOR_COUNT)
        # cards of the same name can differ in these
        self.model = f"{self.name}, {processors} multiprocessors, {self._device.total_memory() >> 20} MiB"
        self.shared_limit: int = self._device.get_attribute(cuda.device_attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        self.pools: weakref.WeakSet[Pool] = weakref.WeakSet()
        self.closed = False
        self.context = self._device.retain_primary_context()
        self._modules: dict[str, Any] = {}
        self._functions: dict[str, Any] = {}
        self._followers: dict[int, Stream] = {}
        self._lock = threading.Lock()
        atexit.register(self._close)

    def _close(self) -> None:
        """At the end of the process. After this, PyCUDA objects are deleted without calling the driver."""
        self.closed = True
        self.context.detach()

    def __str__(self) -> str:
        return f"GPU {self.ordinal} ({self.name}, compute capability {'.'.join(map(str, self.compute_capability))})"

    def active(self, what: object = "the GPU") -> Active:
        """Makes the primary context current on this thread and gives pycuda.driver.

        PyCUDA's errors inside become DeviceError or OutOfMemory; the message starts with `what`, as str() has it.
        """
        return Active(self, what)

    def function(self, launch: Launch) -> Any:
        """The kernel of a launch, loaded on first use. Call it inside `active`. DeviceError if it cannot be loaded."""
        function = self._functions.get(launch.kernel)
        return self._loaded(launch) if function is None else function

    def _loaded(self, launch: Launch) -> Any:
        with self._lock:
            if launch.module not in self._modules:
                self._modules[launch.module] = self._load(launch.module)
            function = self._modules[launch.module].get_function(launch.kernel)
            attribute = self.cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
            function.set_attribute(attribute, self.shared_limit - function.shared_size_bytes)
            function.prepare([np.uintp if isinstance(a, DeviceArray) else type(a) for a in launch.arguments])
            self._functions[launch.kernel] = function
            return function

    def _load(self, module: str) -> Any:
        file, described = BINARIES / f"{module}.fatbin", BINARIES / "build.json"
        if not file.is_file() or not described.is_file():
            raise DeviceError(f"this installation has no CUDA kernels ({file.name}): build them by `{BUILD}`")
        built = json.loads(described.read_text())
        if built.get("sources") != sources_hash():
            raise DeviceError(f"{file.name} was built from other sources than the installed ones: run `{BUILD}`")
        try:
            return self.cuda.module_from_buffer(file.read_bytes())
        except self.cuda.Error as error:
            version = self.cuda.get_driver_version()
            raise DeviceError(
                f"{file.name}, built by CUDA {built['cuda']} for compute capability "
                f"{', '.join(built['architectures'])}, does not load on {self} with a driver for CUDA "
                f"{version // 1000}.{version % 1000 // 10}: update the driver, or build it with that CUDA version's "
                f"nvcc: `{BUILD}` ({error})"
            ) from error

    def check(self) -> None:
        """DeviceError if the kernels are missing or do not run on this GPU."""
        with self.active("loading the kernels"), self._lock:
            if "check_finite" not in self._modules:
                self._modules["check_finite"] = self._load("check_finite")

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the GPU's memory."""
        with self.active() as cuda:
            return cuda.mem_get_info()

    def give_back(self) -> None:
        """Frees the memory that the pools keep for later arrays."""
        gc.collect()
        with self.active():
            for pool in list(self.pools):
                pool.clear()

    def stream(self) -> Stream:
        """A new stream, which does not wait for the legacy default stream."""
        with self.active() as cuda:
            return Stream(self, cuda.Stream(_NON_BLOCKING))

    def follower(self, handle: int) -> Stream:
        """Our stream for work in the order of another library's stream `handle`; one per handle, made on first use."""
        with self._lock:
            if handle not in self._followers:
                with self.active() as cuda:
                    own = None if handle == 0 else cuda.Stream(_NON_BLOCKING)
                    self._followers[handle] = Stream(self, own)
            return self._followers[handle]


class Active:
    """A context manager: see Device.active. Inside another one of the same device it costs next to nothing."""

    __slots__ = ("_device", "_outside", "_what")

    def __init__(self, device: Device, what: object) -> None:
        self._device, self._what = device, what

    def __enter__(self) -> Any:
        device = self._device
        self._outside = _here.device
        if self._outside is not device:
            device.context.push()
            _here.device = device
        return device.cuda

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        device, cuda = self._device, self._device.cuda
        try:
            if isinstance(error, cuda.MemoryError | OverflowError):
                free, total = (size >> 20 for size in cuda.mem_get_info())
                raise OutOfMemory(
                    f"{self._what}: out of memory on {device}, {free} of {total} MiB free: use a smaller batch"
                ) from error
            if isinstance(error, cuda.Error):
                raise DeviceError(f"{self._what}: {error}") from error
        finally:
            if self._outside is not device:
                _here.device = self._outside
                cuda.Context.pop()


class _Here(threading.local):
    """The device whose context this thread has made current."""

    device: Device | None = None


_here = _Here()
_devices: dict[int, Device] = {}
_devices_lock = threading.Lock()


def count() -> int:
    """How many GPUs this machine has. DeviceError if PyCUDA or the driver is missing."""
    return _pycuda().Device.count()


def device(ordinal: int = 0) -> Device:
    """GPU number `ordinal`; the same object for every call. DeviceError if it does not exist or PyCUDA is missing."""
    with _devices_lock:
        if ordinal not in _devices:
            _devices[ordinal] = Device(ordinal)
        return _devices[ordinal]


@contextmanager
def in_order_of(handle: int, pointer: int) -> Iterator[Stream]:
    """A stream for work that runs after everything queued on stream `handle`, and before everything queued there later.

    pointer: an address on the GPU to use; 0 for GPU 0.
    """
    _pycuda()
    queue = device(ordinal_of(pointer) if pointer else 0).follower(handle)
    if queue.handle != handle:
        queue.wait_for(handle)
    yield queue
    if queue.handle != handle:
        queue.hold_back(handle)
