"""Fixtures: bundles that many tests use, exported once a session."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulator import EmulatedGpu, compile_server
from support import small_net

import camrt
from camrt.kernels import DeviceError
from camrt.kernels.build import build

PREPROCESS = camrt.Preprocess(resize=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
CLASSES = ("ant", "bee", "cat", "dog", "elk")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the small network. Not to be changed: `bundle` is a copy."""
    path = tmp_path_factory.mktemp("bundles") / "small.camrt"
    return camrt.export_model(small_net(), path, (3, 32, 32), name="small", classes=CLASSES, preprocess=PREPROCESS)


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A fresh copy of the small network's bundle, to damage at will."""
    return Path(shutil.copytree(exported, tmp_path / "small.camrt"))


@pytest.fixture(scope="session")
def explainer(exported: Path) -> camrt.Explainer:
    return camrt.load(exported)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedGpu]:
    """The CUDA kernels on the host, compiled once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent / "emulated" if os.environ.get("PYTEST_XDIST_WORKER") else base / "emulated"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server = folder / "server"
        if not server.exists():
            compile_server(folder)
    gpu = EmulatedGpu(server)
    yield gpu
    gpu.close()


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def queue(request: pytest.FixtureRequest) -> Any:
    """A stream that runs the CUDA kernels: on the host everywhere, and on a GPU where there is one."""
    if request.param == "gpu":
        try:
            from camrt.kernels.gpu.device import BINARIES, device

            stream = device().stream()
            if not (BINARIES / "build.json").is_file():
                build()
            return stream
        except DeviceError as error:
            pytest.skip(str(error))
    if shutil.which("g++") is None:
        pytest.skip("no g++: the emulated kernels are not tested")
    gpu = request.getfixturevalue("emulated")
    gpu.order, gpu.shared_limit = 0, EmulatedGpu.shared_limit
    gpu.launched.clear()
    gpu.write(gpu.fault, np.zeros(1, np.int32))
    return gpu
