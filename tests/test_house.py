"""The rules of the house: who may import whom, what is lazy, and clean linters."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import ROOT

import camrt
from camrt import install

PACKAGES = {
    "camrt": ROOT / "camrt",
    "export": ROOT / "export",
    "runtime": ROOT / "runtime",
    "kernels": ROOT / "kernels",
}

# For each part of the house, what it may import of ours, by prefix.
ALLOWED = {
    "camrt/commands": ("",),
    "camrt/cli.py": ("commands", "runtime.errors", "__version__"),
    "camrt/__main__.py": ("cli",),
    "camrt/compiling": ("compiling", "export", "runtime", "kernels", "method_choice", "__version__"),
    "camrt/demo": ("demo", "runtime", "install"),
    "camrt/evaluation": ("evaluation", "method_choice", "runtime", "__version__"),
    "camrt/verification": ("verification", "export", "runtime", "kernels"),
    "camrt/deploy": (
        *("deploy", "compiling.api", "demo", "install", "kernels", "method_choice", "questions", "runtime", "tensors"),
    ),
    "camrt/mapping": ("mapping", "image_files", "install", "kernels", "questions", "runtime", "tensors"),
    "camrt/ray.py": ("mapping.rows", "method_choice", "questions", "runtime", "tensors"),
    "camrt/serve": ("serve", "install", "method_choice", "questions", "runtime", "tensors", "__version__"),
    "camrt/questions.py": ("runtime",),
    "camrt/tensors.py": ("method_choice", "questions", "runtime"),
    "camrt/page": ("page", "compiling", "method_choice", "runtime", "__version__"),
    "camrt/install.py": (),
    "camrt/image_files.py": ("runtime.errors",),
    "camrt/method_choice.py": ("runtime",),
    "camrt/results_folder.py": ("image_files", "runtime.errors"),
    "camrt/explaining.py": ("image_files", "results_folder", "runtime"),
    "camrt/methods.py": ("runtime.cams",),
    "camrt/notebook.py": ("install", "runtime"),
    "camrt/__init__.py": ("compiling.api", "explaining", "export.api", "runtime", "verification.device"),
    "camrt/bench.py": ("install", "verification.distances", "method_choice", "runtime", "kernels"),
    "export": (
        "export",
        "install",
        "runtime.bundle.manifest",
        "runtime.bundle.kinds",
        "runtime.errors",
        "runtime.backends.one_file",
        "__version__",
    ),
    "runtime": ("runtime", "kernels", "install", "__version__"),
    "kernels": ("kernels", "install"),
}
HEAVY = {"onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"} | {
    *("pycuda", "torch", "onnx", "onnx_ir", "onnxscript")
}
HOME_OF_HEAVY = {"onnxruntime": {"runtime/backends/ort.py"}, "pycuda": {"kernels/gpu/device.py"}}


def sources() -> list[tuple[str, Path]]:
    return [(name, file) for name, folder in PACKAGES.items() for file in sorted(folder.rglob("*.py"))]


def own_imports(file: Path) -> list[str]:
    """What a file imports of ours, in whichever form, from the top of the installed package: runtime.errors."""
    place = list(file.relative_to(ROOT).with_suffix("").parts)
    if place[0] == "camrt":
        place = place[1:]
    place = ["camrt", *place]
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = place[: len(place) - node.level] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            names += [".".join([*module, a.name]) for a in node.names]
        elif isinstance(node, ast.Import):
            names += [a.name for a in node.names]
    return [name.removeprefix("camrt.") for name in names if name.startswith("camrt.")]


def absolute_imports(file: Path) -> set[str]:
    """The packages that a file imports, statically or by `import_module("...")`."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names.update(str(a.value).split(".")[0] for a in node.args[:1] if isinstance(a, ast.Constant))
    return names


def rules_of(file: Path) -> tuple[str, ...]:
    place = file.relative_to(ROOT).as_posix()
    return ALLOWED[next(part for part in ALLOWED if place == part or place.startswith(part + "/"))]


@pytest.mark.parametrize("file", [f for _, f in sources()], ids=lambda f: f.relative_to(ROOT).as_posix())
def test_imports_follow_the_house(file: Path) -> None:
    assert not absolute_imports(file) & {"camrt", *PACKAGES}, "import our own relatively"
    for target in own_imports(file):
        assert any(not a or target == a or target.startswith(a + ".") for a in rules_of(file)), (
            f"{file.relative_to(ROOT)} imports {target}: see ALLOWED in tests/test_house.py"
        )


def test_every_form_of_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "runtime" / "cams" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from ... import export, kernels\nfrom ...camrt import bench\nfrom . import base\nfrom ..errors import near\n"
        "import camrt.export.api\ndef f():\n    from camrt import cli\n    importlib.import_module('torch.nn')"
    )
    assert own_imports(file) == [
        *("export", "kernels", "camrt.bench", "runtime.cams.base", "runtime.errors.near", "export.api", "cli")
    ]
    assert absolute_imports(file) == {"camrt", "torch"}


@pytest.mark.parametrize("package", ["runtime", "kernels"])
def test_the_runtime_never_imports_torch_or_onnx(package: str) -> None:
    for file in PACKAGES[package].rglob("*.py"):
        for name in absolute_imports(file) & HEAVY:
            place = str(file.relative_to(ROOT))
            assert place in HOME_OF_HEAVY.get(name, set()), (
                f"{place} imports {name}: only {sorted(HOME_OF_HEAVY.get(name, ()))} may, see HOME_OF_HEAVY in "
                "tests/test_house.py"
            )


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
    loaded = python("import sys, camrt, camrt.cli; camrt.cli.parser(); print(*sys.modules)").split()
    assert not set(loaded) & {*HEAVY, "numpy", "PIL"}, "import what is heavy inside a command's run"


def test_every_command_is_listed() -> None:
    from camrt.cli import COMMANDS

    files = {f.stem for f in (ROOT / "camrt" / "commands").glob("*.py") if "\nHELP = " in f.read_text()}
    assert files == set(COMMANDS), "a command is a file in camrt/commands/ and a name in COMMANDS in camrt/cli.py"


def light_modules() -> list[str]:
    """Every module of the runtime, the kernels and the front door, but for those that build on torch or onnx."""
    behind_api = {file.name for file in (ROOT / "camrt" / "compiling").glob("*.py")} - {"__init__.py", "api.py"}
    heavy = {"verification": {"methods.py", "method_runs.py"}, "compiling": behind_api}
    return [
        ".".join(["camrt", *file.relative_to(folder if name == "camrt" else ROOT).with_suffix("").parts]).removesuffix(
            ".__init__"
        )
        for name, folder in PACKAGES.items()
        if name != "export"
        for file in sorted(folder.rglob("*.py"))
        if file.name != "__main__.py" and file.name not in heavy.get(file.parent.name, ())
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
    assert done.stderr.strip() == f"camrt: export needs {missing}: {install.extra('export')}"


@pytest.mark.parametrize(
    ("package", "arguments", "said"),
    [
        (
            "torch",
            ["export", "torchvision:resnet18", "x.camrt"],
            "export needs torch, which cannot be imported (libx.so",
        ),
        ("onnx", ["export", "x.onnx", "x.camrt"], "export needs onnx, which cannot be imported (libx.so"),
        ("onnxscript", ["verify", "BUNDLE"], "export needs onnxscript, which cannot be imported (libx.so"),
        ("timm", ["export", "timm:resnet18", "x.camrt"], "cannot import 'timm' (libx.so"),
        ("torchvision", ["export", "torchvision:resnet18", "x.camrt"], "cannot import 'torchvision.models' (libx.so"),
        ("onnxruntime", ["explain", "BUNDLE", "x.png"], "it needs onnxruntime, which cannot be imported (libx.so"),
        ("matplotlib", ["bench", "BUNDLE", "--runs=1", "--batches=1", "--seconds=1", "--plot=x.png"], "libx.so"),
        (
            "scipy",
            ["evaluate", "BUNDLE", ".", "--metrics", "insertion"],
            "scipy, which cannot be imported (libx.so",
        ),
        ("PIL", ["explain", "BUNDLE", "x.png"], "a package cannot be imported (libx.so"),
        ("numpy", ["info", "--backends"], "a package cannot be imported (libx.so"),
        ("tqdm", ["explain", "BUNDLE", "x.png"], "a package cannot be imported (libx.so"),
    ],
)
def test_a_broken_package_is_a_line(
    package: str, arguments: list[str], said: str, exported: Path, tmp_path: Path
) -> None:
    """A package that is installed and does not import: its libraries are missing, or fit another package."""
    (tmp_path / "broken" / package).mkdir(parents=True)
    (tmp_path / "broken" / package / "__init__.py").write_text("raise ImportError('libx.so.9: cannot open')")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "x.png")
    command = [sys.executable, "-m", "camrt", *(str(exported) if a == "BUNDLE" else a for a in arguments)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "broken"), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said in done.stderr.strip().splitlines()[-1]


def test_a_missing_backend_is_named(exported: Path) -> None:
    code = (
        "import sys\nsys.modules['onnxruntime'] = None\nimport camrt\n"
        f"for name in ('onnxruntime', 'auto'):\n"
        f"    try: camrt.load({str(exported)!r}, name)\n    except camrt.CamrtError as error: print(error)"
    )
    named, auto = python(code).splitlines()
    assert named == f"it needs onnxruntime: {install.extra('cpu')}"
    assert auto.startswith("no backend can be used here; tensorrt: ")
    assert f"onnxruntime: it needs onnxruntime: {install.extra('cpu')}" in auto
    with pytest.raises(camrt.CamrtError, match="no backend 'cuda9': use 'auto', 'tensorrt', 'onnxruntime-cuda', 'onnx"):
        camrt.load(exported, backend="cuda9")


@pytest.mark.parametrize(
    ("recorded", "advice"),
    [
        (None, "pip install 'camrt[cpu]'"),
        ({"url": "file:///home/me/my%20camrt", "dir_info": {}}, "pip install '/home/me/my camrt[cpu]'"),
        ({"url": "file:///home/me/camrt", "dir_info": {"editable": True}}, "pip install -e '/home/me/camrt[cpu]'"),
        (
            {"url": "file:///home/me/camrt-0.1.0-py3-none-any.whl", "archive_info": {}},
            "pip install 'camrt[cpu] @ file:///home/me/camrt-0.1.0-py3-none-any.whl'",
        ),
        (
            {"url": "https://host/camrt.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            "pip install 'camrt[cpu] @ git+https://host/camrt.git'",
        ),
    ],
    ids=["index", "folder", "editable", "wheel", "repository"],
)
def test_advice_to_install_names_where_camrt_came_from(
    recorded: dict | None, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "camrt-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: camrt\nVersion: 0.1.0\n")
    if recorded is not None:
        (folder / "direct_url.json").write_text(json.dumps(recorded))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert install.extra("cpu") == advice


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
    with pytest.raises(ValueError, match="use LayerMaps, SignedMaps"):
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
