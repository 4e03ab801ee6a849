"""Programs whose backward pass stays in the blocked layout of ONNX Runtime's CPU kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from support import warmed_up
from torch import nn

import camrt
from camrt.export.probes import smooth_images
from camrt.runtime.backends import ort
from camrt.runtime.bundle.blocking import blocked
from camrt.runtime.bundle.kinds import Kind
from camrt.runtime.bundle.reading import read_bundle

EDGES = np.array(
    [0, -0.0, 1e-45, -1e-45, 2**-149 * 3, 2**-128, 2**-127, 2**-126, 1e-30, 1, 6, 3e38, -3e38, np.inf, -np.inf, -1],
    np.float32,
)


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, out, 3, stride, 1)
        self.two = nn.Conv2d(out, out, 3, 1, 1)
        self.side = nn.Conv2d(channels, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.two(torch.relu(self.one(x))) + self.side(x))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2), Block(16, 16, 1), Block(16, 32, 2),
        nn.Conv2d(32, 32, 3, 2, 1), nn.SiLU(),
        Block(32, 32, 1), nn.Conv2d(32, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a residual network. Not to be changed."""
    folder = tmp_path_factory.mktemp("blocking") / "residual.camrt"
    return camrt.export_model(warmed_up(residual(), (3, 32, 32)), folder, (3, 32, 32))


def masked(
    shape: tuple[int | str, ...] = (1, 16, 4, 4),
    threshold: float = 0,
    dtype: int = TensorProto.FLOAT,
    other: str | None = None,
    source: str | None = None,
    again: bool = False,
) -> onnx.ModelProto:
    """out = g [y > threshold], g = x made by `source`, or by a convolution of ones. other: an operator that reads the
    comparison, too. again: the product is masked again, by [y < 6].
    """
    conv = helper.make_node("Conv", ["x", "ones"], ["g"], group=shape[1] if isinstance(shape[1], int) else 1)
    nodes = [
        conv if source is None else helper.make_node(source, ["x"], ["g"]),
        helper.make_node("Greater", ["y", "threshold"], ["above"]),
        helper.make_node("Cast", ["above"], ["mask"], to=dtype),
        helper.make_node("Mul", ["g", "mask"], ["out"]),
    ]
    outputs = [helper.make_tensor_value_info("out", dtype, shape)]
    if other is not None:
        nodes.append(helper.make_node(other, ["above"], ["too"]))
        outputs.append(helper.make_tensor_value_info("too", TensorProto.BOOL, shape))
    values = [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)]
    values.append(helper.make_tensor_value_info("x", dtype, shape))
    constants = [numpy_helper.from_array(np.array(threshold, np.float32), "threshold")]
    constants.append(numpy_helper.from_array(np.ones((16, 1, 1, 1), np.float32), "ones"))
    if again:
        nodes[-1].output[0] = "once"
        nodes.append(helper.make_node("Less", ["y", "six"], ["below"]))
        nodes.append(helper.make_node("Cast", ["below"], ["second"], to=dtype))
        nodes.append(helper.make_node("Mul", ["once", "second"], ["out"]))
        constants.append(numpy_helper.from_array(np.array(6, np.float32), "six"))
    graph = helper.make_graph(nodes, "masked", values, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "as it is"])
def test_a_mask_is_exact_for_every_number(fused: bool) -> None:
    model = onnx.load_model_from_string(blocked(masked().SerializeToString()))
    onnx.checker.check_model(model, full_check=True)
    assert [n.op_type for n in model.graph.node] == ["Conv", "Conv", "HardSigmoid", "Mul"]
    y = np.stack([np.roll(EDGES, i) for i in range(16)]).reshape(1, 16, 4, 4)
    g = np.random.default_rng(0).standard_normal(y.shape).astype(np.float32)
    options = onnxruntime.SessionOptions()
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"y": y, "x": g})[0], np.where(y > 0, g, 0))


def test_a_comparison_that_others_read_stays() -> None:
    model = onnx.load_model_from_string(blocked(masked(other="Not").SerializeToString()))
    assert [n.op_type for n in model.graph.node] == ["Conv", "Greater", "Conv", "HardSigmoid", "Mul", "Not"]
    given = masked()
    given.graph.output.append(helper.make_tensor_value_info("above", TensorProto.BOOL, (1, 16, 4, 4)))
    model = onnx.load_model_from_string(blocked(given.SerializeToString()))
    assert [n.op_type for n in model.graph.node] == ["Conv", "Greater", "Conv", "HardSigmoid", "Mul"]


@pytest.mark.parametrize("number", [1.0, -0.25])
def test_a_complement_is_exact(number: float) -> None:
    """Of the slope s + y (1 - s), times g."""
    nodes = [
        helper.make_node("Sub", ["one", "s"], ["left"]),
        helper.make_node("Mul", ["y", "left"], ["part"]),
        helper.make_node("Add", ["s", "part"], ["slope"]),
        helper.make_node("Reshape", ["rows", "sizes"], ["g"]),
        helper.make_node("Mul", ["g", "slope"], ["out"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 16, 4, 4)) for n in ("s", "y")]
    values.append(helper.make_tensor_value_info("rows", TensorProto.FLOAT, (1, 256)))
    constants = [numpy_helper.from_array(np.array(number, np.float32), "one")]
    constants.append(numpy_helper.from_array(np.array([-1, 16, 4, 4]), "sizes"))
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, (1, 16, 4, 4))]
    graph = helper.make_graph(nodes, "slope", values, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    rng = np.random.default_rng(0)
    feeds = {str(v.name): rng.standard_normal((1, 16, 4, 4)).astype(np.float32) for v in values[:2]}
    feeds["rows"] = rng.standard_normal((1, 256)).astype(np.float32)
    changed = onnx.load_model_from_string(blocked(model.SerializeToString()))
    onnx.checker.check_model(changed, full_check=True)
    assert [n.op_type for n in changed.graph.node] == ["Conv", "Mul", "Add", "Reshape", "Conv", "Mul"]
    s, y, g = feeds["s"], feeds["y"], feeds["rows"].reshape(1, 16, 4, 4)
    session = onnxruntime.InferenceSession(changed.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, feeds)[0], g * (s + y * (np.float32(number) - s)))


@pytest.mark.parametrize(
    "model",
    [
        masked((1, 24, 4, 4)),
        masked((1, 16, 4)),
        masked((1, 16, 4, 4, 4)),
        masked(("batch", "channels", 4, 4)),
        masked(threshold=1),
        masked(dtype=TensorProto.FLOAT16),
        masked(source="Neg"),
        masked(again=True),
    ],
    ids=["24 channels", "3-D", "5-D", "unknown", "another threshold", "float16", "outside the layout", "masked again"],
)
def test_everything_else_is_left_as_it_is(model: onnx.ModelProto) -> None:
    assert blocked(model.SerializeToString()) == model.SerializeToString()


@pytest.mark.parametrize("method", ["winsor_cam", "grad_cam", "layer_cam", "integrative_cam", "full_grad"])
def test_maps_are_those_of_the_program_as_it_is(method: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = smooth_images((3, 32, 32), 1)
    got = camrt.load(path, "onnxruntime").explain(image, method, 2)
    monkeypatch.setattr(ort, "_BLOCKS", False)
    want = camrt.load(path, "onnxruntime").explain(image, method, 2)
    assert np.ptp(want.maps) > 0
    np.testing.assert_allclose(got.maps, want.maps, atol=2e-6 * np.abs(want.maps).max())


def test_fewer_maps_leave_the_layout(path: Path, tmp_path: Path) -> None:
    bundle = read_bundle(path)
    data = bundle.file(bundle.program(Kind.LAYER_MAPS, [t.name for t in bundle.manifest.taps])).read_bytes()
    (tmp_path / "weights.bin").write_bytes((path / "weights.bin").read_bytes())
    as_it_is, changed = (_reorders(model, tmp_path) for model in (data, blocked(data)))
    assert changed < 0.8 * as_it_is, (changed, as_it_is)


def _reorders(model: bytes, folder: Path) -> int:
    """How often the optimised program takes a map into the blocked layout or out of it."""
    (folder / "program.onnx").write_bytes(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the optimised file is for this machine alone
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    for symbol in ("batch", "seeds"):
        options.add_free_dimension_override_by_name(symbol, 1)
    onnxruntime.InferenceSession(str(folder / "program.onnx"), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(folder / "optimised.onnx", load_external_data=False)
    return sum(node.op_type.startswith("Reorder") for node in optimised.graph.node)
