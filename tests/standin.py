"""A stand-in for the NVIDIA driver, so that PyCUDA and the GPU side run on the host: emulated/driver.cpp.

`python tests/standin.py build FOLDER` builds PyCUDA for it, once (`make test` does, into .venv/standin). A process that
is started with `environment(...)` runs on the stand-in from its first import of PyCUDA on; as a pytest plugin
(`-p standin`) this module fails the tests in which the stand-in saw something wrong.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PYCUDA = "pycuda==2026.1"
NEEDED_BY_PYCUDA = ("pytools", "platformdirs", "siphash24", "mako", "markupsafe", "typing-extensions")
HEADERS = ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-profiler-api==13.0.85")  # without a CUDA toolkit
ORDERS = ("eager", "lazy", "newest_first", "oldest_first", "random")
BUILT = Path(sys.prefix) / "standin"  # where `make test` builds it


# ---- PyCUDA


def build_pycuda(folder: Path) -> None:
    """folder/site: PyCUDA and what it needs; folder/include: the CUDA headers. From PyPI; about a minute."""
    folder.mkdir(parents=True, exist_ok=True)

    def pip(*arguments: str, **variables: str) -> None:
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
        subprocess.run(command, check=True, env={**os.environ, **variables})

    pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder / "wheels"), *HEADERS)
    for wheel in (folder / "wheels").glob("nvidia_*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "headers")
    include = folder / "include"
    include.unlink(missing_ok=True)
    include.symlink_to(next((folder / "headers" / "nvidia").glob("*/include")))
    # it is linked against a library of that name only; which one is found at run time
    nothing = ["-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null", "-o", str(folder / "libcuda.so")]
    subprocess.run(["gcc", *nothing], check=True)
    pip("download", "--no-deps", "--no-build-isolation", "--no-binary=:all:", "--dest", str(folder), PYCUDA)
    (archive,) = folder.glob("pycuda-*.tar.gz")
    subprocess.run(["tar", "xf", str(archive), "-C", str(folder)], check=True)
    source = folder / archive.name.removesuffix(".tar.gz")
    (source / "siteconf.py").write_text(
        f"CUDA_INC_DIR = [{str(include)!r}]\nCUDA_ENABLE_CURAND = False\n"
        f"CUDADRV_LIB_DIR = [{str(folder)!r}]\nCUDADRV_LIBNAME = ['cuda']\n"
    )
    site = ["--target", str(folder / "site"), "--upgrade"]
    pip("install", *site, "--no-deps", *NEEDED_BY_PYCUDA)
    pip("install", *site, "--no-deps", "--no-build-isolation", str(source), LDFLAGS="-Wl,--no-as-needed")
    shutil.rmtree(source)


# ---- the library


def compile_driver(folder: Path, built: Path = BUILT) -> Path:
    """folder/libcuda.so.1, with every kernel of the project, and every other function that PyCUDA links as a stub."""
    from emulator import EMULATION, SOURCES, list_kernels

    listing, own = list_kernels(folder), folder / "libcuda.so.1"
    places = [f"-I{EMULATION}", f"-I{SOURCES}", f"-I{built / 'include'}", f'-DKERNELS_FILE="{listing}"']
    options = [
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-Wno-unused-parameter",
    ]
    subprocess.run(
        ["g++", *options, *places, "-c", str(EMULATION / "driver.cpp"), "-o", str(folder / "driver.o")], check=True
    )

    def functions(kind: str, library: Path) -> set[str]:
        found = subprocess.run(["nm", *kind.split(), str(library)], capture_output=True, text=True, check=True).stdout
        return {line.split()[-1] for line in found.splitlines() if line.split()[-1].startswith("cu")}

    (extension,) = (built / "site" / "pycuda").glob("_driver*.so")
    missing = functions("-D --undefined-only", extension) - functions("--defined-only", folder / "driver.o")
    stubs = folder / "stubs.cpp"
    stubs.write_text(
        "".join(f'extern "C" int {name}() {{ return 801; }}  // not supported\n' for name in sorted(missing))
    )
    link = ["-shared", "-Wl,-soname,libcuda.so.1", str(folder / "driver.o"), str(stubs), "-o", str(own)]
    subprocess.run(["g++", "-fPIC", *link], check=True)
    for source in SOURCES.glob("*.cu"):  # what would hold the compiled kernels; the stand-in has its own
        (folder / f"{source.stem}.fatbin").write_bytes(b"\x50\xed\x55\xba")
    from camrt.kernels.build import sources_hash

    described = {"cuda": "13.0", "architectures": ["8.9"], "sources": sources_hash()}
    (folder / "build.json").write_text(json.dumps(described))
    return own


def environment(folder: Path, order: str = "lazy", seed: int = 0, built: Path = BUILT) -> dict[str, str]:
    """Of a process that runs on the stand-in which `compile_driver` put into `folder`."""
    paths = [str(built / "site"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "STANDIN": str(folder),
        "STANDIN_ORDER": order,
        "STANDIN_SEED": str(seed),
    }


class Control:
    """What the tests say to the stand-in in this process."""

    def __init__(self) -> None:
        self._library = library = ctypes.CDLL("libcuda.so.1")
        library.standin_complaints.restype = ctypes.c_char_p
        library.standin_allocated.restype = library.standin_pending.restype = ctypes.c_size_t
        library.standin_calls.restype = ctypes.c_long

    def order(self, name: str, seed: int = 0) -> None:
        self._library.standin_order(name.encode(), seed)

    def fail(self, function: str, nth: int = 1, code: int = 2) -> None:
        """The nth call of a driver function from now on fails; code 2: out of memory, 719: the launch failed."""
        self._library.standin_fail(function.encode(), ctypes.c_long(nth), code)

    def recover(self) -> None:
        self._library.standin_recover()

    def do_nothing(self, nothing: bool = True) -> None:
        self._library.standin_do_nothing(int(nothing))

    def calls(self, function: str) -> int:
        return self._library.standin_calls(function.encode())

    def memory(self, size: int = 1 << 33) -> None:
        """How many bytes the GPU has."""
        self._library.standin_memory(ctypes.c_size_t(size))

    def allocated(self) -> int:
        return self._library.standin_allocated()

    def pending(self) -> int:
        return self._library.standin_pending()

    def complaints(self) -> list[str]:
        return self._library.standin_complaints().decode().splitlines()


def install() -> Control:
    """Points the kernels' loader at the stand-in's files and sets the order. In a process of `environment` only."""
    from camrt.kernels.gpu import device

    device.BINARIES = Path(os.environ["STANDIN"])
    control = Control()
    control.order(os.environ["STANDIN_ORDER"], int(os.environ["STANDIN_SEED"]))
    return control


# ---- whole explanations


_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
SCRATCH, PIECES = 0xAB, 12  # what an engine leaves in its scratch memory; more pieces of a size than kernels take later


class HostEngine:
    """An engine that runs ONNX Runtime in the stream's order, on the stand-in's memory.

    Its scratch memory is as large as its inputs and outputs are, piece by piece, so that it takes the pool's blocks
    that are free; it spoils all of it.
    """

    def __init__(self, session: Any, gpu: Any) -> None:
        self._session, self._gpu = session, gpu
        self._kept: list[Any] = []  # functions that the stand-in, or a graph, may still call

    def enqueue(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        stream = self._gpu.stream
        arrays = [*inputs.values(), *outputs.values()]
        scratch = [(s.pointer, s.nbytes) for s in [stream.empty(a.shape, a.dtype) for a in arrays * PIECES]]
        places = [{n: (a.dtype.type, a.shape, a.pointer) for n, a in group.items()} for group in (inputs, outputs)]

        def spoil() -> None:
            for pointer, size in scratch:
                ctypes.memset(pointer, SCRATCH, size)

        def work(_: Any) -> None:
            spoil()
            binding = self._session.io_binding()
            for bind, group in zip((binding.bind_input, binding.bind_output), places, strict=True):
                for name, (dtype, shape, pointer) in group.items():
                    bind(name, "cpu", 0, dtype, shape, pointer)
            self._session.run_with_iobinding(binding)
            spoil()

        function = _HostFunction(work)
        self._kept.append(function)
        with stream.device.active("the host's engine"):
            from camrt.kernels.gpu import driver

            driver._call("cuLaunchHostFunc", ctypes.c_void_p(stream.handle), function, None)


class StandinBackend:
    """A backend on the stand-in: captured work, kernels and copies as on a GPU."""

    name = "standin"
    lanes = 1
    prunes = False

    def __init__(self, captures: bool = True) -> None:
        import onnxruntime

        from camrt.kernels.gpu.device import device
        from camrt.runtime.backends.gpu import Gpu

        self.gpu = Gpu(device().stream(), captures=captures)
        self._runtime = onnxruntime

    def __str__(self) -> str:
        return "ONNX Runtime on the stand-in"

    def open(self, bundle: Any, program: Any, concurrent: bool = False) -> Any:
        from camrt.runtime.backends.gpu import GpuProgram

        options = self._runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = self._runtime.InferenceSession(
            str(bundle.file(program)), options, providers=["CPUExecutionProvider"], disabled_optimizers=["Pad_Fusion"]
        )
        return GpuProgram(program, HostEngine(session, self.gpu), self.gpu)


# ---- as a pytest plugin


@pytest.fixture(autouse=True)
def _no_complaints(control: Control) -> Iterator[None]:
    control.complaints()
    yield
    complaints = control.complaints()
    assert not complaints, complaints


@pytest.fixture(scope="session")
def control() -> Control:
    return install()


if __name__ == "__main__":
    try:
        build_pycuda(Path(sys.argv[2]).resolve())
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"standin: {error}")
