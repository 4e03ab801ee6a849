"""The rules of the house: who may import whom, what is lazy, and clean linters."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support import ROOT

import camrt

PACKAGES = {
    "camrt": ROOT / "camrt",
    "export": ROOT / "export",
    "runtime": ROOT / "runtime",
    "kernels": ROOT / "kernels",
}

# For each package, what it may import of ours, by prefix.
ALLOWED = {
    "camrt": ("camrt", "export", "runtime", "kernels"),
    "export": (
        "export",
        "runtime.bundle.manifest",
        "runtime.bundle.kinds",
        "runtime.errors",
        "runtime.backends.one_file",
    ),
    "runtime": ("runtime", "kernels"),
    "kernels": ("kernels",),
}
HEAVY = {"onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"} | {
    *("pycuda", "torch", "onnx", "onnx_ir", "onnxscript")
}
HOME_OF_HEAVY = {"onnxruntime": {"runtime/backends/ort.py"}, "pycuda": {"kernels/gpu/device.py"}}


def sources() -> list[tuple[str, Path]]:
    return [(name, file) for name, folder in PACKAGES.items() for file in sorted(folder.rglob("*.py"))]


def own_imports(package: str, file: Path) -> list[str]:
    """Relative imports of a file, as paths from the repository's root: runtime.errors."""
    place = list(file.relative_to(ROOT).with_suffix("").parts)
    if package == "camrt":
        place = place[1:] if len(place) > 1 else place
        place = ["", *place]
    else:
        place = ["", *place]
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = place[: len(place) - node.level]
            found.append(".".join([*base[1:], *([node.module] if node.module else [a.name for a in node.names][:1])]))
    return found


def absolute_imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("package", "file"), sources(), ids=lambda v: str(v.relative_to(ROOT)) if isinstance(v, Path) else ""
)
def test_imports_follow_the_house(package: str, file: Path) -> None:
    assert not absolute_imports(file) & {"camrt", *PACKAGES}, "import our own relatively"
    if package != "camrt":  # the front door may import everything
        for target in own_imports(package, file):
            assert any(target == a or target.startswith(a + ".") for a in ALLOWED[package]), target


@pytest.mark.parametrize("package", ["runtime", "kernels"])
def test_the_runtime_never_imports_torch_or_onnx(package: str) -> None:
    for file in PACKAGES[package].rglob("*.py"):
        for name in absolute_imports(file) & HEAVY:
            assert str(file.relative_to(ROOT)) in HOME_OF_HEAVY.get(name, set()), (file, name)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_camrt_is_quick_and_light() -> None:
    best = min(
        float(python("import time; t = time.perf_counter(); import camrt; print(time.perf_counter() - t)"))
        for _ in range(5)
    )
    assert best < 0.2
    loaded = python("import sys, camrt, camrt.cli; print(*sys.modules)").split()
    assert not set(loaded) & {*HEAVY, "numpy", "PIL"}


def light_modules() -> list[str]:
    """Every module of the runtime, the kernels and the front door, but for the references in PyTorch."""
    references = {"methods.py", "method_runs.py"}
    return [
        ".".join(["camrt", *file.relative_to(folder if name == "camrt" else ROOT).with_suffix("").parts]).removesuffix(
            ".__init__"
        )
        for name, folder in PACKAGES.items()
        if name != "export"
        for file in sorted(folder.rglob("*.py"))
        if file.name != "__main__.py" and not (file.parent.name == "verification" and file.name in references)
    ]


def test_the_runtime_lives_without_the_heavy_packages() -> None:
    modules = light_modules()
    assert "camrt.runtime.backends.ort" in modules and "camrt.demo.run" in modules
    python(
        f"import sys, importlib\nfor name in {sorted(HEAVY)!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)"
    )


def test_no_module_needs_what_only_linux_has() -> None:
    python(
        "import sys, importlib, numpy, PIL.Image, tqdm, concurrent.futures, tempfile\n"
        "for name in ('fcntl', 'pwd', 'grp', 'resource', 'termios'): sys.modules[name] = None\n"
        f"for name in {light_modules()!r}: importlib.import_module(name)"
    )


@pytest.mark.parametrize("missing", ["torch", "onnx", "onnxscript"])
def test_a_missing_extra_is_named(missing: str, tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util as u\nfind = u.find_spec\n"
        f"u.find_spec = lambda n, *a: None if n == {missing!r} else find(n, *a)\n"
        "from camrt.cli import main\n"
        f"sys.exit(main(['export', 'torchvision:resnet18', {str(tmp_path / 'x.camrt')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == f"camrt: export needs {missing}: pip install 'camrt[export]'"


def test_a_missing_backend_is_named(exported: Path) -> None:
    code = (
        "import sys\nsys.modules['onnxruntime'] = None\nimport camrt\n"
        f"for name in ('onnxruntime', 'auto'):\n"
        f"    try: camrt.load({str(exported)!r}, name)\n    except camrt.CamrtError as error: print(error)"
    )
    named, auto = python(code).splitlines()
    assert named == "onnxruntime is not installed: pip install 'camrt[cpu]'"
    assert auto.startswith("no backend can be used here; tensorrt: ")
    assert auto.endswith("onnxruntime: onnxruntime is not installed: pip install 'camrt[cpu]'")
    with pytest.raises(camrt.CamrtError, match="no backend 'cuda9': use 'auto', 'tensorrt', 'onnxruntime-cuda', 'onnx"):
        camrt.load(exported, backend="cuda9")


def test_every_package_is_installed() -> None:
    """A new folder of modules must be listed in pyproject.toml, or wheels lack it."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {f.parent.relative_to(ROOT).as_posix() for _, f in sources()}
    assert set(tool["package-dir"].values()) == folders
    assert set(tool["package-dir"]) == set(tool["packages"])


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == camrt.__version__


def test_a_second_method_of_a_name_is_refused() -> None:
    from camrt.runtime.cams import Gradients, LayerMaps, cam

    with pytest.raises(ValueError, match="registered already"):
        cam("grad_cam", needs=LayerMaps, layers="last", source="none")(lambda layers: layers)
    with pytest.raises(ValueError, match="use LayerMaps, Gradients"):
        cam("new", needs=str, layers="last", source="none")(lambda layers: layers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="new: on_gpu, but Gradients lies on the host"):
        cam("new", needs=Gradients, layers="last", source="none", on_gpu=True)(lambda layers: layers)


def test_ruff_is_clean() -> None:
    for arguments in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *arguments, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_pyright_is_clean(tmp_path: Path) -> None:
    """On the tree as it is installed: camrt/export, camrt/runtime, camrt/kernels."""
    ignored = shutil.ignore_patterns("__pycache__", "*.camrt")
    shutil.copytree(ROOT / "camrt", tmp_path / "camrt", ignore=ignored)
    for name in ("export", "runtime", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / "camrt" / name, ignore=ignored)
    for name in ("tests", "benchmarks", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
