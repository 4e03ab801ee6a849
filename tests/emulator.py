"""The CUDA kernels on the host: their own sources, compiled with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import re
import struct
import subprocess
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from support import ROOT

from camrt.kernels.gpu.arrays import CUDA, DeviceArray
from camrt.kernels.gpu.protocol import GpuStream
from camrt.kernels.gpu.queue import FAULTS, Launch, Queue

SOURCES = ROOT / "kernels" / "cuda"
EMULATION = ROOT / "tests" / "emulated"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ORDERS = (0, 1, 2)  # in which the threads of a block take turns: ascending, descending, shuffled


def kernels_of(source: Path) -> list[str]:
    """Names of a .cu file's kernels, as the preprocessor sees them."""
    done = subprocess.run(
        ["g++", "-E", "-P", "-x", "c++", f"-I{EMULATION}", str(source)], capture_output=True, text=True, check=True
    )
    return re.findall(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(', done.stdout)


def list_kernels(folder: Path, sources: Path = SOURCES) -> Path:
    """Writes folder/kernels.inc: every .cu of `sources` in a namespace, and ALL_KERNELS."""
    lines, kernels = ['#include "common.cuh"'], []
    for source in sorted(sources.glob("*.cu")):
        lines += [f"namespace {source.stem} {{", f'#include "{source}"', "}"]
        kernels += [f"KERNEL({source.stem}, {name})" for name in kernels_of(source)]
    listing = folder / "kernels.inc"
    listing.write_text("\n".join([*lines, f"#define ALL_KERNELS {' '.join(kernels)}", ""]))
    return listing


def compile_server(folder: Path, sources: Path = SOURCES, optimization: str = "-O1") -> Path:
    """The server program with every kernel of `sources`, in `folder`."""
    listing = list_kernels(folder, sources)
    server = folder / "server"
    options = ["-std=c++20", optimization, "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *SANITIZERS]
    places = [f"-I{EMULATION}", f"-I{sources}", f'-DKERNELS_FILE="{listing}"']
    command = ["g++", *options, *places, str(EMULATION / "server.cpp"), "-o", str(server)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return server


class _Owner:
    """Of an allocation."""


class EmulatedGpu(GpuStream):
    """A `Queue` whose memory and kernels are in the server's process. Its death, with the sanitizer's words, is an
    error.
    """

    handle = 7  # neither the default stream nor none
    shared_limit = 99 * 1024

    def __init__(self, server: Path) -> None:
        self._device = EmulatedDevice()
        self._process = subprocess.Popen(
            [server], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._garbage: deque[int] = deque()  # what is to be freed with the next message
        self.order = 0
        self.launched: list[Launch] = []
        self._steps: list[Callable[[], None]] | None = None  # that are being captured
        self.fault = self.upload(np.zeros(1, np.int32))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _send(self, *parts: bytes) -> None:
        assert self._process.stdin is not None
        freed = b"".join(b"F" + struct.pack("<Q", self._garbage.popleft()) for _ in range(len(self._garbage)))
        try:
            for part in (freed, *parts):
                self._process.stdin.write(part)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def _receive(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) != size:
            self._fail()
        return data

    def _fail(self) -> None:
        assert self._process.stderr is not None
        raise AssertionError(self._process.stderr.read().decode(errors="replace")[:6000])

    @property
    def device(self) -> EmulatedDevice:
        return self._device

    # ---- memory

    def empty(self, shape: Sequence[int], dtype: Any = np.float32, skew: int = 0) -> DeviceArray:
        """skew: bytes by which the array lies off the 16 bytes that every allocation is aligned to."""
        shape, dtype = tuple(shape), np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self._send(b"A", struct.pack("<Q", size + skew))
        (pointer,) = struct.unpack("<Q", self._receive(8))
        owner = _Owner()  # which parts of the array hold too
        weakref.finalize(owner, self._garbage.append, pointer)  # the collector may come in the middle of a message
        return DeviceArray(pointer + skew, shape, dtype, self.handle, (CUDA, 0), owner)

    def upload(self, array: np.ndarray, out: DeviceArray | None = None, skew: int = 0) -> DeviceArray:
        out = self.empty(array.shape, array.dtype, skew) if out is None else out
        self.write(out, array)
        return out

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        assert (source.shape, source.dtype) == (target.shape, target.dtype)
        self.do(lambda: self.write(target, self.download(source)))

    def download_all(self, arrays: Iterable[DeviceArray]) -> list[np.ndarray]:
        self.synchronize()
        return [self.download(a) for a in arrays]

    def write(self, out: DeviceArray, array: np.ndarray) -> None:
        assert (out.shape, out.dtype) == (array.shape, array.dtype)
        self._send(b"W", struct.pack("<QQ", out.pointer, array.nbytes), np.ascontiguousarray(array).tobytes())

    def download(self, array: DeviceArray) -> np.ndarray:
        self._send(b"R", struct.pack("<QQ", array.pointer, array.nbytes))
        return np.frombuffer(self._receive(array.nbytes), array.dtype).reshape(array.shape)

    def constant(self, array: np.ndarray) -> DeviceArray:
        return self.upload(array)

    # ---- work

    def do(self, step: Callable[[], None]) -> None:
        """Does it now, or, while a graph is captured, whenever that is launched."""
        if self._steps is None:
            step()
        else:
            self._steps.append(step)

    def hold(self, value: Any) -> None:
        """What is captured holds its arrays by itself."""

    def event(self) -> EmulatedEvent:
        return EmulatedEvent()

    @property
    def capturing(self) -> bool:
        return self._steps is not None

    @contextmanager
    def capture(self) -> Iterator[EmulatedGraph]:
        self._steps = []
        graph = EmulatedGraph(self._steps)
        try:
            yield graph
        finally:
            self._steps = None

    def launch(self, launch: Launch) -> None:
        self.do(lambda: self._launch(launch))

    def _launch(self, launch: Launch) -> None:
        self.launched.append(launch)
        name = launch.kernel.encode()
        arguments = []
        for argument in launch.arguments:
            data = struct.pack("<Q", argument.pointer) if isinstance(argument, DeviceArray) else argument.tobytes()
            arguments.append(struct.pack("<I", len(data)) + data)
        shape = struct.pack("<IIIQI", *launch.grid, launch.threads, launch.shared, self.order)
        self._send(b"L", struct.pack("<I", len(name)), name, shape, struct.pack("<I", len(arguments)), *arguments)
        assert self._receive(1) == b"k"

    def synchronize(self) -> None:
        fault = int(self.download(self.fault)[0])
        if fault:
            self.write(self.fault, np.zeros(1, np.int32))
            raise ValueError(FAULTS[fault])

    def wait_for(self, stream: int) -> None:
        raise AssertionError(f"nothing is queued elsewhere, but stream {stream} is waited for")

    hold_back = wait_for


class EmulatedDevice:
    ordinal, compute_capability, model, closed = 0, (0, 0), "emulated", False

    def active(self, what: object = "") -> AbstractContextManager[Any]:
        return nullcontext()

    def memory(self) -> tuple[int, int]:
        return 0, 0

    def give_back(self) -> None:
        """Nothing is kept."""


class EmulatedEvent:
    def synchronize(self) -> None:
        """Everything has come: nothing waits."""


class EmulatedGraph:
    """What was captured; its steps hold their arrays."""

    def __init__(self, steps: list[Callable[[], None]]) -> None:
        self._steps = steps
        self.launches = 0

    def launch(self) -> None:
        self.launches += 1
        for step in self._steps:
            step()


class Ledger(Queue):
    """A queue that only notes launches: for shapes that no memory holds."""

    handle, shared_limit = 7, 99 * 1024

    def __init__(self) -> None:
        self.launched: list[Launch] = []
        self.fault = self.empty((1,), np.int32)

    def empty(self, shape: Any, dtype: Any = np.float32) -> DeviceArray:
        return DeviceArray(1 << 20, tuple(shape), np.dtype(dtype), self.handle)

    def constant(self, array: np.ndarray) -> DeviceArray:
        return self.empty(array.shape, array.dtype)

    upload = constant

    def launch(self, launch: Launch) -> None:
        self.launched.append(launch)

    def wait_for(self, stream: int) -> None: ...

    def hold_back(self, stream: int) -> None: ...
