"""Exported programs in engines that camrt does not use: every program and map within the limits of `camrt verify`."""

from __future__ import annotations

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
from support import SmallNet, small_net
from torch import nn

import camrt
from camrt.export.precision import to_half
from camrt.export.pytorch.autograd import record
from camrt.export.tape import Tape, attribute, output
from camrt.runtime.bundle.kinds import Kind
from camrt.runtime.bundle.reading import Bundle, read_bundle
from camrt.runtime.explainer import Explainer
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
