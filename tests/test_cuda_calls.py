"""Calling the CUDA kernels: what is refused, arrays that travel between libraries, the build, machines without
a GPU.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulator import SOURCES, EmulatedGpu, Ledger, kernels_of
from kernel_table import filled
from support import ROOT

from camrt import kernels
from camrt.kernels.build import ARCHITECTURES, BuildError, build, find_nvcc, sources_hash
from camrt.kernels.gpu import arrays
from camrt.kernels.gpu.arrays import CPU

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc: the CUDA kernels are not compiled")

# ---- bad input

IMAGE, MAPS, ROWS = (3, 8, 8), (4, 2, 2), (2, 4)


def bad_calls(queue: Any) -> dict[str, Any]:
    """What is refused -> the call."""
    new, cast = queue.empty, np.float64

    def mask(image: Any = IMAGE, maps: Any = MAPS, dtype: Any = np.float32, **more: Any) -> Any:
        return lambda: kernels.mask_batch(new(image, dtype), new(maps), stream=queue, **more)

    def sums(total: Any = IMAGE, scores: Any = (3, 4), maps: Any = MAPS, **more: Any) -> Any:
        return lambda: kernels.accumulate_maps(new(total), new(scores), new(maps), stream=queue, **more)

    def fuse(maps: Any = (2, 20), grids: Any = ((4, 4), (2, 2)), weights: Any = (2, 2), size: Any = (8, 8)) -> Any:
        return lambda: kernels.fuse_layers(new(maps), grids, new(weights), size, stream=queue)

    strided = dataclasses.replace(new((4, 4)), owner=None)
    return {
        "mask_batch: image is (8, 8), needed (C, H, W)": mask(image=(8, 8)),
        "mask_batch: image (3, 8, 8) is float64, needed float32": mask(dtype=cast),
        "mask_batch: activations is (4, 2), needed (K, h, w)": mask(maps=(4, 2)),
        "mask_batch: activations is 0 x 2, needed at least 1 x 1": mask(maps=(4, 0, 2)),
        "mask_batch: image is 8 x 0, needed at least 1 x 1": mask(image=(3, 8, 0)),
        "mask_batch: out is (4, 3, 8, 9), needed (4, 3, 8, 8)": mask(out=new((4, 3, 8, 9))),
        "mask_batch: out (4, 3, 8, 8) is int32, needed float32 or float16": mask(out=new((4, 3, 8, 8), np.int32)),
        "mask_batch: pixels is 2500000000, at most 2147483647": mask(image=(3, 50_000, 50_000)),
        "accumulate_maps: pixels is 2500000000, at most 2147483647": sums(total=(3, 50_000, 50_000)),
        "mask_batch: gate 'relu': use tanh, sigmoid_relu, minmax, identity": mask(kind="relu"),
        "mask_batch: interpolation 'bicubic': use bilinear, align_corners, nearest": mask(interpolation="bicubic"),
        "mask_batch: gates are not kept on a GPU, computing them again is faster: leave gates out": mask(
            gates=new((4, 8, 8))
        ),
        "mask_batch: image is on the host and another array on the GPU: upload it first": (
            lambda: kernels.mask_batch(np.zeros(IMAGE, np.float32), new(MAPS), stream=queue)
        ),
        "accumulate_maps: scores is (3, 5), needed (3, 4)": sums(scores=(3, 5)),
        "accumulate_maps: total is (8, 8), needed (S, H, W)": sums(total=(8, 8)),
        "accumulate_maps: gate 'relu': use tanh, sigmoid_relu, minmax, identity": sums(kind="relu"),
        "winsorize: percentile 101 is outside 0..100": lambda: kernels.winsorize(new(ROWS), 101, stream=queue),
        "winsorize: percentile nan is outside 0..100": lambda: kernels.winsorize(new(ROWS), np.nan, stream=queue),
        "winsorize: rows (2, 4) is float64, needed float32": lambda: kernels.winsorize(
            new(ROWS, cast), 5, stream=queue
        ),
        "winsorize: rows is a single number, needed (..., L)": lambda: kernels.winsorize(new(()), 5, stream=queue),
        "winsorize: rows (4, 2) is not C-contiguous: make it contiguous first": (
            lambda: kernels.winsorize(Foreign(strided, (4, 2), strides=(16, 8)), 5, stream=queue)
        ),
        "winsorize: rows (2, 2): its address is not a multiple of 4 bytes": (
            lambda: kernels.winsorize(Foreign(strided, (2, 2), data=(strided.pointer + 2, False)), 5, stream=queue)
        ),
        "winsorize: rows (2, 2) is >f4: its byte order is not this machine's": (
            lambda: kernels.winsorize(Foreign(strided, (2, 2), typestr=">f4"), 5, stream=queue)
        ),
        "accumulate_maps: total (1, 4, 4) is read-only": (
            lambda: kernels.accumulate_maps(
                Foreign(strided, (1, 4, 4), data=(strided.pointer, True)), new((1, 4)), new(MAPS), stream=queue
            )
        ),
        "winsorize: low 2 is above high 1.0": lambda: kernels.winsorize(new(ROWS), 5, 2, stream=queue),
        "winsorize: entries is 2147483648, at most 2147483647": (
            lambda: kernels.winsorize(new((1, 2**31)), 5, stream=queue)
        ),
        "mask_batch: stream 'mine': use a camrt Stream, a handle (an int) or None": (
            lambda: kernels.mask_batch(new(IMAGE), new(MAPS), stream="mine")  # type: ignore[arg-type]
        ),
        "fuse_layers: no layers": fuse(grids=()),
        "fuse_layers: maps is (2, 21), needed (B, 20)": fuse(maps=(2, 21)),
        "fuse_layers: weights is (2, 3), needed (2, 2)": fuse(weights=(2, 3)),
        "fuse_layers: grid is 0 x 4, needed at least 1 x 1": fuse(grids=((0, 4), (4, 5))),
        "fuse_layers: size is 0 x 8, needed at least 1 x 1": fuse(size=(0, 8)),
    }


class Foreign:
    """Another library's array: the array interface and nothing else."""

    def __init__(self, array: kernels.DeviceArray, shape: tuple[int, ...], **changes: Any) -> None:
        self._array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "shape": shape, "stream": None, **changes}


@pytest.mark.parametrize("message", bad_calls(Ledger()))
def test_bad_input_is_refused_by_name(message: str) -> None:
    queue = Ledger()
    call = bad_calls(queue)[message]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
    assert not queue.launched


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("mask_batch: image is (8, 8)", lambda: kernels.mask_batch(np.zeros((8, 8), "f"), np.zeros(MAPS, "f"))),
        ("mask_batch: image (3, 8, 8) is float64", lambda: kernels.mask_batch(np.zeros(IMAGE), np.zeros(MAPS, "f"))),
        ("mask_batch: image is a Tensor, needed", lambda: kernels.mask_batch(torch.zeros(IMAGE), np.zeros(MAPS, "f"))),
        ("mask_batch: image is a list, needed", lambda: kernels.mask_batch([[0.0]], np.zeros(MAPS, "f"))),
        ("winsorize: low 1 is above high 0", lambda: kernels.winsorize(np.ones((2, 3)), 50, 1, 0)),
        (
            "accumulate_maps: scores is (2, 4), needed (3, 4)",
            lambda: kernels.accumulate_maps(np.zeros(IMAGE, "f"), np.zeros(ROWS, "f"), np.zeros(MAPS, "f")),
        ),
        (
            "fuse_layers: maps is (1, 5), needed (B, 4)",
            lambda: kernels.fuse_layers(np.zeros((1, 5), "f"), [(2, 2)], np.ones((1, 1)), (4, 4)),
        ),
    ],
)
def test_the_specification_refuses_alike(message: str, call: Any) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call()


def test_nothing_to_do_launches_nothing(queue: Any) -> None:
    image, total = filled("random", IMAGE), filled("random", IMAGE)
    masked = kernels.mask_batch(queue.upload(image), queue.empty((0, 2, 2)), stream=queue)
    assert masked.shape == (0, 3, 8, 8) == kernels.mask_batch(image, np.zeros((0, 2, 2), "f")).shape
    on_gpu = queue.upload(total)
    kernels.accumulate_maps(on_gpu, queue.empty((3, 0)), queue.empty((0, 2, 2)), stream=queue)
    np.testing.assert_array_equal(queue.download(on_gpu), total)
    for shape in ((0, 5), (3, 0)):
        assert kernels.winsorize(queue.empty(shape), 50, stream=queue).shape == shape
        assert kernels.winsorize(np.zeros(shape), 50).shape == shape
    assert kernels.fuse_layers(queue.empty((0, 4)), [(2, 2)], queue.empty((0, 1)), (3, 3), stream=queue).shape == (
        0,
        3,
        3,
    )
    if isinstance(queue, EmulatedGpu):
        assert not queue.launched


def test_another_streams_arrays_are_waited_for_and_let_go() -> None:
    class Ordered(Ledger):
        def __init__(self) -> None:
            super().__init__()
            self.log: list[Any] = []

        def launch(self, launch: Any) -> None:
            self.log.append(launch.kernel)

        def wait_for(self, stream: int) -> None:
            self.log.append(("waits for", stream))

        def hold_back(self, stream: int) -> None:
            self.log.append(("leads", stream))

    queue = Ordered()
    elsewhere, foreign = dataclasses.replace(queue.empty(IMAGE), stream=9), Foreign(queue.empty(MAPS), MAPS)
    kernels.mask_batch(elsewhere, foreign, stream=queue)
    assert queue.log == [("waits for", 9), "mask_batch_f32_wide", ("leads", 9)]
    queue.log.clear()
    foreign.__cuda_array_interface__["stream"] = 1  # the protocol's name for the legacy default stream
    kernels.mask_batch(queue.empty(IMAGE), foreign, stream=queue)
    assert queue.log == [("waits for", 0), "mask_batch_f32_wide", ("leads", 0)]


# ---- arrays that travel between libraries, on the host's memory: the protocol is the same


def on_host(array: np.ndarray) -> kernels.DeviceArray:
    return kernels.DeviceArray(array.ctypes.data, array.shape, array.dtype, device=(CPU, 0), owner=array)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "uint8", "int64"])
@pytest.mark.parametrize("take", [np.from_dlpack, torch.from_dlpack], ids=["numpy", "torch"])
def test_dlpack_gives_an_array_without_a_copy(take: Any, dtype: str) -> None:
    values = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    lent = on_host(values)
    taken = take(lent)
    values[1, 2, 3] = 99
    assert tuple(taken.shape) == (2, 3, 4)
    np.testing.assert_array_equal(np.asarray(taken), values)
    alive = weakref.ref(lent)
    del lent
    gc.collect()
    assert alive() is not None
    del taken
    gc.collect()
    assert alive() is None
    lent = on_host(values)
    alive = weakref.ref(lent)
    lent.__dlpack__()  # a capsule that nobody takes
    del lent
    gc.collect()
    assert alive() is None


def test_dlpack_takes_an_array_without_a_copy() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    taken = arrays._opened(values.__dlpack__(), "values")
    assert (taken.shape, taken.dtype, taken.pointer) == ((2, 3), np.dtype(np.float32), values.data_ptr())
    with pytest.raises(ValueError, match=r"values \(3, 2\) is not C-contiguous"):
        arrays._opened(values.T.__dlpack__(), "values")
    with pytest.raises(ValueError, match=r"values \(2,\) has a dtype that NumPy does not have"):
        arrays._opened(torch.zeros(2, dtype=torch.bfloat16).__dlpack__(), "values")
    again = np.from_dlpack(dataclasses.replace(taken, device=(CPU, 0)))
    del taken
    gc.collect()
    np.testing.assert_array_equal(again, values.numpy())


def test_the_consumers_stream_is_led() -> None:
    led: list[int] = []
    with pytest.raises(BufferError, match="is exported without a copy"):
        on_host(np.zeros(3, "f")).__dlpack__(copy=True)
    array = dataclasses.replace(on_host(np.zeros(3, "f")), follow=led.append)
    for stream in (None, 1, 77, -1):
        array.__dlpack__(stream=stream)
    assert led == [0, 0, 77]
    assert array.__cuda_array_interface__["stream"] is None
    assert dataclasses.replace(array, stream=0).__cuda_array_interface__["stream"] == 1


def test_numpy_does_not_take_an_array_on_a_gpu_for_an_object() -> None:
    with pytest.raises(TypeError, match=r"this array is on a GPU: copy it to the host with Stream.download"):
        np.asarray(Ledger().empty((3,)))


def test_tensors_on_the_host_are_not_on_a_gpu() -> None:
    assert not any(map(arrays.is_device_array, (np.zeros(3), torch.zeros(3), [1.0], None)))
    assert arrays.is_device_array(Ledger().empty((3,)))


# ---- without a GPU


@pytest.mark.parametrize("missing", ["pycuda", "gpu"])
def test_what_a_gpu_needs_is_named(missing: str) -> None:
    code = "import sys\n" + ("sys.modules['pycuda'] = None\n" if missing == "pycuda" else "")
    code += "from camrt import kernels\nfrom camrt.kernels.gpu.device import device\n"
    code += "try: print(device())\nexcept kernels.DeviceError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if missing == "gpu" and done.stdout.startswith("GPU 0"):
        pytest.skip("this machine has a GPU")
    wanted = r"the kernels need PyCUDA: pip install pycuda \(.+\)|no GPU to use: .+"
    assert re.fullmatch(wanted, done.stdout.strip())


# ---- the build


@needs_nvcc
def test_nvcc_compiles_without_a_warning(tmp_path: Path) -> None:
    """For the oldest and the newest; the wheel's test builds for all."""
    ends = [ARCHITECTURES[0], ARCHITECTURES[-1]]
    made = build(tmp_path, ends, warnings=["-Werror=all-warnings"])
    assert {m.stem for m in made} == {s.stem for s in SOURCES.glob("*.cu")}
    described = json.loads((tmp_path / "build.json").read_text())
    assert described["architectures"] == ends and described["sources"] == sources_hash()
    assert {p.suffix for p in tmp_path.iterdir()} == {".fatbin", ".json"}  # nothing half-written
    for binary in made:
        names = set(kernels_of(SOURCES / f"{binary.stem}.cu")) if shutil.which("g++") else set()
        assert all(name.encode() in binary.read_bytes() for name in names) or not names


def test_an_nvcc_that_is_too_old_is_named(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    nvcc.chmod(0o755)
    with pytest.raises(BuildError, match=r"nvcc is of CUDA 11.8, needed 12 or later"):
        build(tmp_path / "out", nvcc=str(nvcc))
    assert not (tmp_path / "out").exists()


def test_an_older_nvcc_builds_for_what_it_knows(tmp_path: Path) -> None:
    nvcc, said = tmp_path / "nvcc", tmp_path / "said"
    nvcc.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo release 12.4, V12.4.131; exit; fi\n'
        'if [ "$1" = --list-gpu-arch ]; then printf "compute_%s\\n" 50 75 80 86 87 89 90; exit; fi\n'
        f'echo "$@" >> {said}\n'
        'while [ "$1" != -o ]; do shift; done; : > "$2"\n'
    )
    nvcc.chmod(0o755)
    assert build(tmp_path / "out", nvcc=str(nvcc))
    described = json.loads((tmp_path / "out" / "build.json").read_text())
    assert described["cuda"] == "12.4" and described["architectures"] == ["7.5", "8.0", "8.6", "8.7", "8.9", "9.0"]
    for line in said.read_text().splitlines():
        assert re.findall(r",code=(\w+)", line) == [*(f"sm_{n}" for n in (75, 80, 86, 87, 89, 90)), "compute_90"]


def test_a_build_without_nvcc_says_what_is_missing(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "kernels" / "build.py")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "build: no nvcc on the PATH or in CUDA_HOME: install the CUDA toolkit, 12.0 or later\n"
