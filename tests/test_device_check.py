"""`camrt check`: a bundle's references, and what a device gives beside them."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PREPROCESS
from emulator import EmulatedGpu
from support import small_net
from torch import nn

import camrt
from camrt.cli import main
from camrt.commands import build
from camrt.export.probes import smooth_images
from camrt.runtime.backends import BACKENDS, Backend, BackendRow, create
from camrt.runtime.bundle.kinds import Kind
from camrt.runtime.bundle.manifest import Program
from camrt.runtime.bundle.reading import Bundle, read_bundle, write_manifest
from camrt.runtime.cams import METHODS
from camrt.runtime.errors import EngineError
from camrt.runtime.explainer import Explainer
from camrt.verification.device import measure
from camrt.verification.device.check import DeviceReport, check_on
from camrt.verification.device.references import SUMS, read_references, sampled, signed_sums
from camrt.verification.interpreted import InterpretedBackend


@pytest.fixture(scope="module")
def referenced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with references, in both precisions. Not to be changed: `copy` is a copy."""
    path = tmp_path_factory.mktemp("check") / "small.camrt"
    camrt.export_model(small_net(), path, (3, 32, 32), precision=["fp32", "fp16"], preprocess=PREPROCESS)
    camrt.add_references(path)
    return path


@pytest.fixture
def copy(referenced: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(referenced, tmp_path / "copy.camrt"))


class Spoiled:
    """A backend with a defect. spoil: (program, outputs of a run) -> what the device gives instead."""

    name, lanes, prunes, gpu = "spoiled", 1, False, None

    def __init__(self, spoil: Callable[[Program, dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
        self._engine, self._spoil = create("onnxruntime"), spoil

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> Any:
        executable, spoil = self._engine.open(bundle, program, concurrent), self._spoil

        class Executable:
            def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
                return spoil(program, executable.run(feeds))

        return Executable()


def report_of(path: Path, backend: Backend, precisions: tuple[str, ...] = ("fp32",)) -> DeviceReport:
    bundle = read_bundle(path)
    return check_on(bundle, read_references(bundle), backend, precisions)


def failed(report: DeviceReport) -> set[tuple[str, str]]:
    """(program, first word of what was compared) of the rows that failed."""
    assert not report.passed
    return {(row.program, row.subject.split()[0].rstrip(",")) for row in report.rows if not row.passed}


def test_every_program_and_method_is_compared(referenced: Path) -> None:
    report = camrt.check(referenced)
    assert report.passed and report.engine == str(create())
    manifest = read_bundle(referenced).manifest
    assert {p.file for p in manifest.programs} <= {row.program for row in report.rows}
    for label in ("methods", "methods fp16"):
        assert {row.subject.split()[0] for row in report.rows if row.program == label} >= set(METHODS), (
            "a new method needs its references in camrt/verification/device/measure.py"
        )
    exact = [row for row in report.rows if row.program != "methods fp16" and row.limit > 0]
    assert len(exact) > 70 and max(row.distance / row.limit for row in exact) < 0.5  # of 1e-5 and 1e-3


def scaled(kind: str, outputs: str, by: float = 1e-3) -> Any:
    """A program's outputs with one number of the largest changed by a part."""

    def spoil(program: Program, out: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name in out if program.kind == kind else ():
            if name.startswith(outputs):
                out[name] = out[name].copy()
                out[name].flat[np.abs(out[name]).argmax()] *= 1 + by
        return out

    return Spoiled(spoil)


@pytest.mark.parametrize(
    ("kind", "outputs", "row"),
    [
        ("classify", "logits", ("classify.onnx", "logits")),
        ("activations", "activation", ("activations.onnx", "activation")),
        ("gradients", "gradient", ("gradients.onnx", "gradient")),
        ("layer_maps", "alphas", ("layer_maps.onnx", "alphas")),
        ("layer_maps", "maps", ("layer_maps.onnx", "maps")),
        ("signed_maps", "maps", ("signed_maps.onnx", "signed_maps")),
        ("signed_maps", "magnitudes", ("signed_maps.onnx", "magnitudes")),
        ("trunk", "activation", ("trunk.onnx", "activation")),
        ("head", "logits", ("head.onnx", "logits")),
    ],
)
def test_one_wrong_number_is_seen(kind: str, outputs: str, row: tuple[str, str], referenced: Path) -> None:
    assert row in failed(report_of(referenced, scaled(kind, outputs)))


@pytest.mark.parametrize("kind", ["classify", "gradients", "layer_maps", "signed_maps", "full_grad", "head", "masked"])
def test_a_wrong_output_is_seen_in_float16(kind: str, referenced: Path) -> None:
    """Each one with the other sign, also those that no method reads."""
    bundle = read_bundle(referenced)
    for program in (p for p in bundle.manifest.programs if p.kind == kind and p.precision == "float16"):
        for name in program.outputs:

            def wrong(p: Program, out: dict[str, np.ndarray], program: Program = program, name: str = name) -> Any:
                if p.file != program.file:
                    return out
                return out | {name: 1 - out[name] if name.startswith("grid:") else -out[name]}

            assert not report_of(referenced, Spoiled(wrong), ("fp16",)).passed, (program.file, name)


def test_a_wrong_map_is_seen_in_every_method(referenced: Path) -> None:
    """All outputs but the logits are mirrored."""

    def spoil(program: Program, out: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n: a if n == "logits" else np.ascontiguousarray(np.flip(a, axis=-1)) for n, a in out.items()}

    for precision, label in (("fp32", "methods"), ("fp16", "methods fp16")):
        subjects = {s for program, s in failed(report_of(referenced, Spoiled(spoil), (precision,))) if program == label}
        # of Recipro-CAM and Ablation-CAM the trunk's activation is flipped, and they see another network
        assert subjects >= set(METHODS)


def test_what_cannot_run_fails_alone(referenced: Path) -> None:
    def spoil(program: Program, out: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if program.kind == "head":
            raise EngineError("head.onnx: the engine could not be run")
        if program.kind == "full_grad":
            return {name: np.full_like(array, np.nan) for name, array in out.items()}
        return out

    report = report_of(referenced, Spoiled(spoil))
    found = failed(report)
    assert {program for program, _ in found} == {"head.onnx", "full_grad.onnx", "methods"}
    assert {s for program, s in found if program == "methods"} == {"ablation_cam", "recipro_cam", "full_grad"}
    assert any("the engine could not be run" in row.problem for row in report.rows)
    assert any(row.problem == "NaN or infinity in logits" for row in report.rows)


def test_another_top_class_is_seen_in_float16(referenced: Path) -> None:
    def spoil(program: Program, out: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return out | ({"logits": -out["logits"]} if program.kind == "classify" else {})

    assert ("methods fp16", "top") in failed(report_of(referenced, Spoiled(spoil), ("fp16",)))


def test_finer_cam_compares_by_float32_logits(referenced: Path) -> None:
    """In float16, close scores of the classify program may change places."""

    def spoil(program: Program, out: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        reverse = program.kind == "classify" and program.precision == "float16"
        return out | ({"logits": out["logits"][:, ::-1].copy()} if reverse else {})

    found = failed(report_of(referenced, Spoiled(spoil), ("fp16",)))
    assert ("methods fp16", "top") in found and ("methods fp16", "finer_cam") not in found


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: the GPU pipeline is not tested")
def test_on_a_gpu(referenced: Path, emulated: EmulatedGpu) -> None:
    from test_pipeline import EmulatedBackend

    report = report_of(referenced, EmulatedBackend(emulated))
    assert report.passed, [row for row in report.rows if not row.passed]
    assert any(row.program == "preprocessing" and row.distance == 0 for row in report.rows)
    bundle = read_bundle(referenced)
    broken = EmulatedBackend(emulated, broken=True)
    report = check_on(bundle, read_references(bundle), broken, ["fp32"], ["layer_maps.onnx"])
    assert {row.problem for row in report.rows if row.program != "preprocessing"} == {
        "cuLaunchKernel failed: unspecified launch failure"
    }


def test_another_activation_changes_no_reference(copy: Path) -> None:
    """Recipro-CAM's and Score-CAM's maps depend on it."""
    assert main(["recipe", str(copy), "--activation", "sigmoid"]) == 0
    assert camrt.check(copy).passed


def test_a_method_that_refuses_leaves_the_others(tmp_path: Path) -> None:
    """Where one class is certain, Finer-CAM has nothing to compare; of a constant map there is no reference."""
    model = small_net()
    model.fc.weight.data *= 1e5  # type: ignore[operator, union-attr]
    camrt.export_model(model, tmp_path / "certain", (3, 32, 32))
    camrt.add_references(tmp_path / "certain")
    report = camrt.check(tmp_path / "certain")
    assert report.passed and "grad_cam" in {row.subject for row in report.rows}
    model = small_net()
    model.fc.weight.data.zero_()  # type: ignore[operator, union-attr]
    camrt.export_model(model, tmp_path / "zero", (3, 32, 32), precision=["fp32", "fp16"])
    camrt.add_references(tmp_path / "zero")
    assert camrt.check(tmp_path / "zero").passed


def test_a_bundle_that_changes_meanwhile_is_left_alone(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    references = read_references(read_bundle(copy))
    other = replace(read_bundle(copy).manifest, name="other", references=None)

    def replaced(*_: Any) -> Any:
        write_manifest(copy, other)
        return references

    monkeypatch.setattr(measure, "measured", replaced)
    before = sorted(file.name for file in copy.iterdir())
    with pytest.raises(camrt.CamrtError, match="was changed meanwhile"):
        camrt.add_references(copy)
    assert read_bundle(copy).manifest == other and sorted(file.name for file in copy.iterdir()) == before


def test_an_export_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        camrt.export_model(small_net(), tmp_path / "x", (3, 32, 32), complete=camrt.store_references)
    assert not list(tmp_path.iterdir())


def test_a_bundle_in_float16_alone(tmp_path: Path) -> None:
    camrt.export_model(small_net(), tmp_path / "half", (3, 32, 32), precision="fp16")
    camrt.add_references(tmp_path / "half")
    report = camrt.check(tmp_path / "half")
    assert report.passed and {row.program for row in report.rows} >= {"activations.onnx", "methods fp16"}


def test_some_programs_alone(referenced: Path) -> None:
    """As `camrt build` checks what it built: only methods that need no other program."""
    report = camrt.check(referenced, precisions=["fp32"], programs=["layer_maps.last.onnx"])
    assert {row.program for row in report.rows} == {"layer_maps.last.onnx", "methods"}
    assert {row.subject for row in report.rows if row.program == "methods"} == {"grad_cam"}
    with pytest.raises(camrt.CamrtError, match=r"has no program 'head\.last\.onnx'"):
        camrt.check(referenced, programs=["head.last.onnx"])
    with pytest.raises(camrt.CamrtError, match="nothing to check with these programs"):
        camrt.check(referenced, precisions=["fp32"], programs=["head.fp16.onnx"])


def test_the_command(copy: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", str(copy), "--precision", "fp32"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(str(create())) and "winsor_cam" in out and "FAIL" not in out
    assert "comparisons passed in" in out.splitlines()[-1]
    with np.load(copy / "references.npz") as file:
        arrays = dict(file)
    arrays["logits"] = arrays["logits"] * 1.001
    stored(copy, arrays)
    assert main(["check", str(copy), "--precision", "fp32", "--all"]) == 1
    assert "FAIL classify.onnx" in capsys.readouterr().out


def stored(path: Path, arrays: dict[str, Any]) -> None:
    """Stores other references, with their hash."""
    np.savez_compressed(path / "references.npz", **arrays)
    digest = hashlib.sha256((path / "references.npz").read_bytes()).hexdigest()
    manifest = read_bundle(path).manifest
    write_manifest(path, replace(manifest, references={"file": "references.npz", "sha256": digest}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixels", np.zeros((2, 3, 31, 32), np.uint8)),
        ("pixels", np.zeros((0, 3, 32, 32), np.uint8)),
        ("seeds", np.zeros((2, 5), np.float64)),
        ("sums alphas", np.zeros((4, 2, 63), np.float32)),
        ("limits logits", np.zeros(3)),
        ("limits activation", np.zeros(4)),
        ("cases", np.array("[]")),
        ("sums maps", np.full((4, 2, 64), np.nan, np.float32)),
        (
            "cases",
            np.array('[{"method": "grad_cam", "options": {}, "layers": 5, "retune": null, "images": 2, "limits": {}}]'),
        ),
        ("cases", np.array("[")),
        ("cases", np.array('[{"method": "grad_cam"}]')),
        ("cases", np.array("[" * 100000)),
        ("pixels", np.array([{}], object)),
        ("other", np.zeros(1 << 29, np.uint8)),
    ],
    ids=range(14),
)
def test_references_that_do_not_fit_are_refused(
    name: str, value: np.ndarray, copy: Path, capsys: pytest.CaptureFixture
) -> None:
    with np.load(copy / "references.npz") as file:
        arrays = dict(file) | {name: value}
    stored(copy, arrays)
    assert main(["check", str(copy)]) == 2
    error = capsys.readouterr().err
    assert "references.npz: damaged (" in error and error.count("\n") == 1


def test_a_damaged_or_missing_file_is_a_line(copy: Path, bundle: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", str(bundle)]) == 2
    assert "has no references to compare with: they come with 'camrt export'" in capsys.readouterr().err
    file = copy / "references.npz"
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["check", str(copy)]) == 2
    assert "its contents are not what was exported" in capsys.readouterr().err
    assert main(["info", str(copy)]) == 0  # everything else works
    file.unlink()
    os.mkfifo(file)  # reading it would never end
    assert main(["check", str(copy)]) == 2
    file.unlink()
    assert main(["check", str(copy)]) == 2
    assert "references.npz: damaged (it is not there)" in capsys.readouterr().err.splitlines()[-1]


def test_cases_that_this_camrt_cannot_run_fail(copy: Path) -> None:
    with np.load(copy / "references.npz") as file:
        arrays = dict(file)
    cases = json.loads(str(arrays["cases"]))
    cases[0]["options"] = {"unknown": 1}
    arrays["cases"] = np.array(json.dumps(cases))
    stored(copy, arrays)
    report = camrt.check(copy, precisions=["fp32"])
    assert [row.problem.startswith("winsor_cam has no option 'unknown'") for row in report.rows if not row.passed]


def test_without_pytorch_and_onnx(referenced: Path) -> None:
    code = (
        "import sys\nfor name in ('torch', 'onnx', 'onnx_ir', 'onnxscript'): sys.modules[name] = None\n"
        f"from camrt.cli import main; sys.exit(main(['check', {str(referenced)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_export_stores_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import torch

    file = tmp_path / "x.onnx"
    torch.onnx.export(small_net(), (torch.zeros(1, 3, 32, 32),), file, dynamo=True, verbose=False)
    arguments = ["export", str(file), str(tmp_path / "x.camrt"), "--force"]
    assert main(arguments) == 0 and main(["check", str(tmp_path / "x.camrt")]) == 0
    assert main([*arguments, "--no-check"]) == 0
    assert read_bundle(tmp_path / "x.camrt").manifest.references is None
    assert not (tmp_path / "x.camrt" / "references.npz").exists()

    def unknown(*_: Any) -> None:
        raise camrt.CamrtError("verification does not know the operator Foo (node 'x')")

    monkeypatch.setattr(measure, "measured", unknown)
    capsys.readouterr()
    assert main(arguments) == 0  # the bundle is complete without them
    assert "has no references for 'camrt check': verification does not know the operator" in capsys.readouterr().err
    assert camrt.load(tmp_path / "x.camrt").manifest.references is None


def test_export_from_onnx_without_pytorch_warns(tmp_path: Path) -> None:
    import torch

    file = tmp_path / "x.onnx"
    torch.onnx.export(small_net(), (torch.zeros(1, 3, 32, 32),), file, dynamo=True, verbose=False)
    code = (
        "import sys, importlib.util as u\nfind = u.find_spec\nsys.modules['torch'] = None\n"
        "u.find_spec = lambda n, *a: None if n == 'torch' else find(n, *a)\n"
        f"from camrt.cli import main; sys.exit(main(['export', {str(file)!r}, {str(tmp_path / 'x.camrt')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "has no references for 'camrt check': export needs torch" in done.stderr
    assert camrt.load(tmp_path / "x.camrt").manifest.references is None


def test_build_ends_with_the_check(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The part of `camrt build` that follows the building, with another engine."""
    monkeypatch.setitem(BACKENDS, "tensorrt", BackendRow("ort", "create", False))
    options = argparse.Namespace(precision="fp32", max_batch=16, mask_batch=None)
    bundle = read_bundle(copy)
    programs = [p for p in bundle.manifest.programs if p.kind in ("classify", "layer_maps")]
    assert build.check_built(bundle, programs, options) == 0
    out = capsys.readouterr().out
    assert "winsor_cam" in out and "score_cam" not in out and "comparisons passed" in out
    write_manifest(copy, replace(bundle.manifest, references=None))
    assert build.check_built(read_bundle(copy), programs, options) == 0
    assert "were not checked: the bundle has no references" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [19, 22, 52])
def test_gradients_that_cancel_are_not_held_against_a_right_program(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(900, 4)).eval()
    path = camrt.export_model(model, tmp_path / "one.camrt", (3, 32, 32), complete=camrt.store_references)
    report = camrt.check(path)
    assert report.passed, [row for row in report.rows if not row.passed]
    assert max(row.limit for row in report.rows if "alphas" in row.subject) < 1e-3


def test_a_network_without_a_map_gets_no_references(tmp_path: Path) -> None:
    first = nn.Conv2d(3, 4, 3, bias=True)
    nn.init.zeros_(first.weight)
    nn.init.constant_(first.bias, 0.5)  # type: ignore[arg-type]
    model = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    with pytest.raises(camrt.CamrtError, match="every method's map is constant"):
        camrt.export_model(model, tmp_path / "even.camrt", (3, 32, 32), complete=camrt.store_references)
    path = camrt.export_model(model, tmp_path / "even.camrt", (3, 32, 32))
    with pytest.raises(camrt.CamrtError, match="has no references"):
        camrt.check(path)


def test_a_wrong_int8_program_is_seen_in_large_batches(tmp_path: Path) -> None:
    path = tmp_path / "eight.camrt"
    options: dict[str, Any] = {"precision": "int8", "complete": camrt.store_references}
    camrt.export_model(small_net(), path, (3, 32, 32), calibration=smooth_images((3, 32, 32), 12), **options)

    def rolled(program: Program, out: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        wrong = program.precision == "int8" and len(out["logits"]) > 4
        return {"logits": np.roll(out["logits"], 1, axis=0)} if wrong else out

    assert report_of(path, create("onnxruntime"), ("int8",)).passed
    assert ("masked.int8.onnx", "logits") in failed(report_of(path, Spoiled(rolled), ("int8",)))


def of_size(factor: float) -> nn.Module:
    """A network whose second convolution gives numbers that are so small, or so large, that float16 loses them."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
    with torch.no_grad():
        second.weight *= factor
        assert second.bias is not None
        second.bias *= factor
    layers = first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, bias=False)
    return nn.Sequential(*layers).eval()


def test_a_network_that_float16_loses_is_told_at_export_and_fails(tmp_path: Path) -> None:
    path = tmp_path / "small.camrt"
    options: dict[str, Any] = {"precision": ["fp32", "fp16"], "complete": camrt.store_references}
    with pytest.warns(UserWarning) as told:
        camrt.export_model(of_size(1e-9), path, (3, 32, 32), **options)
    said = [str(w.message) for w in told]
    assert any("only zeros for an ordinary image, whose numbers are too small for float16: use fp32" in s for s in said)
    assert any(s.startswith("rounding alone moves the ") and s.endswith("use fp32") for s in said), said
    assert camrt.check(path, precisions="fp32").passed
    report = camrt.check(path, precisions="fp16")
    assert not report.passed and max(row.limit for row in report.rows if row.program.endswith("fp16.onnx")) == 0.9


def test_a_network_that_overflows_in_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(camrt.CamrtError, match=r"fp16.onnx: .* too large for float16: export in fp32"):
        camrt.export_model(of_size(1e7), tmp_path / "large.camrt", (3, 32, 32), precision=["fp32", "fp16"])
    camrt.export_model(of_size(1e7), tmp_path / "large.camrt", (3, 32, 32))


def test_scores_are_not_rounded_to_float16(referenced: Path) -> None:
    """Behind the last product: Recipro-CAM, which compares scores of near places, stays within its limit then."""
    explainer = Explainer(read_bundle(referenced), InterpretedBackend(rounding=True), precision="fp16")
    logits = explainer.session.open(explainer.session.program(Kind.CLASSIFY)).run(
        {"image": smooth_images((3, 32, 32), 3)}
    )["logits"]
    assert (logits != logits.astype(np.float16)).mean() > 0.9
    rows = [r for r in camrt.check(referenced, precisions="fp16").rows if r.subject.startswith("recipro_cam")]
    assert rows and all(row.distance < 1e-3 for row in rows)


def test_signed_sums_keep_distances() -> None:
    rng = np.random.default_rng(0)
    for shape in ((3, 8, 14, 14), (3, 5000), (3, 7)):
        a = rng.standard_normal(shape)
        near = a + 1e-5 * rng.standard_normal(shape)
        sums = signed_sums(a)
        assert sums.shape == (3, SUMS)
        whole = np.linalg.norm((near - a).reshape(3, -1), axis=1)
        np.testing.assert_allclose(np.linalg.norm(signed_sums(near) - sums, axis=1), whole, rtol=0.4)
        one = a.copy()
        one.reshape(3, -1)[:, 5] += 1  # no single number is lost
        np.testing.assert_allclose(np.linalg.norm(signed_sums(one) - sums, axis=1), 1, rtol=1e-9)


def test_score_cams_references_in_float32_are_exact_enough(referenced: Path) -> None:
    """The only references that are not of float64."""
    from camrt.runtime.explainer import Explainer
    from camrt.verification.interpreted import InterpretedBackend

    bundle = read_bundle(referenced)
    references = read_references(bundle)
    precise = Explainer(bundle, InterpretedBackend(precise=True), precision="fp32")
    found = [case for case in references.cases if case.method.startswith("score_cam")]
    assert len(found) == 2
    for case in found:
        maps = precise.explain(
            references.images[:1], case.method, references.seeds[:1], case.layers, **case.options
        ).maps
        assert np.abs(sampled(maps)[0] - case.samples).max() < 1e-5
