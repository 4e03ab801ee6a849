"""The wheel in an environment of its own, without torch and onnx."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from support import ROOT

from camrt.kernels.build import ARCHITECTURES, find_nvcc, sources_hash

IGNORED = shutil.ignore_patterns(".venv", ".git", "build", "*.egg-info", "__pycache__", "*.fatbin", "build.json")
CHECK = """
import importlib.util, sys
import numpy as np
for name in ("torch", "onnx", "onnx_ir", "onnxscript"):
    assert importlib.util.find_spec(name) is None, name
import camrt, camrt.demo.run
assert camrt.__file__.startswith(sys.prefix), camrt.__file__
result = camrt.load(camrt.demo.run.BUNDLE).explain("picture.png", percentile=50)
assert result.maps.shape == (1, 128, 128) and np.isfinite(result.maps).all() and result.maps.max() > 0
assert not {"torch", "onnx"} & set(sys.modules)
try:
    camrt.export_onnx("model.onnx", "model.camrt")
except camrt.CamrtError as error:
    print(error)
"""
SIZES = """
import importlib.metadata, re
pending, sizes = ["camrt"], {}
while pending:
    name = pending.pop()
    if name in sizes:
        continue
    files = [f.locate() for f in importlib.metadata.files(name)]
    sizes[name] = sum(f.stat().st_size for f in files if f.suffix != ".pyc" and f.exists())
    required = [r for r in importlib.metadata.requires(name) or [] if "extra ==" not in r and "platform" not in r]
    pending += [re.match("[A-Za-z0-9._-]+", r)[0].lower() for r in required]
print(*sizes)
print(sum(sizes.values()) / 1e6)
"""
PYCUDA_MB = 6  # with what it needs; it comes as source


def call(*command: str, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_explains_an_image_without_torch_and_onnx(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: a build folder left in the checkout would bring old modules along
    shutil.copytree(ROOT, source, ignore=IGNORED)
    call(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("camrt-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"camrt/kernels/cuda/{f.name}" for f in (ROOT / "kernels" / "cuda").glob("*.cu")}
    binaries = {s.replace(".cu", ".fatbin") for s in sources} | {"camrt/kernels/cuda/build.json"}
    assert sources <= packed
    assert {f"camrt/page/static/{f.name}" for f in (ROOT / "camrt" / "page" / "static").iterdir()} <= packed
    assert binaries & packed == (binaries if find_nvcc() else set())
    if find_nvcc():
        described = json.loads(zipfile.ZipFile(wheel).read("camrt/kernels/cuda/build.json"))
        assert described["architectures"] == list(ARCHITECTURES) and described["sources"] == sources_hash()
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    constraints = str(ROOT / "constraints.txt")
    call(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, f"{wheel}[cpu]", cwd=tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 150, 3), dtype=np.uint8)).save(
        tmp_path / "picture.png"
    )
    advice = f"export needs onnx, onnxscript: pip install 'camrt[export] @ file://{wheel}'"
    assert advice in call(python, "-c", CHECK, cwd=tmp_path)
    names, size = call(python, "-c", SIZES, cwd=tmp_path).splitlines()
    assert {"camrt", "numpy", "pillow", "tqdm"} == set(names.split())
    assert 20 < float(size) < 120 - PYCUDA_MB, "what an edge device needs beside its engine library"
    camrt = str(tmp_path / "env" / "bin" / "camrt")
    assert "demo.png" in call(camrt, "demo", cwd=tmp_path)
    assert (tmp_path / "camrt-demo" / "demo.png").is_file()


def test_a_wheel_without_nvcc_says_that_it_has_no_kernels(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=IGNORED)
    environment = {**os.environ, "PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "camrt: this wheel has no CUDA kernels: no nvcc on the PATH" in done.stderr
    assert not list(tmp_path.glob("lib/**/*.fatbin")) and list(tmp_path.glob("lib/**/mask_batch.cu"))
