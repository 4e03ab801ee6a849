"""ONNX files of the kinds that users bring: what other exporters, converters and tools write around an ordinary
network.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from test_onnx import Graph, classifier, scores_of, softmax

import camrt
from camrt.export.probes import smooth_images
from camrt.verification.verify import verify

SIZE = (20, 18)
IMAGES = smooth_images((3, *SIZE), 3)


def saved(
    g: Graph,
    path: Path,
    out: str = "scores",
    batch: int | str = "N",
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
    shape: tuple[Any, ...] | None = None,
    out_kind: int = TensorProto.FLOAT,
) -> Path:
    inputs = [helper.make_tensor_value_info("data", kind, [batch, *(shape or (3, *SIZE))])]
    outputs = [helper.make_tensor_value_info(out, out_kind, None)]
    graph = helper.make_graph(g.nodes, "file", inputs, outputs, g.constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), str(path))
    return path


def trunk(g: Graph, x: str = "data", channels: int = 3) -> str:
    """A convolution and a rectifier: (N, 12, 10, 9)."""
    g.op("Conv", x, g.weight("w0", 12, channels, 3, 3), g.weight("v0", 12), out="c0", strides=[2, 2], pads=[1, 1, 1, 1])
    return g.op("Relu", "c0", out="a0")


def head(g: Graph, x: str, width: int = 12, out: str = "scores") -> str:
    """(N, width) -> (N, 6)."""
    return g.op("Gemm", x, g.weight("wf", width, 6), g.weight("vf", 6), out=out)


def ints(g: Graph, name: str, *values: int) -> str:
    return g.constant(name, np.array(values, np.int64))


def exported(source: Path, **arguments: Any) -> tuple[camrt.Explainer, list[str]]:
    """The bundle, opened, and what was said of it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        path = camrt.export_onnx(source, source.with_suffix(".camrt"), **arguments)
    return camrt.load(path), [str(w.message) for w in seen if w.category is UserWarning]


def assert_right(source: Path, images: np.ndarray = IMAGES, **arguments: Any) -> camrt.Explainer:
    """The bundle's scores are the file's, image by image, and its gradients those of float64 autograd."""
    explainer, _ = exported(source, **arguments)
    count = len(images) if explainer.manifest.batch != 1 else 1
    want = scores_of(source, images[:count]).reshape(count, -1)
    np.testing.assert_allclose(explainer.classify(images[:count]), want, rtol=1e-4, atol=1e-5)
    report = verify(explainer.bundle.path)
    assert report.passed, [r for r in report.rows if not r.passed][:3]
    return explainer


# ---- a batch that was traced as 1 and written down


def pinned_row(g: Graph) -> str:
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    return head(g, g.op("Reshape", "pooled", ints(g, "row", 1, 12), out="rows"))


def pinned_rest(g: Graph) -> str:
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    return head(g, g.op("Reshape", "pooled", ints(g, "row", 1, -1), out="rows"))


def pinned_windows(g: Graph) -> str:
    """A view of (1, 12, 2, 5, 9), taken apart into windows whose number holds the batch, and put together again."""
    g.op("Reshape", trunk(g), ints(g, "s0", 1, 12, 2, 5, 9), out="apart")
    g.op("Transpose", "apart", out="turned", perm=[0, 2, 1, 3, 4])
    g.op("Reshape", "turned", ints(g, "s1", 2, 12, 5, 9), out="windows")
    g.op("Relu", "windows", out="inside")
    g.op("Reshape", "inside", ints(g, "s2", 1, 2, 12, 5, 9), out="back")
    g.op("Transpose", "back", out="straight", perm=[0, 2, 1, 3, 4])
    g.op("Reshape", "straight", ints(g, "s3", 1, 12, 10, 9), out="whole")
    g.op("GlobalAveragePool", "whole", out="pooled")
    return head(g, g.op("Flatten", "pooled", out="rows"))


def pinned_sequence_first(g: Graph) -> str:
    """(length, batch, features), split into heads behind the batch, as PyTorch's MultiheadAttention does."""
    g.op("Reshape", trunk(g), ints(g, "s0", 1, 12, 90), out="flat")
    g.op("Transpose", "flat", out="first", perm=[2, 0, 1])
    g.op("Reshape", "first", ints(g, "s1", 90, 3, 4), out="heads")
    g.op("Transpose", "heads", out="by_head", perm=[1, 0, 2])
    g.op("Transpose", "by_head", out="keys", perm=[0, 2, 1])
    g.op("Softmax", g.op("MatMul", "by_head", "keys", out="scored"), out="attention", axis=-1)
    g.op("MatMul", "attention", "by_head", out="mixed")
    g.op("Transpose", "mixed", out="positions", perm=[1, 0, 2])
    g.op("Reshape", "positions", ints(g, "s2", 90, 1, 12), out="joined")
    g.op("ReduceMean", "joined", out="rows", axes=[0], keepdims=0)
    return head(g, "rows")


def pinned_class_token(g: Graph) -> str:
    g.op("Reshape", trunk(g), ints(g, "s0", 1, 12, 90), out="flat")
    g.op("Transpose", "flat", out="tokens", perm=[0, 2, 1])
    g.op("Concat", g.weight("token", 1, 1, 12), "tokens", out="all", axis=1)
    g.op("MatMul", "all", g.op("Transpose", "all", out="turned", perm=[0, 2, 1]), out="scored")
    g.op("MatMul", g.op("Softmax", "scored", out="attention", axis=-1), "all", out="mixed")
    g.op("Gather", "mixed", g.constant("zero", np.array(0, np.int64)), out="rows", axis=1)
    return head(g, "rows")


def squeezed(g: Graph) -> str:
    """A Squeeze without axes takes out the batch of one as well."""
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    return head(g, g.op("Reshape", g.op("Squeeze", "pooled", out="bare"), ints(g, "row", 1, 12), out="rows"))


def assigned(g: Graph) -> str:
    """x[:, 2:6] *= 2, with the indices of the one image that was traced."""
    index = np.stack(np.meshgrid([0], range(2, 6), range(10), range(9), indexing="ij"), axis=-1)
    g.op("Slice", trunk(g), *(ints(g, f"b{i}", n) for i, n in enumerate((2, 6, 1))), out="part")
    g.op("Mul", "part", g.constant("two", np.float32(2)), out="twice")
    g.op("ScatterND", "a0", g.constant("index", index), "twice", out="whole")
    g.op("GlobalAveragePool", "whole", out="pooled")
    return head(g, g.op("Flatten", "pooled", out="rows"))


def upsampled(g: Graph) -> str:
    """A Resize to sizes that state the batch."""
    g.op("Resize", trunk(g), "", "", ints(g, "sizes", 1, 12, 20, 18), out="large", mode="linear")
    g.op("GlobalAveragePool", "large", out="pooled")
    return head(g, g.op("Flatten", "pooled", out="rows"))


def padded_by_shape(g: Graph) -> str:
    """A Pad whose amounts are computed, as PyTorch's legacy exporter writes F.pad."""
    g.op("ConstantOfShape", ints(g, "four", 4), out="zeros", value=numpy_helper.from_array(np.zeros(1, np.int64)))
    g.op("Concat", ints(g, "pads", 0, 1, 0, 1), "zeros", out="listed", axis=0)
    g.op("Reshape", "listed", ints(g, "pairs", -1, 2), out="paired")
    g.op("Slice", "paired", *(ints(g, f"p{i}", n) for i, n in enumerate((-1, -(2**40), 0, -1))), out="reversed")
    g.op("Transpose", "reversed", out="turned", perm=[1, 0])
    g.op("Reshape", "turned", ints(g, "flat", -1), out="amounts")
    g.op("Pad", trunk(g), "amounts", out="wide")
    g.op("GlobalAveragePool", "wide", out="pooled")
    return head(g, g.op("Flatten", "pooled", out="rows"))


def strided(g: Graph) -> str:
    """A pooled map as PyTorch's newer exporter writes its as_strided: every element of a vector in its order."""
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    g.op("Reshape", "pooled", ints(g, "flat", -1), out="vector")
    g.op("Gather", g.op("Shape", "pooled", out="sizes"), g.constant("first", np.array(0, np.int64)), out="batch")
    zero, one, width = (g.constant(f"i{n}", np.array(n, np.int64)) for n in (0, 1, 12))
    g.op("Mul", g.op("Range", zero, "batch", one, out="images"), width, out="starts")
    g.op("Unsqueeze", "starts", ints(g, "second", 1), out="column")
    g.op("Add", "column", g.constant("offsets", np.arange(12)[None]), out="indices")
    return head(g, g.op("Gather", "vector", "indices", out="rows"))


def of_a_constant(g: Graph) -> str:
    """A convolution, with its bias, of what is no image: FullGrad has nothing to explain there."""
    trunk(g)
    pads = [1, 1, 1, 1]
    g.op(
        "Conv",
        g.weight("places", 1, 4, 10, 9),
        g.weight("wp", 12, 4, 3, 3),
        g.weight("vp", 12),
        out="encoded",
        pads=pads,
    )
    g.op("GlobalAveragePool", g.op("Add", "a0", "encoded", out="placed"), out="pooled")
    return head(g, g.op("Flatten", "pooled", out="rows"))


def padded_apart(g: Graph) -> str:
    """The padding of a convolution as TensorFlow has it: on channels-last maps, before the map is turned."""
    g.op("Transpose", trunk(g), out="last", perm=[0, 2, 3, 1])
    g.op("Pad", "last", ints(g, "pads", 0, 0, 0, 0, 0, 1, 1, 0), out="wide")
    g.op("Transpose", "wide", out="first", perm=[0, 3, 1, 2])
    g.op("Relu", g.op("Conv", "first", g.weight("w1", 12, 1, 3, 3), out="c1", group=12, strides=[2, 2]), out="a1")
    g.op("GlobalAveragePool", "a1", out="pooled")
    return head(g, g.op("Flatten", "pooled", out="rows"))


def shifted_by_one(g: Graph) -> str:
    """NASNet's reduction: one of two paths starts a row and a column later, on a small grid."""
    trunk(g)
    g.op("Conv", "a0", g.weight("wr", 12, 12, 3, 3), out="small", strides=[2, 2], pads=[1, 1, 1, 1])
    g.op("AveragePool", "small", out="even", kernel_shape=[1, 1], strides=[2, 2])
    g.op("Pad", "small", ints(g, "pads", 0, 0, 0, 0, 0, 0, 1, 1), out="wide")
    g.op("Slice", "wide", ints(g, "from", 1, 1), ints(g, "to", 99, 99), ints(g, "along", 2, 3), out="moved")
    g.op("AveragePool", "moved", out="odd", kernel_shape=[1, 1], strides=[2, 2])
    g.op("Relu", g.op("Concat", "even", "odd", out="both", axis=1), out="a1")
    g.op("GlobalAveragePool", "a1", out="pooled")
    return head(g, g.op("Flatten", "pooled", out="rows"), 24)


def standardised(g: Graph) -> str:
    """A weight that is standardised by a batch norm in training mode, as weight-standardised convolutions are
    written.
    """
    weight = g.op("Reshape", g.weight("w", 12, 3, 3, 3), ints(g, "one", 1, 12, -1), out="rows")
    ones, zeros = (g.constant(n, np.full(12, v, np.float32)) for n, v in (("ones", 1), ("zeros", 0)))
    g.op("BatchNormalization", weight, ones, zeros, zeros, ones, out="even", training_mode=1)
    g.nodes[-1].output.extend(["mean", "variance"])
    g.op("Reshape", "even", ints(g, "back", 12, 3, 3, 3), out="kernel")
    g.op("Relu", g.op("Conv", "data", "kernel", out="c0"), out="a0")
    g.op("GlobalAveragePool", "a0", out="pooled")
    return head(g, g.op("Flatten", "pooled", out="flat"))


def turned_rows(g: Graph) -> str:
    """A Gemm whose first operand is transposed."""
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    g.op("Transpose", g.op("Flatten", "pooled", out="rows"), out="columns", perm=[1, 0])
    return g.op("Gemm", "columns", g.weight("wf", 12, 6), out="scores", transA=1)


def one_score(g: Graph) -> str:
    """A product with a vector of weights: (N,)."""
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    return g.op("MatMul", g.op("Flatten", "pooled", out="rows"), g.weight("wf", 12), out="scores")


PINNED = [
    pinned_row,
    pinned_rest,
    pinned_windows,
    pinned_sequence_first,
    pinned_class_token,
    squeezed,
    assigned,
    upsampled,
]


@pytest.mark.parametrize("declared", [1, "N"])
@pytest.mark.parametrize(
    "make",
    [
        *PINNED,
        padded_by_shape,
        strided,
        one_score,
        of_a_constant,
        padded_apart,
        standardised,
        turned_rows,
        shifted_by_one,
    ],
)
def test_a_traced_batch_is_freed(make: Callable[[Graph], str], declared: int | str, tmp_path: Path) -> None:
    g = Graph()
    make(g)
    explainer = assert_right(saved(g, tmp_path / "model.onnx", batch=declared))
    assert explainer.manifest.batch == "dynamic" and explainer.manifest.last_layer is not None
    several = explainer.explain(IMAGES, "grad_cam", 0, ["n_c0"]).maps
    alone = [explainer.explain(IMAGES[i : i + 1], "grad_cam", 0, ["n_c0"]).maps[0] for i in range(3)]
    np.testing.assert_allclose(several, alone, atol=1e-4)


@pytest.mark.parametrize("form", ["squeezed and back", "a vector", "flat scores", "squeezed softmax"])
def test_a_file_for_one_image_is_explained_one_image_at_a_time(form: str, tmp_path: Path) -> None:
    g = Graph()
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    if form in ("flat scores", "squeezed softmax"):
        head(g, g.op("Flatten", "pooled", out="rows"), out="z")
        if form == "flat scores":
            g.op("Reshape", "z", ints(g, "all", -1), out="scores")
        else:
            g.op("Softmax", g.op("Squeeze", "z", out="vector"), out="scores", axis=0)
    elif form == "a vector":
        g.op("Reshape", "pooled", ints(g, "all", -1), out="vector")
        g.op("Add", g.op("MatMul", "vector", g.weight("wf", 12, 6), out="product"), g.weight("vf", 6), out="scores")
    else:
        head(g, g.op("Unsqueeze", g.op("Squeeze", "pooled", out="vector"), ints(g, "front", 0), out="rows"))
    source = saved(g, tmp_path / "model.onnx", batch=1)
    explainer, said = exported(source)
    assert explainer.manifest.batch == 1
    assert any("the bundle explains one image at a time (batch 1)" in s for s in said)
    logits, want = explainer.classify(IMAGES[:1])[0], scores_of(source, IMAGES[:1]).reshape(-1)
    np.testing.assert_allclose(softmax(logits[None])[0] if "softmax" in form else logits, want, rtol=1e-4)
    report = verify(explainer.bundle.path)
    assert report.passed, [r for r in report.rows if not r.passed][:3]


def test_a_batch_of_four_is_freed(tmp_path: Path) -> None:
    g = Graph()
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    head(g, g.op("Reshape", "pooled", ints(g, "row", 4, 12), out="rows"))
    explainer, _ = exported(saved(g, tmp_path / "model.onnx", batch=4))
    assert explainer.manifest.batch == "dynamic" and explainer.classify(IMAGES).shape == (3, 6)


def test_a_branch_that_the_sizes_decide_is_taken(tmp_path: Path) -> None:
    """As the legacy exporter writes squeeze(2): an If over the size of an axis."""
    g = Graph()
    g.op("ReduceMean", trunk(g), out="rows", axes=[2], keepdims=1)
    g.op("Shape", "rows", out="shape")
    g.op("Gather", "shape", g.constant("axis", np.array(2, np.int64)), out="size", axis=0)
    g.op("Equal", "size", g.constant("one", np.array(1, np.int64)), out="single")
    result = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    squeeze = helper.make_node("Squeeze", ["rows", "two"], ["r"])
    then = helper.make_graph([squeeze], "then", [], [result], [numpy_helper.from_array(np.array([2]), "two")])
    same = helper.make_tensor_value_info("s", TensorProto.FLOAT, None)
    other = helper.make_graph([helper.make_node("Identity", ["rows"], ["s"])], "else", [], [same])
    g.op("If", "single", out="narrow", then_branch=then, else_branch=other)
    head(g, g.op("ReduceMean", "narrow", out="mean", axes=[2], keepdims=0))
    assert assert_right(saved(g, tmp_path / "model.onnx")).manifest.batch == "dynamic"


@pytest.mark.parametrize("kind", ["softmax", "mean"])
def test_images_that_change_one_another_are_explained_alone(kind: str, tmp_path: Path) -> None:
    g = Graph()
    trunk(g)
    if kind == "softmax":
        g.op("Softmax", "a0", out="shared", axis=0)
    else:
        g.op("Sub", "a0", g.op("ReduceMean", "a0", out="mean", axes=[0, 2, 3]), out="shared")
    g.op("GlobalMaxPool", "shared", out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"))
    explainer, said = exported(saved(g, tmp_path / "model.onnx"))
    assert explainer.manifest.batch == 1
    assert any(f"(node 'n_{'shared' if kind == 'softmax' else 'mean'}') mixes the images of a batch" in s for s in said)
    maps = [
        camrt.load(explainer.bundle.path, max_batch=n).explain(IMAGES, "grad_cam", 1, ["n_c0"]).maps for n in (1, 16)
    ]
    assert np.array_equal(maps[0], maps[1])


# ---- numbers of other kinds


@pytest.mark.parametrize("name", ["float16", "float64", "bfloat16"])
def test_other_precisions_are_read_as_float32(name: str, tmp_path: Path) -> None:
    source = classifier(tmp_path / "single.onnx", opset=17, softmax=False)
    model = onnx.load(str(source))
    kind = {"float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE, "bfloat16": TensorProto.BFLOAT16}[name]
    for i, tensor in enumerate(model.graph.initializer):
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            wide = array.astype(helper.tensor_dtype_to_np_dtype(kind))
            model.graph.initializer[i].CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.elem_type = kind
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    explainer, said = exported(path)
    assert sum(f"computes in {name}: it is read as float32" in s for s in said) == 1
    want = camrt.load(camrt.export_onnx(source, tmp_path / "single.camrt")).explain(IMAGES, "grad_cam", 1)
    got = explainer.explain(IMAGES, "grad_cam", 1)
    np.testing.assert_allclose(got.maps, want.maps, atol={"float16": 0.02, "float64": 1e-5, "bfloat16": 0.2}[name])


def test_a_picture_of_whole_numbers_goes_in(tmp_path: Path) -> None:
    """uint8, channels last, cast and normalised inside: as TensorFlow's servers have it."""
    g = Graph()
    g.op("Cast", "data", out="numbers", to=TensorProto.FLOAT)
    g.op(
        "Sub",
        g.op("Div", "numbers", g.constant("d", np.float32(127.5)), out="scaled"),
        g.constant("o", np.float32(1)),
        out="centred",
    )
    g.op("GlobalAveragePool", trunk(g, g.op("Transpose", "centred", out="nchw", perm=[0, 3, 1, 2])), out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"))
    source = saved(g, tmp_path / "model.onnx", kind=TensorProto.UINT8, shape=(*SIZE, 3))
    explainer, _ = exported(source)
    pictures = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    session = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    want = np.asarray(session.run(None, {"data": pictures})[0])
    floats = pictures.transpose(0, 3, 1, 2).astype(np.float32)
    np.testing.assert_allclose(explainer.classify(floats), want, rtol=1e-4, atol=1e-5)
    assert [t.name for t in explainer.manifest.taps] == ["n_c0", "n_a0"]
    assert explainer.manifest.normalized is not None and explainer.manifest.normalized.tensor == "nchw"


class Calibration(CalibrationDataReader):
    def __init__(self) -> None:
        self.left = [{"data": image[None]} for image in smooth_images((3, *SIZE), 8, seed=3)]

    def get_next(self) -> Any:
        return self.left.pop() if self.left else None


def quantised(kind: str, source: Path, path: Path) -> None:
    if kind == "dynamic":
        quantize_dynamic(source, path, weight_type=QuantType.QUInt8)
        return
    form = QuantFormat.QOperator if kind == "QOperator" else QuantFormat.QDQ
    quantize_static(source, path, Calibration(), quant_format=form, per_channel=kind == "QDQ per channel")


@pytest.mark.parametrize("kind", ["QDQ", "QDQ per channel", "QOperator", "dynamic"])
def test_quantised_files_give_nearly_the_float_maps(kind: str, tmp_path: Path) -> None:
    source = classifier(tmp_path / "float.onnx", opset=17, softmax=False)
    path = tmp_path / "quantised.onnx"
    quantised(kind, source, path)
    explainer, said = exported(path)
    assert (explainer.manifest.batch == 1) == (kind == "dynamic") and ("batch 1" in "".join(said)) == (
        kind == "dynamic"
    )
    want = camrt.load(camrt.export_onnx(source, tmp_path / "float.camrt"))
    for image in IMAGES:
        got = explainer.explain(image[None], "grad_cam", 1).maps.ravel()
        reference = want.explain(image[None], "grad_cam", 1).maps.ravel()
        cosine = got @ reference / np.linalg.norm(got) / np.linalg.norm(reference)
        assert cosine > 0.95, cosine


def test_operators_on_integers_without_an_exact_form_are_named(tmp_path: Path) -> None:
    g = Graph()
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"))
    g.nodes[-1].op_type, g.nodes[-1].domain = "MatMulIntegerToFloat", "com.microsoft"
    source = saved(g, tmp_path / "model.onnx")
    model = onnx.load(str(source))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(source))
    with pytest.raises(camrt.CamrtError, match=r"quantised: MatMulIntegerToFloat .* has no exact form"):
        camrt.export_onnx(source, tmp_path / "model.camrt")


# ---- heads


def by_hand(g: Graph, kind: str) -> str:
    """What stands behind the logits `scores`, written out; the name of the output."""
    one, axis = g.constant("one", np.float32(1)), ints(g, "axis", 1)
    if kind == "softmax":
        g.op("Exp", "scores", out="e")
        return g.op("Div", "e", g.op("ReduceSum", "e", axis, out="sum"), out="p")
    if kind == "softmax, shifted":
        g.op("Exp", g.op("Sub", "scores", g.op("ReduceMax", "scores", out="top", axes=[1]), out="shifted"), out="e")
        return g.op("Div", "e", g.op("ReduceSum", "e", axis, out="sum"), out="p")
    if kind == "sigmoid":
        g.op("Add", g.op("Exp", g.op("Neg", "scores", out="n"), out="e"), one, out="below")
        return g.op("Div", one, "below", out="p")
    if kind == "log softmax":
        return g.op("Sub", "scores", g.op("ReduceLogSumExp", "scores", out="all", axes=[1]), out="p")
    if kind == "log of softmax":
        return g.op("Log", g.op("Softmax", "scores", out="q", axis=1), out="p")
    if kind == "exp of log softmax":
        return g.op("Exp", g.op("LogSoftmax", "scores", out="q", axis=1), out="p")
    if kind == "softmax, clipped":
        bounds = g.constant("low", np.float32(1e-7)), g.constant("high", np.float32(1 - 1e-7))
        return g.op("Clip", g.op("Softmax", "scores", out="q", axis=1), *bounds, out="p")
    return g.op("Cast", g.op("Softmax", "scores", out="q", axis=1), out="p", to=TensorProto.DOUBLE)


KINDS = {
    "softmax": "Softmax",
    "softmax, shifted": "Softmax",
    "softmax, clipped": "Softmax",
    "softmax, double": "Softmax",
    "exp of log softmax": "Softmax",
    "sigmoid": "Sigmoid",
    "log softmax": "LogSoftmax",
    "log of softmax": "LogSoftmax",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_final_activation_is_set_aside_however_it_is_written(kind: str, tmp_path: Path) -> None:
    g = Graph()
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"))
    plain = camrt.load(camrt.export_onnx(saved(g, tmp_path / "plain.onnx"), tmp_path / "plain.camrt"))
    out = by_hand(g, kind)
    double = TensorProto.DOUBLE if kind == "softmax, double" else TensorProto.FLOAT
    explainer, said = exported(saved(g, tmp_path / "model.onnx", out, out_kind=double))
    assert explainer.manifest.final_activation == KINDS[kind] and not any("probabilities" in s for s in said)
    np.testing.assert_allclose(explainer.classify(IMAGES), plain.classify(IMAGES), atol=1e-6)
    got, want = (e.explain(IMAGES, "grad_cam", 1).maps for e in (explainer, plain))
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("form", ["(N, C, 1, 1)", "(N, 1)", "(N,)"])
def test_heads_of_other_shapes(form: str, tmp_path: Path) -> None:
    g = Graph()
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    if form == "(N, C, 1, 1)":
        g.op("Conv", "pooled", g.weight("wf", 6, 12, 1, 1), out="scores")
    else:
        g.op("Flatten", "pooled", out="rows")
        g.op("Gemm", "rows", g.weight("wf", 12, 1), out="single")
        g.op("Squeeze", "single", ints(g, "axis", 1), out="scores") if form == "(N,)" else g.op(
            "Identity", "single", out="scores"
        )
    explainer = assert_right(saved(g, tmp_path / "model.onnx"))
    assert explainer.manifest.num_classes == (6 if "C" in form else 1)


def test_probabilities_that_cannot_be_taken_apart_are_warned_of(tmp_path: Path) -> None:
    g = Graph()
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"))
    g.op("HardSigmoid", "scores", out="p")
    _, said = exported(saved(g, tmp_path / "model.onnx", "p"))
    assert any("the scores look like probabilities (numbers between 0 and 1)" in s for s in said)
    _, said = exported(classifier(tmp_path / "plain.onnx", softmax=False))
    assert not any("probabilities" in s for s in said)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("in percent", "rows that sum to 100"),
        ("softmax twice", "rows that sum to 1"),
        ("softmax of sigmoid", "numbers between 0 and 1"),
        ("one of a softmax", "numbers between 0 and 1"),
    ],
)
def test_probabilities_behind_something_else_are_warned_of(kind: str, told: str, tmp_path: Path) -> None:
    g = Graph()
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"))
    inner = g.op("Sigmoid" if kind == "softmax of sigmoid" else "Softmax", "scores", out="q")
    if kind == "in percent":
        g.op("Mul", inner, g.constant("hundred", np.float32(100)), out="p")
    elif kind == "one of a softmax":
        g.op("Slice", inner, ints(g, "from", 1), ints(g, "to", 2), ints(g, "along", 1), out="p")
    else:
        g.op("Softmax", inner, out="p")
    _, said = exported(saved(g, tmp_path / "model.onnx", "p"))
    assert any(f"the scores look like probabilities ({told})" in s for s in said), said


def test_large_biases_are_no_probabilities(tmp_path: Path) -> None:
    g = Graph()
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"))
    biased = g.op("Add", "scores", g.constant("biases", np.full(6, 1e4, np.float32)), out="biased")
    g.op("Relu", biased, out="p")
    _, said = exported(saved(g, tmp_path / "model.onnx", "p"))
    assert not any("look like probabilities" in s for s in said), said


@pytest.mark.parametrize("kind", ["percent", "log", "part", "both signs"])
def test_scores_made_of_probabilities_are_warned_of(kind: str, tmp_path: Path) -> None:
    g = Graph()
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"))
    inner = g.op("Sigmoid" if kind in ("percent", "both signs") else "Softmax", "scores", out="q")
    hundred, little = g.constant("hundred", np.float32(100)), g.constant("little", np.float32(1e-8))
    if kind == "log":
        g.op("Log", g.op("Add", inner, little, out="r"), out="p")
    elif kind == "part":
        part = g.op("Slice", inner, ints(g, "from", 1), ints(g, "to", 6), ints(g, "along", 1), out="r")
        g.op("Mul", part, hundred, out="p")
    else:
        g.op("Sub" if kind == "both signs" else "Mul", inner, hundred, out="p")
    _, said = exported(saved(g, tmp_path / "model.onnx", "p"))
    assert any("the scores are computed from a S" in s for s in said), said


def test_scores_of_a_product_may_lie_between_0_and_1(tmp_path: Path) -> None:
    g = Graph()
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    g.op("Flatten", g.op("Sigmoid", "pooled", out="gate"), out="rows")
    g.op("Gemm", "rows", g.constant("wf", np.full((12, 6), 1 / 12, np.float32) * np.arange(1, 7) / 7), out="scores")
    _, said = exported(saved(g, tmp_path / "model.onnx"))
    assert not any("probabilities" in s for s in said), said


@pytest.mark.parametrize("kind", ["the other", "both", "both, the class first"])
def test_one_minus_a_sigmoid_is_taken_apart(kind: str, tmp_path: Path) -> None:
    """Its explanations are those of the same network that ends in the negated logit, or in a softmax over (0, z)."""
    bundles = []
    for form in ("as it is", "taken apart"):
        g = Graph()
        g.op("GlobalAveragePool", trunk(g), out="pooled")
        g.op("Gemm", g.op("Flatten", "pooled", out="rows"), g.weight("wf", 12, 1), g.weight("vf", 1), out="z")
        one = g.constant("one", np.float32(1))
        if form == "as it is":
            g.op("Sub", one, g.op("Sigmoid", "z", out="p"), out="q")
        elif kind == "the other":
            g.op("Neg", "z", out="q")
        else:
            g.op("Mul", "z", g.constant("none", np.float32(0)), out="q")
        second = {"as it is": "p", "taken apart": "z"}[form]
        pair = ("q", second) if kind == "both" else (second, "q")
        out = "q" if kind == "the other" else g.op("Concat", *pair, out="pair", axis=1)
        out = g.op("Sigmoid", "q", out="s") if kind == "the other" and form == "taken apart" else out
        out = g.op("Softmax", "pair", out="s", axis=1) if kind != "the other" and form == "taken apart" else out
        explainer, said = exported(saved(g, tmp_path / f"{form}.onnx", out))
        assert not any("probabilities" in s for s in said), said
        bundles.append(explainer)
    got, want = bundles
    assert got.manifest.final_activation == want.manifest.final_activation
    np.testing.assert_allclose(got.classify(IMAGES), want.classify(IMAGES), atol=1e-6)
    for target in range(got.manifest.num_classes):
        maps = [e.explain(IMAGES, "grad_cam", target).maps for e in (got, want)]
        np.testing.assert_allclose(*maps, atol=1e-6)


@pytest.mark.parametrize("kind", [None, "softmax", "sigmoid"])
def test_what_makes_probabilities_can_be_said(kind: str | None, tmp_path: Path) -> None:
    told: list[str] = []
    source = classifier(tmp_path / "model.onnx", softmax=False)
    path = camrt.export_onnx(source, tmp_path / "model.camrt", activation=kind, progress=told.append)
    explainer = camrt.load(path)
    logits = explainer.classify(IMAGES)
    want = 1 / (1 + np.exp(-logits)) if kind == "sigmoid" else softmax(logits)
    np.testing.assert_allclose(explainer.probabilities(IMAGES), want, rtol=1e-5)
    assert any("a softmax is assumed" in line for line in told) == (kind is None)
    with pytest.raises(camrt.CamrtError, match="activation 'tanh': use softmax or sigmoid"):
        camrt.export_onnx(source, tmp_path / "other.camrt", activation="tanh")


@pytest.mark.parametrize("shape", ["sequence", "grid", "class", "ranked"])
def test_outputs_that_are_no_scores_of_classes_are_refused_by_what_they_are(shape: str, tmp_path: Path) -> None:
    g = Graph()
    trunk(g)
    if shape == "grid":
        g.op("Relu", "a0", out="scores")
    elif shape == "sequence":
        g.op("Reshape", "a0", ints(g, "flat", 0, 12, -1), out="scores")
    elif shape == "ranked":
        g.op("GlobalAveragePool", "a0", out="pooled")
        g.op("TopK", g.op("Flatten", "pooled", out="rows"), ints(g, "five", 5), out="scores")
        g.nodes[-1].output.append("places")
    else:
        g.op("GlobalAveragePool", "a0", out="pooled")
        g.op("ArgMax", g.op("Flatten", "pooled", out="rows"), out="scores", axis=1)
    kind = TensorProto.INT64 if shape == "class" else TensorProto.FLOAT
    message = {
        "sequence": "has 3 axes",
        "grid": "has 4 axes",
        "class": "whole numbers: camrt needs the scores of all",
        "ranked": r"holds the highest scores in order of rank \(TopK\)",
    }[shape]
    with pytest.raises(camrt.CamrtError, match=message):
        camrt.export_onnx(saved(g, tmp_path / "model.onnx", out_kind=kind), tmp_path / "model.camrt")


# ---- "not this class"


def test_not_the_class_of_a_single_score_is_the_other_class_of_two(tmp_path: Path) -> None:
    def net(two: bool) -> camrt.Explainer:
        g = Graph()
        g.op("GlobalAveragePool", trunk(g), out="pooled")
        g.op("Gemm", g.op("Flatten", "pooled", out="rows"), g.weight("wf", 12, 1), out="z")
        g.op("Concat", g.op("Sub", "z", "z", out="nothing"), "z", out="scores", axis=1) if two else g.op(
            "Identity", "z", out="scores"
        )
        return exported(saved(g, tmp_path / f"{two}.onnx"))[0]

    one, two = net(False), net(True)
    for method, options in (
        ("score_cam", {}),
        ("score_cam_pp", {}),
        ("score_cam_pp", {"baseline": "zero"}),
        ("recipro_cam", {}),
        ("grad_cam", {}),
    ):
        got = one.explain(IMAGES, method, "not", **options).maps
        np.testing.assert_allclose(got, one.explain(IMAGES, method, np.array([-1.0]), **options).maps, atol=1e-6)
        want = two.explain(IMAGES, method, np.array([0.0, -1.0]) if method == "grad_cam" else 0, **options).maps
        np.testing.assert_allclose(got, want, atol=2e-3)
    with pytest.raises(camrt.CamrtError, match="target 'not' is for networks with a single score, this one has 2"):
        two.explain(IMAGES, target="not")


# ---- preprocessing inside


def preprocessed(g: Graph, kind: str) -> str:
    """What some exporters put in front of the first convolution, of pictures in 0..255; its output is what `outside`
    computes.
    """
    mean, std = (
        g.constant(n, np.array(v, np.float32).reshape(3, 1, 1))
        for n, v in (("m", [110, 120, 130]), ("s", [60, 50, 55]))
    )
    if kind == "affine":
        return g.op("Div", g.op("Sub", "data", mean, out="shifted"), std, out="ready")
    if kind == "swapped":
        g.op("Gather", "data", ints(g, "order", 2, 1, 0), out="swapped", axis=1)
        return g.op("Div", g.op("Sub", "swapped", mean, out="shifted"), std, out="ready")
    if kind == "planes":
        planes = []
        for i, (m, s) in enumerate(zip([110, 120, 130], [60, 50, 55], strict=True)):
            g.op("Gather", "data", g.constant(f"i{i}", np.array(i, np.int64)), out=f"plane{i}", axis=1)
            g.op("Unsqueeze", f"plane{i}", ints(g, f"u{i}", 1), out=f"channel{i}")
            g.op("Sub", f"channel{i}", g.constant(f"m{i}", np.float32(m)), out=f"centred{i}")
            planes.append(g.op("Div", f"centred{i}", g.constant(f"s{i}", np.float32(s)), out=f"scaled{i}"))
        return g.op("Concat", *planes, out="ready", axis=1)
    if kind in ("grouped", "diagonal"):
        factors = np.array([1 / 60, 1 / 50, 1 / 55], np.float32)
        weight = factors.reshape(3, 1) if kind == "grouped" else np.diag(factors)
        offset = g.constant("offset", np.array([-110 / 60, -120 / 50, -130 / 55], np.float32))
        weight = g.constant("scale", weight[:, :, None, None].astype(np.float32))
        return g.op("Conv", "data", weight, offset, out="ready", group=3 if kind == "grouped" else 1)
    g.op("Expand", "data", ints(g, "three", 1, 3, 1, 1), out="colour")
    return g.op("Div", g.op("Sub", "colour", mean, out="shifted"), std, out="ready")


@pytest.mark.parametrize("kind", ["affine", "swapped", "planes", "grouped", "diagonal", "gray"])
def test_masks_multiply_what_the_first_convolution_reads(kind: str, tmp_path: Path) -> None:
    """A network that normalises its own image has the maps of the same network without, given the normalised image."""
    images = np.clip(IMAGES * 60 + 128, 0, 255)[:, : 1 if kind == "gray" else 3]
    inside = Graph()
    ready = preprocessed(inside, kind)
    inside.op("GlobalAveragePool", trunk(inside, ready), out="pooled")
    head(inside, inside.op("Flatten", "pooled", out="rows"))
    source = saved(inside, tmp_path / "inside.onnx", shape=(images.shape[1], *SIZE))
    explainer, _ = exported(source)
    assert explainer.manifest.normalized is not None and explainer.manifest.normalized.tensor == "ready"
    own = ["n_ready"] if kind in ("grouped", "diagonal") else []  # a convolution is a layer, whatever it is for
    assert [t.name for t in explainer.manifest.taps] == [*own, "n_c0", "n_a0"]

    model = onnx.load(str(source))
    model.graph.output.append(helper.make_tensor_value_info("ready", TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    normalised = np.asarray(session.run(["ready"], {"data": images})[0])
    outside = Graph()
    outside.constants = [c for c in inside.constants if c.name in ("w0", "v0", "wf", "vf")]
    kept = outside.constants
    outside.op("Conv", "data", "w0", "v0", out="c0", strides=[2, 2], pads=[1, 1, 1, 1])
    outside.op("Relu", "c0", out="a0")
    outside.op("GlobalAveragePool", "a0", out="pooled")
    outside.op("Gemm", outside.op("Flatten", "pooled", out="rows"), "wf", "vf", out="scores")
    assert len(kept) == 4
    plain, _ = exported(saved(outside, tmp_path / "outside.onnx"))
    assert plain.manifest.normalized is None
    for method in ("score_cam_pp", "score_cam", "grad_cam", "ablation_cam"):
        got, want = explainer.explain(images, method, 1).maps, plain.explain(normalised, method, 1).maps
        np.testing.assert_allclose(got, want, atol=1e-4, err_msg=method)


def test_an_input_that_nothing_reads_is_left_out(tmp_path: Path) -> None:
    source = classifier(tmp_path / "model.onnx", opset=17, softmax=False)
    model = onnx.load(str(source))
    model.graph.input.insert(0, helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", 10]))
    onnx.save(model, str(source))
    explainer, said = exported(source)
    plain, _ = exported(classifier(tmp_path / "plain.onnx", opset=17, softmax=False))
    assert not said
    np.testing.assert_allclose(explainer.classify(IMAGES), plain.classify(IMAGES), rtol=1e-6)


def test_a_grey_picture_made_inside_moves_no_zero(tmp_path: Path) -> None:
    g = Graph()
    bounds = [ints(g, f"bound{i}", i) for i in range(4)]
    planes = [g.op("Slice", "data", bounds[i], bounds[i + 1], bounds[1], out=f"plane{i}") for i in range(3)]
    grey = g.op("Add", g.op("Add", planes[0], planes[1], out="two"), planes[2], out="grey")
    g.op("GlobalAveragePool", trunk(g, g.op("Concat", grey, grey, grey, out="colour", axis=1)), out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"))
    explainer, said = exported(saved(g, tmp_path / "model.onnx"))
    assert explainer.manifest.normalized is None and not any("masks cannot be applied" in s for s in said)


def test_a_mere_scale_inside_needs_no_programs_of_its_own(tmp_path: Path) -> None:
    g = Graph()
    g.op(
        "GlobalAveragePool", trunk(g, g.op("Div", "data", g.constant("d", np.float32(255)), out="scaled")), out="pooled"
    )
    head(g, g.op("Flatten", "pooled", out="rows"))
    explainer, _ = exported(saved(g, tmp_path / "model.onnx"))
    assert explainer.manifest.normalized is None and {"normalize", "score"}.isdisjoint(
        p.kind for p in explainer.manifest.programs
    )


# ---- files around the graph


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_weights_beside_the_file_are_found_from_anywhere(
    opset: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = classifier(tmp_path / "model.onnx", opset=opset)
    want = scores_of(source, IMAGES)
    beside = tmp_path / "beside"
    beside.mkdir()
    onnx.save(
        onnx.load(str(source)), str(beside / "m.onnx"), save_as_external_data=True, location="w.bin", size_threshold=0
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "w.bin").write_bytes(os.urandom((beside / "w.bin").stat().st_size))  # which must not be read
    monkeypatch.chdir(elsewhere)
    explainer, _ = exported(beside / "m.onnx")
    np.testing.assert_allclose(softmax(explainer.classify(IMAGES)), want, atol=1e-5)


def changed(source: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    model = onnx.load(str(source))
    change(model)
    onnx.save(model, str(source))
    return source


def test_imports_that_nothing_uses_are_dropped(tmp_path: Path) -> None:
    source = classifier(tmp_path / "model.onnx", opset=12)
    changed(source, lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3)))
    assert exported(source)[0].manifest.final_activation == "Softmax"


def first_node(domain: str, kind: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.name == "n_a1")
        node.domain, node.op_type = domain, kind
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))

    return change


def three_axes(model: onnx.ModelProto) -> None:
    del model.graph.input[0].type.tensor_type.shape.dim[0]


def gray_pictures(model: onnx.ModelProto) -> None:
    del model.graph.input[0].type.tensor_type.shape.dim[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(m, "ir_version", 99),
            r"IR version 99, the installed onnx .* knows \d+: install a newer onnx",
        ),
        (lambda m: setattr(m.opset_import[0], "version", 999), r"opset 999, the installed onnx .* knows \d+"),
        (lambda m: setattr(m.opset_import[0], "version", 7), "opset 7, camrt reads opset 9 and later"),
        (
            first_node("my.company", "Swoosh"),
            r"operator my\.company\.Swoosh \(Swoosh \(node 'n_a1'\)\) is a custom one",
        ),
        (first_node("com.microsoft", "FusedConv"), "FusedConv .* is ONNX Runtime's own, written by its optimiser"),
        (first_node("", "Erfc"), "Erfc .* is not an ONNX operator"),
        (gray_pictures, r"has shape \[N,20,18\]: it has no channel axis"),
        (three_axes, r"has shape \[3,20,18\]: it has no batch axis: camrt takes images \(batch, channels"),
    ],
    ids=["ir version", "opset", "old opset", "custom", "fused", "left over", "no channel axis", "no batch axis"],
)
def test_files_that_cannot_be_taken_say_why(
    change: Callable[[onnx.ModelProto], object], message: str, tmp_path: Path
) -> None:
    source = changed(classifier(tmp_path / "model.onnx"), change)
    with pytest.raises(camrt.CamrtError, match=message) as caught:
        camrt.export_onnx(source, tmp_path / "model.camrt")
    assert "\n" not in str(caught.value) and not (tmp_path / "model.camrt").exists()


@pytest.mark.parametrize("kind", ["threshold", "class number"])
def test_decisions_have_no_gradient(kind: str, tmp_path: Path) -> None:
    g = Graph()
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"), out="z")
    if kind == "threshold":
        g.op("Greater", "z", g.constant("half", np.float32(0.5)), out="chosen")
    else:
        g.op("ArgMax", "z", out="chosen", axis=1)
    g.op("Cast", "chosen", out="scores", to=TensorProto.FLOAT)
    with pytest.raises(camrt.CamrtError, match=r"Cast \(node 'n_scores'\) gives a decision, not scores"):
        camrt.export_onnx(saved(g, tmp_path / "model.onnx"), tmp_path / "model.camrt")


def test_a_root_at_zero_costs_full_grad_alone(tmp_path: Path) -> None:
    g = Graph()
    g.op("Sqrt", g.op("Relu", "data", out="positive"), out="root")
    g.op("GlobalAveragePool", trunk(g, "root"), out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"))
    explainer, said = exported(saved(g, tmp_path / "model.onnx"))
    assert any("full_grad holds NaN or infinity" in s and "written without it" in s for s in said)
    assert "full_grad" not in {p.kind for p in explainer.manifest.programs}
    assert np.isfinite(explainer.explain(IMAGES, "grad_cam").maps).all()


def test_the_long_name_of_the_default_domain(tmp_path: Path) -> None:
    def spell_out(model: onnx.ModelProto) -> None:
        model.opset_import[0].domain = "ai.onnx"
        for node in model.graph.node[::2]:
            node.domain = "ai.onnx"

    source = classifier(tmp_path / "model.onnx", opset=17, softmax=False)
    want = scores_of(source, IMAGES)
    explainer, _ = exported(changed(source, spell_out))
    np.testing.assert_allclose(explainer.classify(IMAGES), want, atol=1e-5)


@pytest.mark.parametrize("opset", [9, 10])
def test_linear_upsampling_before_opset_11_samples_asymmetrically(opset: int, tmp_path: Path) -> None:
    g = Graph()
    scales = g.constant("scales", np.array([1, 1, 2, 2], np.float32))
    g.op("Upsample" if opset == 9 else "Resize", trunk(g), scales, out="up", mode="linear")
    g.op("Relu", g.op("Conv", "up", g.weight("w1", 12, 12, 3, 3), out="c1"), out="a1")
    g.op("GlobalAveragePool", "a1", out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"))
    assert_right(saved(g, tmp_path / "model.onnx", opset=opset))


@pytest.mark.parametrize("roi", [(0.5, 0.5, 1, 1), (-0.5, 0, 1.5, 1)])
def test_a_resize_that_crops_the_picture_is_refused(roi: tuple[float, ...], tmp_path: Path) -> None:
    g = Graph()
    region = g.constant("roi", np.array([0, 0, *roi[:2], 1, 1, *roi[2:]], np.float32))
    mode = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}
    g.op("Resize", "data", region, "", ints(g, "sizes", 1, 3, *SIZE), out="cropped", **mode)
    g.op("GlobalAveragePool", trunk(g, "cropped"), out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"))
    with pytest.raises(camrt.CamrtError, match="pads or crops the picture within the network"):
        camrt.export_onnx(saved(g, tmp_path / "model.onnx", batch=1), tmp_path / "model.camrt")


@pytest.mark.parametrize("kind", ["noise", "batch norm", "dropout"])
def test_a_file_in_training_mode(kind: str, tmp_path: Path) -> None:
    g = Graph()
    x = trunk(g)
    if kind == "noise":
        x = g.op("Add", x, g.op("RandomNormalLike", x, out="noise", scale=0.1), out="shaken")
    elif kind == "batch norm":
        g.op("BatchNormalization", x, *(g.weight(f"bn{i}", 12, offset=2.0) for i in range(4)), out="b", training_mode=1)
        g.nodes[-1].output.extend(["mean", "variance"])
        x = "b"
    else:
        x = g.op("Dropout", x, g.constant("p", np.float32(0.5)), g.constant("on", np.array(True)), out="dropped")
    g.op("GlobalAveragePool", x, out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"))
    source = saved(g, tmp_path / "model.onnx")
    if kind == "dropout":
        explainer, said = exported(source)
        assert any("drops units at random, as in training: removed" in s for s in said)
        np.testing.assert_array_equal(explainer.classify(IMAGES), explainer.classify(IMAGES))
    else:
        with pytest.raises(camrt.CamrtError, match="export the model in evaluation mode"):
            camrt.export_onnx(source, tmp_path / "model.camrt")


def test_a_branch_that_the_number_of_images_decides_is_for_one(tmp_path: Path) -> None:
    g = Graph()
    g.op("GlobalAveragePool", trunk(g), out="pooled")
    head(g, g.op("Flatten", "pooled", out="rows"), out="z")
    g.op("Gather", g.op("Shape", "data", out="sizes"), g.constant("first", np.array(0, np.int64)), out="batch")
    one = g.constant("one", np.array(1, np.int64))
    branches = [
        helper.make_graph([helper.make_node(op, ["z"], [op])], op, [], [helper.make_empty_tensor_value_info(op)])
        for op in ("Tanh", "Neg")
    ]
    g.op("Equal", "batch", one, out="alone")
    g.op("If", "alone", out="scores", then_branch=branches[0], else_branch=branches[1])
    source = saved(g, tmp_path / "model.onnx")
    explainer, said = exported(source)
    assert explainer.manifest.batch == 1 and any(
        "If (node 'n_scores') chooses its branch by the number of images" in s for s in said
    )
    np.testing.assert_allclose(explainer.classify(IMAGES[:1]), scores_of(source, IMAGES[:1]).reshape(1, -1), rtol=1e-4)


def test_a_bundle_that_an_engine_refuses_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from camrt.export import programs

    right = programs.activations

    def broken(graph: Any) -> Any:
        model = right(graph)
        model.graph[0].op_type = "NoSuchOperator"
        return model

    monkeypatch.setattr(programs, "activations", broken)
    with pytest.raises(camrt.CamrtError, match=r"activations.*ONNX Runtime cannot load it"):
        camrt.export_onnx(classifier(tmp_path / "model.onnx"), tmp_path / "model.camrt")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_export_without_onnx_runtime_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(camrt.CamrtError, match="an export runs the programs that it wrote, which needs ONNX Runtime"):
        camrt.export_onnx(classifier(tmp_path / "model.onnx"), tmp_path / "model.camrt")
