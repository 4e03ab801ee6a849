"""ONNX files that PyTorch never saw: old opsets, folded or not, final Softmax, dynamic and pinned shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import camrt
from camrt.export.autodiff import RULES
from camrt.export.probes import smooth_images
from camrt.runtime.bundle.reading import read_bundle
from camrt.verification.verify import verify

IMAGES = smooth_images((3, 20, 18), 3)


class Graph:
    """Collects nodes and constants of one model."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)

    def weight(self, name: str, *shape: int, scale: float = 0.4, offset: float = 0.0) -> str:
        array = (self.rng.standard_normal(shape) * scale + offset).astype(np.float32)
        return self.constant(name, array)

    def constant(self, name: str, array: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, op_type: str, *inputs: str, out: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, list(inputs), [out], name=f"n_{out}", **attributes))
        return out


def classifier(
    path: Path,
    opset: int = 13,
    batch: int | str = "N",
    size: tuple[Any, Any] = (20, 18),
    softmax: bool = True,
    batch_norm: bool = True,
    flatten: str = "Flatten",
    channels_last: bool = False,
    initializers_are_inputs: bool = False,
) -> Path:
    """A small network with grouped, strided and same-padded convolutions, pooling, Clip and a residual sum."""
    g = Graph()
    x = "data"
    if channels_last:
        x = g.op("Transpose", x, out="nchw", perm=[0, 3, 1, 2])
    x = g.op("Conv", x, g.weight("w0", 8, 3, 3, 3), out="c0", auto_pad="SAME_UPPER", strides=[2, 2])
    if batch_norm:
        stats = [g.weight(f"bn{i}", 8, scale=0.1, offset=o) for i, o in enumerate((1.0, 0.1, 0.0))]
        variance = g.constant("bn3", np.linspace(0.5, 2, 8, dtype=np.float32))
        x = g.op("BatchNormalization", x, *stats, variance, out="b0", epsilon=1e-3)
    x = g.op("Clip", x, g.constant("zero", np.float32(0)), g.constant("six", np.float32(6)), out="a0")
    y = g.op("Conv", x, g.weight("w1", 8, 2, 3, 3), g.weight("v1", 8), out="c1", group=4, pads=[1, 1, 1, 1])
    y = g.op("Relu", y, out="a1")
    x = g.op("Add", x, y, out="sum")
    x = g.op("MaxPool", x, out="pooled", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    x = g.op("Conv", x, g.weight("w2", 12, 8, 1, 1), g.weight("v2", 12), out="c2")
    x = g.op("Sigmoid", x, out="a2")
    x = g.op("GlobalAveragePool", x, out="mean")
    if flatten == "Flatten":
        x = g.op("Flatten", x, out="flat")
    elif flatten == "Reshape":
        x = g.op("Reshape", x, g.constant("target", np.array([1, 12], np.int64)), out="flat")
    elif flatten == "Reshape -1":
        x = g.op("Reshape", x, g.constant("target", np.array([1, -1], np.int64)), out="flat", allowzero=1)
    else:  # the pattern that older exporters write: Reshape to (Shape(x)[0], -1)
        g.op("Shape", x, out="shape")
        g.op("Gather", "shape", g.constant("index", np.array(0, np.int64)), out="n", axis=0)
        if opset < 13:
            g.op("Unsqueeze", "n", out="n1", axes=[0])
        else:
            g.op("Unsqueeze", "n", g.constant("axes", np.array([0], np.int64)), out="n1")
        g.op("Concat", "n1", g.constant("rest", np.array([-1], np.int64)), out="target", axis=0)
        x = g.op("Reshape", x, "target", out="flat")
    x = g.op("Gemm", x, g.weight("w3", 6, 12), g.weight("v3", 6), out="scores", transB=1)
    if softmax:
        x = g.op("Softmax", x, out="probabilities", axis=1)
    shape = [batch, *size, 3] if channels_last else [batch, 3, *size]
    inputs = [helper.make_tensor_value_info("data", TensorProto.FLOAT, shape)]
    if initializers_are_inputs:
        inputs += [helper.make_tensor_value_info(c.name, c.data_type, list(c.dims)) for c in g.constants]
    outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, [batch, 6])]
    model = helper.make_model(
        helper.make_graph(g.nodes, "classifier", inputs, outputs, g.constants),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=6 if opset < 13 else 8,
    )
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def scores_of(path: Path, images: np.ndarray, transpose: bool = False) -> np.ndarray:
    """What ONNX Runtime computes from the untouched file, image by image."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    feeds = [images[i : i + 1].transpose(0, 2, 3, 1) if transpose else images[i : i + 1] for i in range(len(images))]
    return np.concatenate([np.asarray(session.run(None, {name: f})[0]) for f in feeds])


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("opset", [18, 22])
@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool", "LpPool"])
def test_ceil_mode_with_a_window_that_starts_in_the_padding(kind: str, opset: int, tmp_path: Path) -> None:
    """Before opset 22 ONNX counts it, and ONNX Runtime leaves it out; of the columns, the last window hangs over."""
    g = Graph()
    x = g.op("Conv", "data", g.weight("w", 8, 3, 3, 3), out="c", pads=[1, 1, 1, 1])
    x = g.op(kind, x, out="pooled", kernel_shape=[2, 3], strides=[4, 2], ceil_mode=1)
    x = g.op("GlobalAveragePool", g.op("Tanh", x, out="t"), out="mean")
    x = g.op("Gemm", g.op("Flatten", x, out="flat"), g.weight("w1", 8, 6), out="scores")
    inputs, outputs = (
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape)]
        for n, shape in (("data", ["N", 3, 20, 18]), (x, ["N", 6]))
    )
    graph = helper.make_graph(g.nodes, "net", inputs, outputs, g.constants)
    source = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), source)
    path = camrt.export_onnx(source, tmp_path / "model.camrt", layers=["n_c"])
    assert verify(path).passed
    np.testing.assert_allclose(camrt.load(path).classify(IMAGES), scores_of(source, IMAGES), atol=1e-5)


VARIANTS = {
    "opset 11": {"opset": 11},
    "opset 11, shape pattern, inputs": {"opset": 11, "flatten": "Shape", "initializers_are_inputs": True},
    "opset 12, folded, no softmax": {"opset": 12, "batch_norm": False, "softmax": False},
    "opset 13, shape pattern": {"opset": 13, "flatten": "Shape"},
    "opset 17": {"opset": 17, "softmax": False},
    "opset 21": {"opset": 21},
    "pinned batch": {"batch": 1},
    "pinned batch, pinned reshape": {"batch": 1, "flatten": "Reshape"},
    "pinned batch, open reshape": {"batch": 1, "flatten": "Reshape -1", "opset": 17},
    "channels last": {"channels_last": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_foreign_file_is_explained_and_verified(variant: str, tmp_path: Path) -> None:
    options = VARIANTS[variant]
    source = classifier(tmp_path / "model.onnx", **options)
    path = camrt.export_onnx(source, tmp_path / "model.camrt")
    explainer = camrt.load(path)
    manifest = explainer.manifest
    assert manifest.final_activation == ("Softmax" if options.get("softmax", True) else None)
    assert manifest.batch == "dynamic" and manifest.seeds_share_image
    assert [t.name for t in manifest.taps if "conv" in t.roles] == ["n_c0", "n_c1", "n_c2"]
    assert [t.name for t in manifest.taps if "last" in t.roles] == ["n_a2"]
    assert manifest.taps[0].batch_norm == ("after" if options.get("batch_norm", True) else "none")

    logits = explainer.classify(IMAGES)
    want = scores_of(source, IMAGES, options.get("channels_last", False))
    np.testing.assert_allclose(softmax(logits) if options.get("softmax", True) else logits, want, atol=1e-5)
    report = verify(path)
    assert report.passed and str(source) in report.oracle, [r for r in report.rows if not r.passed]
    several = explainer.explain(IMAGES[:1], target=[[0, 1, 2]])
    single = explainer.explain(IMAGES[:1], target=1)
    np.testing.assert_allclose(several.maps[:, 1], single.maps, atol=1e-5)


def test_a_bundle_whose_source_is_gone_verifies_against_its_own_graph(tmp_path: Path) -> None:
    source = classifier(tmp_path / "model.onnx")
    path = camrt.export_onnx(source, tmp_path / "model.camrt")
    source.unlink()
    report = verify(path)
    assert report.passed and "own forward graph" in report.oracle


def test_verification_fails_on_wrong_gradients(tmp_path: Path) -> None:
    """A rule that is wrong by a factor is found, on every tap behind it and in the maps."""
    right = RULES["Sigmoid"]
    RULES["Sigmoid"] = lambda op, node, g: (op.Mul(g, node.outputs[0]),)
    try:
        path = camrt.export_onnx(classifier(tmp_path / "model.onnx"), tmp_path / "model.camrt")
    finally:
        RULES["Sigmoid"] = right
    failed = {r.subject for r in verify(path).rows if not r.passed}
    assert {"gradient n_c0", "gradient n_c1", "gradient n_c2"} <= failed
    assert any(s.startswith("winsor_cam") for s in failed)
    assert not any(s.startswith(("activation", "logits")) for s in failed)


def test_dynamic_sizes_are_fixed_by_input_shape(tmp_path: Path) -> None:
    source = classifier(tmp_path / "model.onnx", size=("h", "w"))
    path = camrt.export_onnx(source, tmp_path / "model.camrt", input_shape=(3, 24, 22))
    assert read_bundle(path).manifest.input_shape == (3, 24, 22)
    assert verify(path).passed


def test_layers_by_node_or_tensor_name(tmp_path: Path) -> None:
    source = classifier(tmp_path / "model.onnx")
    path = camrt.export_onnx(source, tmp_path / "model.camrt", layers=["c1", "n_a1"])
    assert [t.name for t in read_bundle(path).manifest.taps] == ["n_c1", "n_a1"]


def with_outputs(path: Path, *names: str) -> Path:
    model = onnx.load(str(path))
    for name in names:
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    onnx.save(model, str(path))
    return path


def test_one_of_several_outputs_is_chosen(tmp_path: Path) -> None:
    source = with_outputs(classifier(tmp_path / "model.onnx"), "a2")
    with pytest.raises(
        camrt.CamrtError, match=r"has 2 outputs \(probabilities \[N,6\], a2\): choose the logits with output="
    ):
        camrt.export_onnx(source, tmp_path / "model.camrt")
    with pytest.raises(camrt.CamrtError, match=r"no output 'scores': it has probabilities \[N,6\], a2"):
        camrt.export_onnx(source, tmp_path / "model.camrt", output="scores")
    path = camrt.export_onnx(source, tmp_path / "model.camrt", output="probabilities")
    assert verify(path).passed


def random_operator(path: Path) -> Path:
    model = onnx.load(str(classifier(path)))
    next(n for n in model.graph.node if n.name == "n_a2").op_type = "RandomNormalLike"
    onnx.save(model, str(path))
    return path


def changed(change: Callable[[onnx.GraphProto], object]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        model = onnx.load(str(classifier(path)))
        change(model.graph)
        onnx.save(model, str(path))
        return path

    return make


def first(graph: onnx.GraphProto, kind: str, name: str, value: object) -> None:
    """Sets an attribute of the graph's first node of a kind."""
    node = next(n for n in graph.node if n.op_type == kind)
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def second_input(graph: onnx.GraphProto) -> None:
    graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    for node in graph.node:
        node.input[:] = ["both" if name == "data" else name for name in node.input]
    graph.node.insert(0, helper.make_node("Add", ["data", "more"], ["both"]))


def test_an_operator_without_a_rule_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, "Sigmoid")
    with pytest.raises(
        camrt.CamrtError,
        match=r"no gradient rule for Sigmoid \(node 'n_a2', between 'n_c2' and the logits\): tap a later layer",
    ):
        camrt.export_onnx(classifier(tmp_path / "model.onnx"), tmp_path / "model.camrt")


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (
            changed(lambda g: first(g, "MaxPool", "strides", [1 << 20] * 2)),
            {},
            r"window of MaxPool 'n_pooled' .*1048576",
        ),
        (
            changed(lambda g: first(g, "Conv", "strides", [1 << 20] * 2)),
            {},
            r"has the sizes \[.*0,0\]: this is no usable network",
        ),
        (changed(lambda g: g.initializer[0].dims.append(7)), {}, r"its tensor '.*' is damaged"),
        (changed(lambda g: g.node[1].ClearField("output")), {}, "could not be converted to 18: Input b0 is undefined"),
        (
            changed(second_input),
            {},
            r"the model has 2 inputs \(data \[N,3,20,18\], more \[1\]\): camrt explains models with one image input",
        ),
        (
            changed(lambda g: setattr(g.input[0].type.tensor_type, "elem_type", TensorProto.STRING)),
            {},
            "camrt takes images of a floating type, uint8, int8",
        ),
        (
            random_operator,
            {},
            r"RandomNormalLike \(node 'n_a2'\) draws random numbers",
        ),
        (classifier, {"layers": ["n_c3"]}, r"no layer 'n_c3': did you mean 'n_c"),
        (classifier, {"input_shape": (3, 32, 32)}, r"input_shape=\(3, 32, 32\) does not fit the model's input"),
        (
            lambda p: classifier(p, size=("h", "w")),
            {},
            r"has dynamic sizes .*: pass input_shape=\(channels, height, width\)",
        ),
        (lambda p: classifier(p).with_name("missing.onnx"), {}, r"missing\.onnx: no such file"),
        (lambda p: p.write_bytes(b"not a model") and p, {}, "not readable as ONNX"),
        (lambda p: classifier(p), {"output": "none"}, "no output 'none'"),
    ],
    ids=[
        "window",
        "sizes",
        "tensor",
        "invalid",
        "inputs",
        "type",
        "operator",
        "layer",
        "shape",
        "dynamic",
        "missing",
        "garbage",
        "output",
    ],
)
def test_refusals_are_one_line(tmp_path: Path, make, arguments: dict, message: str) -> None:
    source = make(tmp_path / "model.onnx")
    with pytest.raises(camrt.CamrtError, match=message) as caught:
        camrt.export_onnx(source, tmp_path / "model.camrt", **arguments)
    assert "\n" not in str(caught.value) and not (tmp_path / "model.camrt").exists()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    source = classifier(tmp_path / "model.onnx")
    source.write_bytes(source.read_bytes()[:1000])
    with pytest.raises(camrt.CamrtError, match="not readable as ONNX"):
        camrt.export_onnx(source, tmp_path / "model.camrt")


def test_an_output_that_is_no_list_of_classes_is_refused(tmp_path: Path) -> None:
    source = with_outputs(classifier(tmp_path / "model.onnx"), "a2")
    with pytest.raises(camrt.CamrtError, match=r"output 'a2' has 4 axes, \[.*\]: camrt explains classifiers"):
        camrt.export_onnx(source, tmp_path / "model.camrt", output="a2")


def weight_standardised(path: Path) -> Path:
    """The weight of its convolution is computed by a Reshape to [1, ...], which has nothing to do with the batch."""
    g = Graph()
    g.weight("w", 64, 64, 3, 3)
    g.op("Reshape", "w", g.constant("flat", np.array([1, 64, -1], np.int64)), out="rows")
    g.op("ReduceMean", "rows", out="mean", axes=[2], keepdims=1)
    g.op("Sub", "rows", "mean", out="centred")
    g.op("Reshape", "centred", g.constant("back", np.array([64, 64, 3, 3], np.int64)), out="kernel")
    g.op("Conv", "data", g.weight("w0", 64, 3, 3, 3), out="c0")
    g.op("Conv", "c0", "kernel", out="c1")
    g.op("GlobalAveragePool", "c1", out="pooled")
    g.op("Flatten", "pooled", out="scores")
    return saved(g, path)


def channels_last_head(path: Path) -> Path:
    """Its last feature map is channels-last."""
    g = Graph()
    g.op("Conv", "data", g.weight("w0", 6, 3, 3, 3), out="c0")
    g.op("Relu", "c0", out="a0")
    g.op("Transpose", "a0", out="turned", perm=[0, 2, 3, 1])
    g.op("Sigmoid", "turned", out="squashed")
    g.op("ReduceMean", "squashed", out="scores", axes=[1, 2], keepdims=0)
    return saved(g, path)


def computed_bias(path: Path) -> Path:
    """A batch norm behind a convolution whose bias is computed, which folding must leave alone."""
    g = Graph()
    scale, zero = g.constant("scale", np.float32(0.05)), g.constant("zero_point", np.int32(0))
    g.op("DequantizeLinear", g.constant("q", np.arange(-8, 8, dtype=np.int32) * 9), scale, zero, out="bias")
    g.op("Conv", "data", g.weight("w0", 16, 3, 3, 3), "bias", out="c0")
    stats = [g.weight(f"bn{i}", 16, scale=0.1, offset=o) for i, o in enumerate((1.0, 0.1, 0.0, 1.0))]
    g.op("BatchNormalization", "c0", *stats, out="b0")
    g.op("GlobalAveragePool", "b0", out="pooled")
    g.op("Flatten", "pooled", out="scores")
    return saved(g, path)


def saved(g: Graph, path: Path) -> Path:
    inputs = [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["N", 3, 20, 18])]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, None)]
    graph = helper.make_graph(g.nodes, "head", inputs, outputs, g.constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path


@pytest.mark.parametrize("make", [weight_standardised, channels_last_head, computed_bias])
def test_bundles_compute_what_their_source_computes(make, tmp_path: Path) -> None:
    source = make(tmp_path / "model.onnx")
    explainer = camrt.load(camrt.export_onnx(source, tmp_path / "model.camrt"))
    want = scores_of(source, IMAGES)
    logits = explainer.classify(IMAGES)
    got = 1 / (1 + np.exp(-logits)) if explainer.manifest.final_activation == "Sigmoid" else logits
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(explainer.explain(IMAGES, "grad_cam").logits, logits, rtol=1e-4, atol=1e-4)
    last = [t for t in explainer.manifest.taps if "last" in t.roles]
    want_last = {weight_standardised: ("n_c1", 64, "NCHW"), computed_bias: ("n_b0", 16, "NCHW")}
    assert [(t.name, t.channels, t.layout) for t in last] == [want_last.get(make, ("n_squashed", 6, "NHWC"))]
    if make is channels_last_head:
        assert verify(tmp_path / "model.camrt").passed


def test_missing_external_weights_are_named(tmp_path: Path) -> None:
    source = weight_standardised(tmp_path / "model.onnx")
    onnx.save(onnx.load(str(source)), str(source), save_as_external_data=True, location="model.data", size_threshold=0)
    (tmp_path / "model.data").unlink()
    with pytest.raises(camrt.CamrtError, match=r"its weights lie in 'model\.data', which is missing"):
        camrt.export_onnx(source, tmp_path / "model.camrt")
