"""Programs that score masked images in less than float32: float16 on a GPU, int8 everywhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pyarrow.parquet
import pytest
import torch
from conftest import PREPROCESS
from emulator import EmulatedGpu
from PIL import Image
from support import Mixing, small_net
from torch import nn

import camrt
from camrt.cli import main
from camrt.export.probes import smooth_images
from camrt.kernels import minmax
from camrt.runtime.bundle.reading import read_bundle
from camrt.runtime.cams import MaskedRuns
from camrt.runtime.cams.sampled_error import chances, map_error, taken
from camrt.runtime.explainer import Explainer
from camrt.verification.distances import cosine_distance
from camrt.verification.interpreted import InterpretedBackend

IMAGES = smooth_images((3, 32, 32), 3)
SCORE_FAMILY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("score_cam_pp", {}),
    ("score_cam_pp", {"baseline": "zero"}),
    ("score_cam_pp", {"variant": "tanh_mask_only"}),
    ("score_cam_pp", {"variant": "sigmoid_relu"}),
    ("score_cam", {}),
    ("score_cam", {"variant": "pytorch_grad_cam"}),
)
CALIBRATION = smooth_images((3, 32, 32), 12, seed=3)


class Sharp(nn.Module):
    """A network that is sure of its classes, so that an error of its logits moves scores far."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 12 * self.network(x)


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
            np.testing.assert_allclose(got.details["map_error"], want.details["map_error"], rtol=0.2)
    assert f"masked.{precision}.onnx" in {file for file, _ in backend.runs}
    assert any(launch.kernel.startswith("mask_batch_f16") for launch in emulated.launched)


def test_int8_is_near_and_says_how_near(path: Path) -> None:
    single, eight = camrt.load(path), camrt.load(path, precision="int8")
    assert eight.precision == "int8" and eight.provenance["precision"] == "int8"
    for method, options in SCORE_FAMILY:
        want, got = single.explain(IMAGES, method, **options), eight.explain(IMAGES, method, **options)
        error, said = _distances(got.maps, want.maps), got.details["map_error"]
        assert (error > 0).all() and (error < 1e-3).all(), method
        assert said.shape == (3,) and said.dtype == np.float32 and "map_error" not in want.details
        assert (said > error / 4).all() and (said < error * 6).all(), (method, options, error, said)
    for method in ("winsor_cam", "recipro_cam", "full_grad"):  # everything else is float32
        np.testing.assert_array_equal(eight.explain(IMAGES, method).maps, single.explain(IMAGES, method).maps)
    np.testing.assert_array_equal(eight.classify(IMAGES), single.classify(IMAGES))


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([cosine_distance(minmax(x[None]), minmax(y[None])) for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("shape", ["even", "skewed", "signed", "few", "one"])
@pytest.mark.parametrize("wrong", ["noise", "relative", "shifted", "factor"])
def test_a_sample_tells_how_far_a_map_is(shape: str, wrong: str) -> None:
    """Weights that are wrong in a known way: the estimate is within a factor of a few of what all of them give."""
    rng, ratios = np.random.default_rng(4), []
    terms = {"few": 10, "one": 1}.get(shape, 200)
    for _ in range(20):
        maps = rng.normal(size=(terms, 6, 6))
        maps = maps if shape == "signed" else np.maximum(maps, 0)
        weights = rng.uniform(0.5, 1, (2, terms)) ** (20 if shape == "skewed" else 1)
        noise = 0.05 * rng.normal(size=weights.shape)
        changes = {"noise": weights.mean() * noise, "relative": weights * noise, "shifted": 0.2 * weights.mean()}
        exact = weights + changes.get(wrong, 3 * weights)
        chance = chances(weights, maps)
        sample = taken(chance)
        assert chance.sum() == pytest.approx(min(32, terms)) and (chance > 0).all() and chance.max() <= 1 + 1e-9
        assert len(sample) == min(32, terms)
        said = map_error(weights, maps, sample, exact[:, sample], chance)
        got, want = (np.maximum(np.tensordot(w, maps, 1), 0) for w in (weights, exact))
        true = np.array([_cosine_distance(a, b) for a, b in zip(got, want, strict=True)])
        if wrong == "factor" or shape == "one":
            assert (said < 1e-12).all() and (true < 1e-12).all()
        else:
            ratios.append(said / true)
    if ratios:
        middle, low, high = np.median(ratios), np.quantile(ratios, 0.05), np.quantile(ratios, 0.95)
        most = 60 if shape == "skewed" else 12  # where few weights carry the map, the others' are told too large
        assert 0.3 < middle < most / 4 and low > 0.08 and high < most, (low, middle, high)


def _cosine_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Of maps of one layer's resolution, after min-max, in float64."""
    a, b = (x - x.min() for x in (a, b))
    return 1 - (a * b).sum() / np.sqrt(np.square(a).sum() * np.square(b).sum())


@pytest.mark.parametrize(
    ("exact", "distance"),
    [
        ([[1.0, 2, -3]], 0),
        ([[10.0, 20, -30]], 0),  # a min-max ignores a factor, but not its sign
        ([[-1.0, -2, 3]], 1),
        ([[0.0, 0, 0]], 1),
        ([[1.3, 2, -3]], 0.45),  # pixels that one of the two rectifies to zero
        ([[1.0, 2, -4]], 1),
    ],
)
def test_all_terms_leave_nothing_to_estimate(exact: list[list[float]], distance: float) -> None:
    maps = np.array([[[1.0, 0, 0]], [[1, 1, 0]], [[1.0, 0.6, 0]]])
    weights = np.array([[1.0, 2, -3]])
    chance = chances(weights, maps)
    assert (chance == 1).all() and taken(chance).tolist() == [0, 1, 2]
    said = map_error(weights, maps, taken(chance), np.array(exact), chance)
    sums = np.tensordot(weights, maps, 1), np.tensordot(np.array(exact), maps, 1)
    assert said == pytest.approx(cosine_distance(*(minmax(np.maximum(x, 0)) for x in sums)), abs=1e-12)
    assert said == pytest.approx(distance, abs=0.01)


def test_each_target_has_its_own_large_terms() -> None:
    """One of which weighs a hundred thousand times as much as the others: its terms alone would make the sample."""
    rng = np.random.default_rng(1)
    maps = np.maximum(rng.normal(size=(100, 5, 5)), 0)
    weights = np.eye(10).repeat(10, axis=1) * np.logspace(0, -5, 10)[:, None] * rng.uniform(0.5, 1, (10, 100))
    exact = weights * (1 + 0.5 * rng.normal(size=weights.shape))
    chance = chances(weights, maps)
    sample = taken(chance)
    assert all(weights[s, sample].any() for s in range(10))
    said = map_error(weights, maps, sample, exact[:, sample], chance)
    true = [cosine_distance(*(minmax(np.tensordot(w[s], maps, 1)[None]) for w in (weights, exact))) for s in range(10)]
    assert (said > np.array(true) / 20).all() and np.median(said / true) > 0.3


def test_nothing_is_taken_of_nothing() -> None:
    assert taken(chances(np.zeros((1, 40)), np.zeros((40, 2, 2)))).shape == (16,)


@pytest.mark.filterwarnings("ignore:the bundle explains one image")
def test_int8_of_one_image_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "mixing.camrt"
    options: dict[str, Any] = {"precision": ["fp32", "int8"], "complete": camrt.store_references}
    camrt.export_model(Mixing(), path, (3, 32, 32), calibration=CALIBRATION, **options)
    single, eight = camrt.load(path), camrt.load(path, precision="int8")
    for method, chosen in SCORE_FAMILY:
        want, got = (e.explain(IMAGES[:1], method, **chosen) for e in (single, eight))
        error, said = _distances(got.maps, want.maps), got.details["map_error"]
        assert error / 6 <= said < error * 10 + 1e-6, (method, chosen)
    assert camrt.check(path).passed


def test_sampled_masks_run_in_batches_as_small_as_the_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many, few = (camrt.load(path, precision="int8", mask_batch=n) for n in (16, 3))
    sizes = []
    exact = MaskedRuns.exact_logits

    def counted(runs: MaskedRuns, *arguments: Any) -> Any:
        run = runs.exact
        assert run is not None
        return exact(replace(runs, exact=lambda masked: sizes.append(len(masked)) or run(masked)), *arguments)

    monkeypatch.setattr(MaskedRuns, "exact_logits", counted)
    got, want = (e.explain(IMAGES[:1], "score_cam_pp").details["map_error"] for e in (few, many))
    assert max(sizes[:-1]) == 3
    np.testing.assert_allclose(got, want, rtol=0.01)


def test_a_large_error_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Calibrated with images of a small part of the range, most of what is explained is clipped."""
    path = tmp_path / "narrow.camrt"
    options: dict[str, Any] = {"precision": "int8", "preprocess": PREPROCESS}
    camrt.export_model(Sharp(), path, (3, 32, 32), calibration=CALIBRATION / 50, **options)
    explainer, single = camrt.load(path, precision="int8"), camrt.load(path)
    with pytest.warns(UserWarning, match=r"int8 moves this map by about 0\.\d+ \(1 - cosine, estimated"):
        result = explainer.explain(3 * IMAGES, "score_cam_pp", 0)
    error = _distances(result.maps, single.explain(3 * IMAGES, "score_cam_pp", 0).maps)
    assert (result.details["map_error"] > error / 8).all() and (result.details["map_error"] < error * 10).all()
    assert read_bundle(path).precisions == ["fp32"]  # int8 stands beside float32
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(pictures / f"{i}.png")
    _told_by_the_commands(path, pictures, tmp_path, capsys)


def _told_by_the_commands(path: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = ["--precision", "int8"]
    for method, has in (("score_cam_pp", True), ("winsor_cam", False)):
        out = tmp_path / method
        assert main(["explain", str(path), str(pictures), "--method", method, "--out", str(out), *common]) == 0
        lines = [json.loads(line) for line in (out / "explanations.jsonl").read_text().splitlines()]
        assert len(lines) == 3 and all(("map_error" in line["details"]) == has for line in lines)
        told = capsys.readouterr()
        assert ("int8 moves this map" in told.err) == has
        arguments = ["map", str(path), str(pictures), "--method", method, "--out", str(out / "rows"), *common]
        assert main([*arguments, "--actors", "1"]) == 0
        assert ("3 maps are more than 0.002 off in int8" in capsys.readouterr().out) == has
        assert main([*arguments, "--actors", "1", "--resume"]) == 0
        assert ("3 maps are more than 0.002 off in int8" in capsys.readouterr().out) == has
        column = pyarrow.parquet.read_table(out / "rows" / "part-000000.parquet")["map_error"].to_pylist()
        assert [value is not None and value > 0.002 for value in column] == 3 * [has]
    arguments = ["evaluate", str(path), str(pictures), "--methods", "score_cam_pp", "winsor_cam", "--metrics", "area"]
    assert main([*arguments, "--out", str(tmp_path / "measured"), *common]) == 0
    assert "3 of 3 maps of the Score family are more than 0.002 off in int8" in capsys.readouterr().out


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
    said = capsys.readouterr().err
    assert "--calibration: pictures need preprocessing, e.g. --resize" in said and "writing" not in said
    recipe = ["--resize", "32", "32", "--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]
    assert main([*command, *recipe]) == 2
    assert "int8 needs calibration= (--calibration PICTURES)" in capsys.readouterr().err
    (pictures / "broken.png").write_bytes(b"no picture")
    assert main([*command, *recipe, "--calibration", str(pictures)]) == 2
    said = capsys.readouterr().err
    assert "broken.png: not a readable image" in said and "checking" not in said
    (pictures / "broken.png").unlink()
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
