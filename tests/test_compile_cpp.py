"""examples/one_file.cpp: a compiled file without Python. Needs g++ and ONNX Runtime's headers, else it is skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from support import ROOT

import camrt
from camrt.export.probes import smooth_images

HEADERS = [Path(p) for p in (os.environ.get("ONNXRUNTIME_INCLUDE"), "/usr/include/onnxruntime", "/usr/include") if p]
HEADERS = [p for p in HEADERS if (p / "onnxruntime_cxx_api.h").is_file()]
pytestmark = pytest.mark.skipif(
    not HEADERS or shutil.which("g++") is None,
    reason="g++ or onnxruntime_cxx_api.h is missing: Debian 13 has it in libonnxruntime-dev (make system), or name its "
    "folder in ONNXRUNTIME_INCLUDE",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linked with the library of the Python package."""
    folder = tmp_path_factory.mktemp("cpp")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1.*")
    (folder / "libonnxruntime.so.1").symlink_to(library)
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", str(HEADERS[0])]
    command += [
        str(ROOT / "examples" / "one_file.cpp"),
        f"-L{folder}",
        f"-Wl,-rpath,{folder}",
        "-l:libonnxruntime.so.1",
    ]
    done = subprocess.run([*command, "-o", str(folder / "one_file")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "one_file"


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True)


def test_the_map_is_that_of_python(program: Path, exported: Path, tmp_path: Path) -> None:
    path, image = camrt.compile(exported, tmp_path / "m.onnx"), smooth_images((3, 32, 32), 1)
    image.tofile(tmp_path / "image.f32")
    explainer = camrt.load(exported)
    for target, percentile in ((-1, 90), (3, 50)):
        done = run(program, path, tmp_path / "image.f32", target, percentile, tmp_path / "map.npy")
        assert done.returncode == 0, done.stderr
        result = explainer.explain(image, target=None if target < 0 else target, percentile=percentile)
        assert result.target is not None and done.stdout == f"class {result.target[0]}\n"
        np.testing.assert_allclose(np.load(tmp_path / "map.npy"), result.maps[0], atol=1e-5)


def test_errors_are_one_line(program: Path, exported: Path, tmp_path: Path) -> None:
    path, image = camrt.compile(exported, tmp_path / "m.onnx"), tmp_path / "image.f32"
    smooth_images((3, 32, 32), 1).tofile(image)
    short = tmp_path / "short.f32"
    short.write_bytes(image.read_bytes()[:-4])
    out = tmp_path / "map.npy"
    for arguments, message in (
        ((path, short, -1, 90, out), "the network takes 3072 float32 numbers"),
        ((path, tmp_path / "none", -1, 90, out), "cannot be opened"),
        ((tmp_path / "none.onnx", image, -1, 90, out), "none.onnx"),
        ((path, image, 5, 90, out), "class 5: there are 5"),
        ((path, image, "x", 90, out), "one_file: "),
        ((camrt.compile(exported, tmp_path / "g.onnx", "grad_cam"), image, 0, 90, out), "takes other inputs"),
    ):
        done = run(program, *arguments)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not out.exists()
