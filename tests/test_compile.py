"""One ONNX file for a method: in ONNX Runtime and elsewhere it gives what `explain` gives, without camrt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from engines import in_onnxruntime, in_openvino, in_reference, needs_openvino
from families import network
from support import ROOT, small_net
from torch import nn

import camrt
from camrt.cli import main
from camrt.compiling.methods import COMPILED
from camrt.export.probes import smooth_images
from camrt.kernels import minmax
from camrt.method_choice import parse_method
from camrt.runtime.backends.tensorrt.bindings import find_library
from camrt.runtime.backends.tensorrt.build import build_engine
from camrt.runtime.backends.tensorrt.target import Profile, Target
from camrt.runtime.bundle.kinds import Kind
from camrt.runtime.bundle.manifest import PRECISIONS, Program
from camrt.runtime.errors import UnknownLayer, UnknownMethod

IMAGES = smooth_images((3, 32, 32), 5)
TARGETS = np.array([1, -1, 4, 0, -1])
PERCENTILES = np.array([0, 30, 62.5, 90, 100], np.float32)
CHOICES = [
    *COMPILED,
    "finer_cam:alpha=0.6,comparisons=9",
    "integrative_cam:smooth=exp",
    "recipro_cam:gaussian=true",
    "recipro_cam:variant=openvino_xai",
    "score_cam_pp:variant=sigmoid_relu",
    "score_cam_pp:variant=tanh_mask_only",
    "winsor_cam:layer_aggregation=max",
    "winsor_cam:low=0.3,high=2.0",
]


def feeds_of(path: Path, images: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    feeds: dict[str, np.ndarray] = {"image": images, "target": targets}
    if any(i.name == "percentile" for i in onnx.load(path).graph.input):
        feeds["percentile"] = PERCENTILES[: len(images)]
    return feeds


def explained(explainer: camrt.Explainer, text: str, images: np.ndarray, targets: np.ndarray, layers: Any) -> Any:
    """Maps (B, H, W) and layer weights (B, L) of `explain`, one image at a time."""
    choice, logits = parse_method(text), explainer.classify(images)
    maps, weights = [], []
    for i, image in enumerate(images):
        options = dict(choice.options)
        if choice.name == "winsor_cam":
            options["percentile"] = float(PERCENTILES[i])
        target = int(logits[i].argmax()) if targets[i] < 0 else int(targets[i])
        result = explainer.explain(image[None], choice.name, target, layers, **options)
        maps.append(result.maps[0])
        weights.append(result.layer_weights[0])
    return np.stack(maps), np.stack(weights), logits


def assert_same(
    path: Path,
    explainer: camrt.Explainer,
    text: str,
    run: Any,
    images: np.ndarray,
    layers: Any = None,
    atol: float = 1e-4,
) -> None:
    targets = TARGETS[: len(images)]
    out = run(path)(feeds_of(path, images, targets))
    maps, weights, logits = explained(explainer, text, images, targets, layers)
    assert {str(a.dtype) for a in out.values()} == {"float32"}
    assert out["map"].shape == maps.shape and np.ptp(maps, axis=(1, 2)).max() > 0.1
    np.testing.assert_allclose(minmax(out["map"]), minmax(maps), atol=atol)
    np.testing.assert_allclose(out["logits"], logits, rtol=1e-3, atol=1e-4)
    if weights.size:
        np.testing.assert_allclose(out["layer_weights"], weights, atol=atol)
    else:
        assert "layer_weights" not in out


ENGINES = [in_onnxruntime, in_reference, pytest.param(in_openvino, marks=needs_openvino)]


@pytest.mark.parametrize("run", ENGINES)
@pytest.mark.parametrize("text", CHOICES)
def test_one_file_gives_what_explain_gives(
    text: str, run: Any, exported: Path, explainer: camrt.Explainer, tmp_path: Path
) -> None:
    path = camrt.compile(exported, tmp_path / "m.onnx", text)
    assert_same(path, explainer, text, run, IMAGES)


@pytest.mark.parametrize("text", ["recipro_cam", "score_cam", "score_cam_pp"])
def test_several_runs_of_a_network_of_tokens(text: str, tmp_path: Path) -> None:
    """Sizes such as 4 * batch belong to one run each."""
    model, shape = network("vit")
    bundle, images = camrt.export_model(model, tmp_path / "m.camrt", shape), smooth_images(shape, 3)
    cases: list[dict[str, Any]] = [{"masks": 7}, {"masks": 10_000, "batch": 3}]
    for options in [{}, {"batch": 3}] if text == "recipro_cam" else cases:
        path = camrt.compile(bundle, tmp_path / "m.onnx", text, **options)
        assert_same(path, camrt.load(bundle), text, in_onnxruntime, images, atol=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "convnext_tiny", "vit", "swin_v2"])
def test_networks(name: str, tmp_path: Path) -> None:
    """Of every layout: channels first, channels last, tokens; and layers whose mean is zero by construction."""
    model, shape = network(name)
    bundle = camrt.export_model(model, tmp_path / "m.camrt", shape)
    explainer, images = camrt.load(bundle), smooth_images(shape, 2)
    for text in ("winsor_cam", "grad_cam", "integrative_cam", "layer_cam"):
        layers = "last" if name in ("vit", "swin_v2") and text == "winsor_cam" else None
        path = camrt.compile(bundle, tmp_path / "m.onnx", text, layers)
        assert_same(path, explainer, text, in_onnxruntime, images, layers, atol=2e-3)


class Instance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.InstanceNorm2d(8, affine=True)
        self.second = nn.Conv2d(8, 6, 3, 2, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


def test_layers_of_rounding_noise_count_as_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bundle = camrt.export_model(Instance().eval(), tmp_path / "m.camrt", (3, 32, 32), "conv")
    path = camrt.compile(bundle, tmp_path / "m.onnx")
    assert_same(path, camrt.load(bundle), "winsor_cam", in_onnxruntime, IMAGES)
    assert not in_onnxruntime(path)(feeds_of(path, IMAGES, TARGETS))["layer_weights"][:, 0].any()


def test_a_class_that_does_not_exist_and_percentiles_out_of_range(exported: Path, tmp_path: Path) -> None:
    run = in_onnxruntime(camrt.compile(exported, tmp_path / "m.onnx"))
    percentiles = np.array([50, 50, 130, -4, np.nan], np.float32)
    out = run({"image": IMAGES, "target": np.array([-2, 5, 1, 1, 1]), "percentile": percentiles})
    within = run(
        {"image": IMAGES, "target": np.ones(5, np.int64), "percentile": np.array([0, 0, 100, 0, 0], np.float32)}
    )
    for name in ("map", "layer_weights"):
        assert not out[name][[0, 1, 4]].any() and out[name][2:4].any()
        np.testing.assert_array_equal(out[name][2:4], within[name][2:4])
    for text in ("layer_cam", "finer_cam", "recipro_cam", "score_cam_pp"):
        run = in_onnxruntime(camrt.compile(exported, tmp_path / "m.onnx", text))
        out = run({"image": IMAGES[:3], "target": np.array([5, -7, 1])})
        assert not out["map"][:2].any() and not out["layer_weights"][:2].any() and out["map"][2].any()


@pytest.mark.parametrize("masks", [1, 5, 16, 100])
def test_masks_of_one_run_change_nothing(
    masks: int, exported: Path, explainer: camrt.Explainer, tmp_path: Path
) -> None:
    path = camrt.compile(exported, tmp_path / "m.onnx", "score_cam", masks=masks)
    assert any(n.op_type == "Loop" for n in onnx.load(path).graph.node) == (
        masks < explainer.manifest.taps[-1].channels
    )
    assert_same(path, explainer, "score_cam", in_onnxruntime, IMAGES)


@pytest.mark.parametrize("text", ["grad_cam", "score_cam_pp"])
def test_opset_17(text: str, exported: Path, explainer: camrt.Explainer, tmp_path: Path) -> None:
    path = camrt.compile(exported, tmp_path / "m.onnx", text, opset=17)
    model = onnx.load(path)
    assert not unused(model)
    assert [o.version for o in model.opset_import if not o.domain] == [17]
    onnx.checker.check_model(model, full_check=True)
    assert_same(path, explainer, text, in_onnxruntime, IMAGES)


def test_a_bundle_for_one_image_at_a_time(tmp_path: Path) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x - x.mean((0, 2, 3), keepdim=True))

    bundle = camrt.export_model(Mixing().eval(), tmp_path / "m.camrt", (3, 32, 32))
    explainer = camrt.load(bundle)
    assert explainer.manifest.batch == 1
    for text in ("winsor_cam", "score_cam_pp"):
        assert_same(camrt.compile(bundle, tmp_path / "m.onnx", text), explainer, text, in_onnxruntime, IMAGES[:1])
    with pytest.raises(camrt.CamrtError, match="one image at a time"):
        camrt.compile(bundle, tmp_path / "m.onnx", "recipro_cam")


def test_weights_past_the_limit_lie_beside_the_file(
    exported: Path, explainer: camrt.Explainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("camrt.compiling.build.LARGEST", 1000)
    path = camrt.compile(exported, tmp_path / "m.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert path.stat().st_size < 200_000 < (tmp_path / "m.onnx.data").stat().st_size + 200_000
    assert_same(path, explainer, "winsor_cam", in_onnxruntime, IMAGES)


def test_float16_and_a_fixed_batch(tmp_path: Path) -> None:
    bundle = camrt.export_model(small_net(), tmp_path / "m.camrt", (3, 32, 32), precision=["fp32", "fp16"])
    half = camrt.compile(bundle, tmp_path / "half.onnx", precision="fp16", batch=2)
    assert [d.dim_value for d in onnx.load(half).graph.input[0].type.tensor_type.shape.dim] == [2, 3, 32, 32]
    assert any(n.op_type == "Cast" for n in onnx.load(half).graph.node)
    assert_same(half, camrt.load(bundle, precision="fp16"), "winsor_cam", in_onnxruntime, IMAGES[:2], atol=2e-2)


@pytest.fixture(scope="module")
def in_both_precisions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("both") / "m.camrt"
    return camrt.export_model(small_net(), path, (3, 32, 32), precision=["fp32", "fp16"])


@pytest.mark.parametrize("text", COMPILED)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_for_rtx_builds_an_engine(text: str, precision: str, in_both_precisions: Path, tmp_path: Path) -> None:
    path = camrt.compile(in_both_precisions, tmp_path / "m.onnx", text, precision=precision)
    inputs = {"image": ["batch", 3, 32, 32], "target": ["batch"]}
    inputs |= {"percentile": ["batch"]} if text == "winsor_cam" else {}
    program = Program(Kind.LAYER_MAPS, path.name, "", (), inputs, {"map": ["batch", 32, 32]}, PRECISIONS[precision])
    library = find_library("tensorrt_rtx")
    made = build_engine(library, path, program, Target((8, 9), None), [Profile("batch", 1, 4)])
    assert len(made.engine) > 100_000
    assert all("Int64 binding" in warning for warning in made.warnings)  # which is what the target is


def unused(model: onnx.ModelProto) -> set[str]:
    """Initializers that no node reads."""
    graphs = [model.graph, *(a.g for node in model.graph.node for a in node.attribute if a.HasField("g"))]
    return {t.name for t in model.graph.initializer} - {name for g in graphs for node in g.node for name in node.input}


@pytest.mark.parametrize("text", CHOICES)
def test_no_file_has_unused_initializers(text: str, exported: Path, tmp_path: Path) -> None:
    assert not unused(onnx.load(camrt.compile(exported, tmp_path / "m.onnx", text, picture=(50, 40), overlay="jet")))


def test_the_file_is_whole_and_describes_itself(exported: Path, tmp_path: Path) -> None:
    path = camrt.compile(exported, tmp_path / "m.onnx", "winsor_cam:layer_aggregation=max", ["stem", "head.0"])
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert not unused(model)
    assert all(t.data_location == onnx.TensorProto.DEFAULT for t in model.graph.initializer)
    said = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert said["camrt.layers"] == ["stem", "head.0"] and said["camrt.method"] == "winsor_cam"
    assert said["camrt.options"] == {"layer_aggregation": "max"} and said["camrt.version"] == camrt.__version__
    assert [f.name for f in tmp_path.iterdir()] == ["m.onnx"]


def test_a_consumer_needs_onnxruntime_and_numpy_alone(exported: Path, tmp_path: Path) -> None:
    path = camrt.compile(exported, tmp_path / "m.onnx")
    code = (
        "import sys, numpy as np, onnxruntime as ort\n"
        f"s = ort.InferenceSession({str(path)!r}, providers=['CPUExecutionProvider'])\n"
        "x = np.ones((1, 3, 32, 32), np.float32)\n"
        "m, = s.run(['map'], {'image': x, 'target': np.array([-1]), 'percentile': np.array([90], np.float32)})\n"
        "assert m.shape == (1, 32, 32) and not {'camrt', 'torch', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("eigen_cam", {}, UnknownMethod, "eigen_cam cannot be compiled to one file: it decomposes a matrix, for which"),
        (
            "ablation_cam",
            {},
            UnknownMethod,
            "ablation_cam cannot be compiled to one file: it runs the network",
        ),
        ("winsor_cam:percentile=50", {}, UnknownMethod, "winsor_cam in one file cannot have percentile=50"),
        ("winsor_cam:layer_aggregation=l2", {}, UnknownMethod, "cannot have layer_aggregation='l2'"),
        ("integrative_cam:smooth=softmax", {}, UnknownMethod, "cannot have smooth='softmax'"),
        ("integrative_cam:reading=residual", {}, UnknownMethod, "cannot have reading='residual'"),
        ("grad_cams", {}, UnknownMethod, "did you mean 'grad_cam'"),
        ("grad_cam", {"layers": ["stme"]}, UnknownLayer, "did you mean 'stem'"),
        ("finer_cam:comparisons=0", {}, camrt.CamrtError, "comparisons 0 a whole one from 1"),
        ("winsor_cam:low=2", {}, camrt.CamrtError, "0 < low <= high"),
        (
            "score_cam:variant=pytorch_grad_cam",
            {},
            UnknownMethod,
            "cannot have variant='pytorch_grad_cam': use original",
        ),
        ("score_cam_pp:baseline=zero", {}, UnknownMethod, "cannot have baseline='zero'"),
        ("score_cam", {"masks": 0}, camrt.CamrtError, "masks 0: use 1 or more"),
        ("grad_cam", {"masks": 4}, camrt.CamrtError, "grad_cam has no masks: leave masks out"),
        ("grad_cam", {"opset": 16}, camrt.CamrtError, "opset 16: use 17 or 18, the bundle's own"),
        ("grad_cam", {"opacity": 0.7}, camrt.CamrtError, "it is that of an overlay"),
        ("finer_cam:alpha=inf", {}, camrt.CamrtError, "alpha inf must be a number"),
        ("grad_cam", {"overlay": "turbos"}, camrt.CamrtError, "did you mean 'turbo'"),
        ("grad_cam", {"overlay": "turbo", "opacity": 2.0}, camrt.CamrtError, "opacity 2.0: use a number from 0 to 1"),
        ("grad_cam", {"picture": (480, 0)}, camrt.CamrtError, "picture (480, 0): use (height, width)"),
        ("grad_cam", {"batch": 0}, camrt.CamrtError, "batch 0: use 1 or more"),
        ("grad_cam", {"precision": "fp8"}, camrt.CamrtError, "precision 'fp8': use fp32, fp16"),
        ("grad_cam", {"precision": "fp16"}, camrt.CamrtError, "no fp16 programs"),
    ],
)
def test_what_one_file_cannot_hold(
    text: str, options: dict[str, Any], error: type[Exception], message: str, exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(error) as raised:
        camrt.compile(exported, tmp_path / "m.onnx", text, **options)
    assert message in str(raised.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [*COMPILED, "integrative_cam:smooth=exp", "winsor_cam:low=0.3"])
def test_verify_compiled(text: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = (50, 40) if text == "winsor_cam" else None
    path = camrt.compile(exported, tmp_path / "m.onnx", text, picture=picture, overlay="turbo")
    assert main(["verify", str(exported), "--compiled", str(path), "--all"]) == 0
    out = capsys.readouterr().out
    assert out.count("ok   explain") >= 2 and "overlay" in out
    assert ("ok   PyTorch" in out) == (text.partition("_")[0] not in ("finer", "recipro", "score")) - (
        text == "winsor_cam:low=0.3"
    )


def test_verify_compiled_finds_a_fault(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = camrt.compile(exported, tmp_path / "m.onnx", "layer_cam")
    model = onnx.load(path)
    next(n for n in model.graph.node if n.op_type == "Relu" and "map" not in n.name).op_type = "Abs"
    onnx.save(model, tmp_path / "fault.onnx")
    assert main(["verify", str(exported), "--compiled", str(tmp_path / "fault.onnx")]) == 1
    assert "FAIL" in capsys.readouterr().out
    for bundle, file, message in (
        (ROOT / "camrt" / "demo" / "shapes.camrt", path, "compiled from another bundle"),
        (exported, exported / "classify.onnx", "not a file of camrt compile"),
        (exported, exported / "manifest.json", "not readable as ONNX"),
    ):
        assert main(["verify", str(bundle), "--compiled", str(file)]) == 2
        assert message in capsys.readouterr().err


def test_the_command(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    assert main(["compile", str(exported), str(path), "--method", "grad_cam", "--layers", "stem", "--batch", "1"]) == 0
    assert str(path) in capsys.readouterr().out and path.exists()
    for words in (["--batch", "many"], ["--batch", "²"], ["--uint8", "480"], ["--opacity", "0.4"]):
        assert main(["compile", str(exported), str(path), *words]) == 2
    for out in (tmp_path, "", "/dev/null", exported / "classify.onnx", exported / "new.onnx"):
        assert main(["compile", str(exported), str(out)]) == 2, out
    assert Path("/dev/null").is_char_device() and camrt.load(exported).classify(IMAGES).shape == (5, 5)
    assert main(["compile", str(exported), str(tmp_path / "no" / "m.onnx")]) == 2
    assert "cannot be written" in capsys.readouterr().err
