"""Programs that score masked images in less than float32: float16 on a GPU, int8 everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import PREPROCESS
from emulator import EmulatedGpu
from PIL import Image
from support import small_net
from torch import nn

import camrt
from camrt.cli import main
from camrt.export.probes import smooth_images
from camrt.kernels import minmax
from camrt.runtime.bundle.reading import read_bundle
from camrt.runtime.explainer import Explainer
from camrt.verification.distances import cosine_distance
from camrt.verification.interpreted import InterpretedBackend

IMAGES = smooth_images((3, 32, 32), 3)
CALIBRATION = smooth_images((3, 32, 32), 12, seed=3)


class Normalizing(nn.Module):
    """A network that normalises its own image, which masks multiply behind that."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network((x - 0.1) / 1.2)


@pytest.fixture(scope="module", params=[small_net, Normalizing], ids=["plain", "normalizing"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("masked") / "small.camrt"
    precisions, model = ["fp32", "fp16", "int8"], request.param().eval()
    camrt.export_model(model, folder, (3, 32, 32), precision=precisions, calibration=CALIBRATION, preprocess=PREPROCESS)
    camrt.add_references(folder)
    return folder


def test_float16_masks_give_the_bits_of_float32_ones(path: Path) -> None:
    """A network in float16 begins by rounding its input, so that a rounded input changes nothing. ONNX Runtime's CPU
    rounds less.
    """
    bundle, engine = read_bundle(path), InterpretedBackend(rounding=True)
    plain, masked = (bundle.mask_program("fp16", on_gpu) for on_gpu in (False, True))
    assert plain.input_dtype == "float32" and masked.input_dtype == "float16" and masked.precision == "float16"
    first = [engine.open(bundle, p) for p in (plain, masked)]
    want = first[0].run({next(iter(plain.inputs)): IMAGES})["logits"]
    got = first[1].run({"masked": IMAGES.astype(np.float16)})["logits"]
    np.testing.assert_array_equal(got, want)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: the GPU pipeline is not tested")
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_gpu_writes_float16_masks(precision: str, path: Path, emulated: EmulatedGpu) -> None:
    from test_pipeline import EmulatedBackend

    emulated.order = 0
    emulated.launched.clear()
    backend = EmulatedBackend(emulated)
    there = Explainer(read_bundle(path), backend, precision=precision)
    here = camrt.load(path, "onnxruntime", precision=precision)
    for method, options in (("score_cam_pp", {}), ("score_cam_pp", {"baseline": "zero"}), ("score_cam", {})):
        got, want = (e.explain(IMAGES[:2], method, **options) for e in (there, here))
        assert np.abs(got.maps - want.maps).max() < 1e-3, (method, options)
        assert set(got.details) == set(want.details)
        if precision == "int8":
            np.testing.assert_allclose(got.details["score_error"], want.details["score_error"], atol=1e-3)
    assert f"masked.{precision}.onnx" in {file for file, _ in backend.runs}
    assert any(launch.kernel.startswith("mask_batch_f16") for launch in emulated.launched)


def test_int8_is_near_and_says_how_near(path: Path) -> None:
    single, eight = camrt.load(path), camrt.load(path, precision="int8")
    assert eight.precision == "int8" and eight.provenance["precision"] == "int8"
    for method in ("score_cam_pp", "score_cam"):
        want, got = single.explain(IMAGES, method), eight.explain(IMAGES, method)
        assert 0 < cosine_distance(minmax(got.maps), minmax(want.maps)) < 1e-2
        error = got.details["score_error"]
        assert error.shape == (3,) and error.dtype == np.float32 and (error > 0).all() and (error < 0.1).all()
        assert "score_error" not in want.details
    for method in ("winsor_cam", "recipro_cam", "full_grad"):  # everything else is float32
        np.testing.assert_array_equal(eight.explain(IMAGES, method).maps, single.explain(IMAGES, method).maps)
    np.testing.assert_array_equal(eight.classify(IMAGES), single.classify(IMAGES))


def test_the_distance_of_scores_ignores_a_common_factor() -> None:
    from camrt.runtime.cams.masking import SAMPLE, _distance

    a, b = np.array([[1.0, 2, 3], [0, 0, 0]]), np.array([[2.0, 4, 6], [0, 0, 0]])
    assert _distance(a, b) == pytest.approx(0, abs=1e-7)  # a common factor does not change a map
    assert _distance(a, np.array([[2.0, 4, 6], [0, 1, 0]])) == 1
    assert _distance(np.array([[1.0, 0]]), np.array([[1.0, 0.1]])) == pytest.approx(0.0995, abs=1e-3)
    assert SAMPLE == 8


def test_a_large_error_is_warned_of(tmp_path: Path) -> None:
    """Calibrated with images of a small part of the range, most of what is explained is clipped."""
    path = tmp_path / "narrow.camrt"
    calibration = CALIBRATION / 50
    camrt.export_model(small_net(), path, (3, 32, 32), precision="int8", calibration=calibration)
    explainer = camrt.load(path, precision="int8")
    with pytest.warns(UserWarning, match=r"int8 changes the scores of masked images by \d+% beside one another"):
        result = explainer.explain(3 * IMAGES, "score_cam_pp", 0)
    assert result.details["score_error"].max() > 0.1
    assert read_bundle(path).precisions == ["fp32"]  # int8 stands beside float32


def test_a_device_is_checked_in_int8(path: Path) -> None:
    report = camrt.check(path)
    assert report.passed, [row for row in report.rows if not row.passed]
    rows = {row.program: row for row in report.rows}
    eight = {row.subject.split()[0]: row.limit for row in report.rows if row.program == "methods int8"}
    assert eight["score_cam_pp"] == eight["score_cam"] == float("inf") and eight["winsor_cam"] == 1e-3
    for precision in ("fp16", "int8"):
        row = rows[f"masked.{precision}.onnx"]
        assert row.subject.startswith("logits") and 0 < row.distance <= row.limit < 0.1


def test_int8_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50, 40)).save(pictures / f"{i}.png")
    file = tmp_path / "x.onnx"
    torch.onnx.export(small_net(), (torch.zeros(1, 3, 32, 32),), file, dynamo=True, verbose=False)
    command = ["export", str(file), str(tmp_path / "x.camrt"), "--precision", "int8", "--no-check"]
    assert main([*command, "--calibration", str(pictures)]) == 2
    assert "preprocess" in capsys.readouterr().err  # without a recipe, pictures are no input
    recipe = ["--resize", "32", "32", "--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]
    assert main([*command, *recipe]) == 2
    assert "int8 needs calibration= (--calibration PICTURES)" in capsys.readouterr().err
    assert main([*command, *recipe, "--calibration", str(pictures)]) == 0
    said = capsys.readouterr().err
    assert "calibrating int8 with 10 images" in said and "logits differ from float32's by" in said
    explain = ["explain", str(tmp_path / "x.camrt"), str(pictures / "0.png"), "--method", "score_cam_pp"]
    assert main([*explain, "--precision", "int8", "--out", str(tmp_path / "out")]) == 0
    assert main(["info", str(tmp_path / "x.camrt")]) == 0
    assert "masked.int8.onnx" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        (None, "int8 needs calibration="),
        (np.zeros((4, 3, 31, 32), np.float32), r"calibration: float32\[4, 3, 31, 32\] instead of float32 images"),
        (np.zeros((4, 3, 32, 32)), r"calibration: float64\[4, 3, 32, 32\] instead of float32 images"),
        (np.zeros((0, 3, 32, 32), np.float32), "calibration: float32"),
        (np.full((4, 3, 32, 32), np.nan, np.float32), "calibration: holds NaN or infinity"),
        (lambda manifest: "x", "calibration: "),
    ],
    ids=range(6),
)
def test_calibration_that_does_not_fit_is_refused(calibration: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(camrt.CamrtError, match=said):
        camrt.export_model(small_net(), tmp_path / "x", (3, 32, 32), precision="int8", calibration=calibration)
    assert not (tmp_path / "x").exists()


def test_calibration_is_for_int8_alone(tmp_path: Path) -> None:
    with pytest.raises(camrt.CamrtError, match="and nothing else does"):
        camrt.export_model(small_net(), tmp_path / "x", (3, 32, 32), calibration=CALIBRATION)


def test_what_int8_is_not_for_is_refused(path: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(camrt.CamrtError, match="use fp32, fp16"):
        camrt.compile(path, tmp_path / "x.onnx", method="score_cam_pp", precision="int8")
    with pytest.raises(camrt.CamrtError, match="has no int8 programs, it has fp32"):
        camrt.load(exported, precision="int8")


def test_a_quantised_network_is_refused(tmp_path: Path) -> None:
    camrt.export_model(small_net(), tmp_path / "x", (3, 32, 32), precision="int8", calibration=CALIBRATION)
    model = ir.load(tmp_path / "x" / "masked.int8.onnx")
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph}
    for node in [n for n in model.graph if n.op_type == "Cast"]:  # of the input, to float32
        node.outputs[0].replace_all_uses_with(model.graph.inputs[0])
        model.graph.remove(node, safe=True)
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    ir.save(model, tmp_path / "quantised.onnx")
    with pytest.raises(camrt.CamrtError, match="the network is quantised already: export it without int8"):
        camrt.export_onnx(tmp_path / "quantised.onnx", tmp_path / "y", precision="int8", calibration=CALIBRATION)
