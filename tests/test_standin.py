"""The GPU side on the host: PyCUDA, streams, memory, graphs and kernels run on a stand-in for the NVIDIA driver.

standin.py says what it is. Its orders of execution, and defects that are planted here, show what it catches.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import standin
from support import ROOT

if not (standin.BUILT / "site" / "pycuda").is_dir():
    pytest.skip("no PyCUDA for the stand-in: python tests/standin.py build .venv/standin", allow_module_level=True)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in, compiled once for all test processes."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the stand-in for the driver is not tested")
    base = tmp_path_factory.getbasetemp()
    folder = base.parent / "standin" if os.environ.get("PYTEST_XDIST_WORKER") else base / "standin"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "build.json").exists():
            standin.compile_driver(folder)
    return folder


def run(driver: Path, order: str, *arguments: str, package: Path | None = None) -> subprocess.CompletedProcess[str]:
    """pytest on the stand-in. package: a folder with another copy of camrt."""
    variables = standin.environment(driver, order, seed=1)
    if package is not None:
        variables["PYTHONPATH"] = os.pathsep.join([str(package), variables["PYTHONPATH"]])
    for name in [n for n in variables if n.startswith("PYTEST_")]:
        del variables[name]
    options = [
        "-q",
        "-p",
        "standin",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-o",
        "addopts=--import-mode=importlib",
    ]
    command = [sys.executable, "-P", "-m", "pytest", *options, *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("order", standin.ORDERS)
def test_the_gpu_tests_pass(driver: Path, order: str) -> None:
    """Every test in one order; in the others one method of each way through the GPU, in float32."""
    chosen = (
        []
        if order == "lazy"
        else ["-k", "not every_method or winsor_cam-fp32 or score_cam_pp-fp32 or recipro_cam-fp32"]
    )
    done = run(driver, order, "tests/test_gpu.py", *chosen)
    assert done.returncode == 0, done.stdout[-4000:]


def test_failures_of_the_driver(driver: Path) -> None:
    done = run(driver, "random", "tests/standin_failures.py")
    assert done.returncode == 0, done.stdout[-4000:]


class Defect(NamedTuple):
    file: str
    right: str
    wrong: str


DEFECTS = {
    "a busy event is dropped": Defect(
        "kernels/gpu/stream.py", "        block.busy = True\n", ""
    ),
    "a download does not wait": Defect(
        "kernels/gpu/stream.py", "            self.synchronize()\n        # pinned", "        # pinned"
    ),
    "a stream does not wait for another": Defect(
        "kernels/gpu/stream.py", "            self._order(stream, self.handle)", "            pass"
    ),
    "a stream is not held back": Defect(
        "kernels/gpu/stream.py", "            self._order(self.handle, stream)", "            pass"
    ),
    "a graph does not hold its blocks": Defect("kernels/gpu/stream.py", "        self.hold(block)\n", ""),
    "a graph does not hold what it uploads": Defect("kernels/gpu/stream.py", "self.hold((array, block, out))", "pass"),
    "a replayed result is not copied": Defect(
        "runtime/session/explaining.py",
        "replace(data, alphas=memory.copied(data.alphas), maps=memory.copied(data.maps))",
        "data",
    ),
    "an upload reads pageable memory": Defect(
        "kernels/gpu/stream.py", "            if block is None:", "            if False:"
    ),
    "a constant does not live": Defect(
        "kernels/gpu/stream.py", "self._constants[key] = self.upload(array)\n        return self._constants[key]",
        "return self.upload(array)",
    ),
}  # fmt: skip
SHOWN_BY = "pinned or queued or graph or stays"


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(driver: Path, tmp_path: Path, defect: str) -> None:
    """In at least one order of execution."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "camrt", tmp_path / "camrt", ignore=ignored)
    for part in ("export", "runtime", "kernels"):
        shutil.copytree(ROOT / part, tmp_path / "camrt" / part, ignore=ignored)
    file, right, wrong = DEFECTS[defect]
    text = (tmp_path / "camrt" / file).read_text()
    assert text.count(right) == 1
    (tmp_path / "camrt" / file).write_text(text.replace(right, wrong))
    for order in ("lazy", "newest_first", "oldest_first", "random"):
        done = run(driver, order, "-x", "-k", SHOWN_BY, "tests/test_gpu.py", package=tmp_path)
        assert done.returncode in (0, 1), done.stdout[-4000:]
        if done.returncode == 1:
            print(defect, order)
            return
    pytest.fail("no order of execution shows it")


# ---- the script that checks a GPU


def check_gpu(driver: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = standin.environment(driver, "random")
    command = [sys.executable, "benchmarks/gpu.py", str(tmp_path), "--out", str(tmp_path / "gpu.json"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)


def test_the_script_says_right_and_goes_on_where_it_stopped(driver: Path, tmp_path: Path) -> None:
    """No TensorRT and no CUDA provider runs here, and no network was prepared: that is not run, not wrong."""
    done = check_gpu(driver, tmp_path, "--smoke", "--page", str(tmp_path / "page.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "RIGHT: card, kernels"
    assert "explanations: not run: no bundle in the folder" in done.stdout
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("Stand-in, 8 multiprocessors") and "| the kernels load | yes |" in page
    again = check_gpu(driver, tmp_path, "--smoke")
    assert again.stdout.splitlines()[:2] == ["card: done before", "kernels: done before"]


def test_the_script_says_wrong(driver: Path, tmp_path: Path) -> None:
    """And a failure costs one stage; nothing is timed."""
    broken = tmp_path / "driver"
    shutil.copytree(driver, broken)
    (broken / "class_scores.fatbin").write_bytes(b"not a kernel")
    done = check_gpu(broken, tmp_path, "--smoke", "--stages", "kernels", "card", "kernel times")
    assert done.returncode == 1, done.stdout
    lines = done.stdout.splitlines()
    assert (
        lines[0].startswith("kernels: NO: DeviceError: class_scores.fatbin, built by CUDA 13.0")
        and "card: yes" in lines[1]
    )
    assert lines[-2:] == ["kernel times: not timed, because something is wrong", "WRONG: kernels"]
