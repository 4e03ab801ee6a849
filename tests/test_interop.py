"""Exported programs in engines that camrt does not use: every program and map within the limits of `camrt verify`."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from engines import Engine, in_openvino, in_reference, needs_openvino
from families import network
from PIL import Image
from support import SmallNet, small_net
from torch import nn

import camrt
from camrt.cli import main
from camrt.export.precision import to_half
from camrt.export.probes import smooth_images
from camrt.export.pytorch.autograd import record
from camrt.export.tape import Tape, attribute, output
from camrt.kernels import minmax
from camrt.runtime.backends import create
from camrt.runtime.bundle.kinds import Kind
from camrt.runtime.bundle.reading import Bundle, read_bundle
from camrt.runtime.cams import METHODS
from camrt.runtime.explainer import Explainer
from camrt.verification.distances import cosine_distance
from camrt.verification.interpreted import InterpretedBackend
from camrt.verification.oracle import module_oracle
from camrt.verification.verify import verify_bundle

NETWORKS = ["resnet18", "mobilenet_v2", "densenet", "efficientnet_b0", "vit", "swin_v2"]


def verified(bundle: Bundle, model: nn.Module, engine: Any) -> None:
    report = verify_bundle(bundle, module_oracle(model, "the model"), backend=engine, precisions=["fp32"])
    assert report.passed, [row for row in report.rows if not row.passed]


@needs_openvino
@pytest.mark.parametrize("name", NETWORKS)
def test_programs_in_openvino(name: str, tmp_path: Path) -> None:
    model, shape = network(name)
    verified(read_bundle(camrt.export_model(model, tmp_path / "m.camrt", shape)), model, Engine(in_openvino))


def test_programs_in_the_reference_evaluator(tmp_path: Path) -> None:
    model = small_net()
    verified(
        read_bundle(camrt.export_model(model, tmp_path / "m.camrt", (3, 32, 32))),
        model,
        Engine(in_reference),
    )


class AtZero(SmallNet):
    """Rectifiers whose inputs are exactly zero over the left half of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.Identity(), nn.ReLU())


@pytest.mark.parametrize(
    "engine", ["onnxruntime", "rounding", "reference", pytest.param("openvino", marks=needs_openvino)]
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rectifiers_at_exactly_zero(engine: str, precision: str, tmp_path: Path) -> None:
    """PyTorch's gradient there is 0; a step of a half, or an infinite slope times zero, would show."""
    torch.manual_seed(0)
    model = AtZero().eval()
    path = camrt.export_model(model, tmp_path / "m.camrt", (3, 32, 32), precision=precision)
    backend = {
        "rounding": lambda: InterpretedBackend(rounding=True),
        "reference": partial(Engine, in_reference),
        "openvino": partial(Engine, in_openvino),
    }.get(engine)
    explainer = camrt.load(path) if backend is None else Explainer(read_bundle(path), backend())
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    image[..., :16] = 0
    layers = list(explainer.layers)
    recorded = record(model, torch.from_numpy(image), 1, layers)
    assert (recorded.activations["stem"] == 0).float().mean() > 0.3
    program = explainer.session.program(Kind.GRADIENTS, layers)
    out = explainer.session.open(program).run({"image": image, "seed": np.eye(5, dtype=np.float32)[[1]]})
    for layer in layers:
        want = recorded.gradients[layer].numpy()
        limit = 1e-5 if precision == "fp32" else 2e-3
        np.testing.assert_allclose(out[f"gradient:{layer}"], want, atol=limit * np.abs(want).max(), err_msg=layer)


def test_no_program_rests_on_an_extreme_parameter(tmp_path: Path) -> None:
    """Attributes and constants that an engine may round, saturate or refuse."""
    for i, (model, shape) in enumerate(((small_net(), (3, 32, 32)), network("mobilenet_v2"), network("vit"))):
        path = camrt.export_model(model, tmp_path / f"{i}.camrt", shape, precision=["fp32", "fp16"])
        for file in sorted(path.glob("*.onnx")):
            graph = onnx.load(file).graph
            for node in graph.node:
                for setting in node.attribute:
                    if setting.type == onnx.AttributeProto.FLOAT:
                        assert abs(setting.f) < 1e4, (file.name, node.op_type, setting.name, setting.f)
            fills = {node.input[2] for node in graph.node if node.op_type == "Pad" and len(node.input) > 2}
            for tensor in graph.initializer:
                if tensor.name in fills:  # what a max pool's border is compared as: no comparison picks it
                    continue
                values = onnx.numpy_helper.to_array(tensor)
                if values.dtype == np.float32:
                    assert np.abs(values).max(initial=0) < 1e4, (file.name, tensor.name)


def test_scattered_sums_stay_float32() -> None:
    """ONNX Runtime's CPU has no float16 form of them."""
    image, seed = (
        ir.Value(name=name, shape=ir.Shape([2, 4]), type=ir.TensorType(ir.DataType.FLOAT)) for name in ("image", "seed")
    )
    graph = ir.Graph([image, seed], [], nodes=[], name="scatter", opset_imports={"": 18})
    tape = Tape(graph)
    product = tape.MatMul(seed, np.eye(4, dtype=np.float32))
    for reduction in ("none", "add"):
        indices = np.zeros((2, 4), np.int64)
        nothing = tape.floats(np.zeros((2, 4)))
        scattered = tape.ScatterElements(nothing, indices, product, axis=1, reduction=reduction)
        graph.outputs.append(output(tape, scattered, reduction, [2, 4]))
    model = to_half(ir.Model(graph, ir_version=10))
    scattered = [n for n in graph if n.op_type == "ScatterElements"]
    kinds = {attribute(n, "reduction"): x.dtype for n in scattered if (x := n.inputs[2]) is not None}
    assert kinds == {"none": ir.DataType.FLOAT16, "add": ir.DataType.FLOAT}
    run = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run
    (summed,) = run(["add"], {"image": np.ones((2, 4), np.float32), "seed": np.ones((2, 4), np.float32)})
    np.testing.assert_array_equal(np.asarray(summed)[:, 0], 4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with references. Not to be changed."""
    path = tmp_path_factory.mktemp("interop") / "small.camrt"
    return camrt.export_model(small_net(), path, (3, 32, 32), complete=camrt.store_references)


@needs_openvino
def test_openvino_as_a_backend(small: Path) -> None:
    report = camrt.check(small, "openvino")
    assert report.passed, [row for row in report.rows if not row.passed]
    here, there = camrt.load(small, "onnxruntime", threads=2), camrt.load(small, "openvino", threads=2)
    assert str(there.backend).startswith("openvino 20") and str(there.backend).endswith("on the CPU, 2 threads")
    assert there.provenance["engine"] == str(there.backend)
    images = smooth_images((3, 32, 32), 5)
    for method in METHODS:
        for some in (images, images[:1]):
            want, got = (e.explain(some, method, 1) for e in (here, there))
            assert cosine_distance(minmax(got.maps), minmax(want.maps)) < 1e-5, method
    again = pickle.loads(pickle.dumps(there))
    np.testing.assert_array_equal(again.explain(images, "winsor_cam").maps, there.explain(images, "winsor_cam").maps)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: there.explain(images[:1], "score_cam_pp", 1).maps, range(8)))
    for maps in found:
        np.testing.assert_array_equal(maps, found[0])


@needs_openvino
def test_a_program_that_openvino_cannot_run_is_a_line(small: Path, tmp_path: Path) -> None:
    backend = create("openvino")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(camrt.CamrtError, match=r"broken.onnx: OpenVINO cannot load it: "):
        backend.compiled(broken, True, False)  # type: ignore[attr-defined]
    bundle = read_bundle(small)
    program = backend.open(bundle, bundle.program(Kind.CLASSIFY))
    with pytest.raises(camrt.CamrtError, match=r"OpenVINO refused image \(2, 3, 31, 32\)"):
        program.run({"image": np.zeros((2, 3, 31, 32), np.float32)})


def has_bfloat16() -> bool:
    return create("openvino").has_bfloat16()  # type: ignore[attr-defined]


@needs_openvino
def test_masked_images_in_bfloat16_say_how_near_they_are(small: Path) -> None:
    if not has_bfloat16():
        with pytest.raises(camrt.BackendUnavailable, match="this CPU has no arithmetic of bfloat16"):
            camrt.load(small, precision="bf16")
        pytest.skip("this CPU has no arithmetic of bfloat16")
    single, half = camrt.load(small, "onnxruntime"), camrt.load(small, "onnxruntime", precision="bf16")
    assert half.precision == half.provenance["precision"] == "bf16"
    images = smooth_images((3, 32, 32), 3)
    for method, options in (("score_cam_pp", {}), ("score_cam", {}), ("score_cam", {"variant": "pytorch_grad_cam"})):
        want, got = (e.explain(images, method, **options) for e in (single, half))
        true = [cosine_distance(minmax(a[None]), minmax(b[None])) for a, b in zip(got.maps, want.maps, strict=True)]
        assert (np.array(true) > 1e-12).all() and max(true) < 1e-3, method
        said = got.details["map_error"]
        assert (said > np.array(true) / 6).all() and (said < np.array(true) * 10).all(), (method, true, said)
        assert "map_error" not in want.details
    for method in ("winsor_cam", "recipro_cam", "grad_cam"):  # gradients are float32's
        np.testing.assert_array_equal(half.explain(images, method).maps, single.explain(images, method).maps)
    np.testing.assert_array_equal(half.classify(images), single.classify(images))


@needs_openvino
def test_bfloat16_at_the_command_line(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if not has_bfloat16():
        pytest.skip("this CPU has no arithmetic of bfloat16")
    recipe = ["--resize", "32", "32", "--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]
    path, picture = tmp_path / "small.camrt", tmp_path / "picture.png"
    shutil.copytree(small, path)
    assert main(["recipe", str(path), *recipe]) == 0
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(picture)
    common = ["--method", "score_cam_pp", "--precision", "bf16"]
    assert main(["explain", str(path), str(picture), "--out", str(tmp_path / "out"), *common]) == 0
    (line,) = (tmp_path / "out" / "explanations.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)["details"]["map_error"] < 1e-2
    assert main(["explain", str(path), str(picture), "--out", str(tmp_path / "o2"), "--backend", "openvino"]) == 0
