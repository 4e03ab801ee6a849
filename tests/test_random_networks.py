"""Random small networks of all supported operators: the emitted gradients, in float64, are autograd's.

HYPOTHESIS_EXAMPLES=2000 python -m pytest tests/test_random_networks.py looks at more of them, other ones each time.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import camrt
from camrt.export import vjp  # noqa: F401  registers the rules
from camrt.export.autodiff import RULES
from camrt.export.interpreter import Interpreter
from camrt.export.probes import smooth_images
from camrt.runtime.backends import create
from camrt.runtime.bundle.reading import read_bundle
from camrt.verification.comparisons import GRAPH_LIMIT
from camrt.verification.distances import relative_l2
from camrt.verification.oracle import open_oracle
from camrt.verification.verify import verify

# of a gradient. Networks that subtract means and sum what is left amplify what float32 constants leave (1e-7) a
# hundredfold and more; a rule that is wrong is off by far more than this, and tests/test_vjp.py holds each rule to
# 1e-9
CANCELLED = 1e-4
EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "0"))
CLASSES = 4
Shape = tuple[int, int, int]
Draw = Callable[[st.SearchStrategy[Any]], Any]


class Network:
    """An ONNX graph that grows node by node; shape: of its last tensor, without the batch."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.value = "image"
        self.shape: Shape = (3, draw(st.integers(7, 12)), draw(st.integers(7, 12)))
        self.entry = self.shape
        self.earlier: list[tuple[str, Shape]] = []

    def weight(self, *shape: int, scale: float = 0.0, offset: float = 0.0) -> str:
        """Random numbers; by default so small that a product of them keeps its size."""
        scale = scale or 1 / np.sqrt(max(1, np.prod(shape[1:])))
        return self.constant((self.rng.standard_normal(shape) * scale + offset).astype(np.float32))

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"n{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names

    def then(self, value: str, shape: Shape | None = None) -> None:
        self.earlier.append((self.value, self.shape))
        self.value, self.shape = value, shape or self.shape

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def model(self) -> onnx.ModelProto:
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", *self.entry])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])
        graph = helper.make_graph(self.nodes, "random", [image], [logits], self.constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(made, full_check=True)
        return made


# ---- steps: each takes the last tensor further; False where it does not fit


def conv(n: Network) -> bool:
    c, h, w = n.shape
    kernel, stride, dilation = (
        [n.integer(1, 3), n.integer(1, 3)],
        [n.integer(1, 2), n.integer(1, 2)],
        [n.integer(1, 2), 1],
    )
    # the first keeps to its picture's frame, so that it can be tapped
    pads = [n.integer(0, k // 2 if n.value == "image" else k - 1) for k in (*kernel, *kernel)]
    height, width = [
        (s + pads[i] + pads[i + 2] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i, s in enumerate((h, w))
    ]
    if min(height, width) < 2:
        return False
    group = n.pick(1, c)
    out = n.integer(1, 6) if group == 1 else c * n.integer(1, 2)
    bias = [n.weight(out, scale=0.3)] if n.pick(True, False) else []
    value = n.op(
        "Conv",
        n.value,
        n.weight(out, c // group, *kernel),
        *bias,
        kernel_shape=kernel,
        strides=stride,
        pads=pads,
        dilations=dilation,
        group=group,
    )
    n.then(value, (out, height, width))
    return True


def conv_transpose(n: Network) -> bool:
    c, h, w = n.shape
    if h * w > 120:
        return False
    out = n.integer(1, 4)
    n.then(n.op("ConvTranspose", n.value, n.weight(c, out, 2, 2), strides=[2, 1]), (out, 2 * h, w + 1))
    return True


def batch_norm(n: Network) -> bool:
    c = n.shape[0]
    parts = [n.weight(c, scale=0.3, offset=o) for o in (1, 0, 0)]
    variance = n.constant(np.abs(n.rng.standard_normal(c)).astype(np.float32) + 0.3)
    n.then(n.op("BatchNormalization", n.value, *parts, variance))
    return True


def pointwise(n: Network) -> bool:
    kinds: list[tuple[str, dict[str, Any]]] = [
        *((k, {}) for k in ("Relu", "Sigmoid", "Tanh", "HardSwish", "Softplus", "Softsign", "Mish", "Erf", "Neg")),
        *((k, {}) for k in ("Abs", "Identity", "Dropout", "Selu", "Elu", "Celu", "HardSigmoid")),
        *((k, {}) for k in ("Sin", "Cos", "Atan", "Asinh", "Shrink")),
        ("LeakyRelu", {"alpha": 0.2}),
        ("ThresholdedRelu", {"alpha": 0.3}),
        ("Gelu", {"approximate": "tanh"}),
        ("Gelu", {}),
        ("Cast", {"to": TensorProto.FLOAT}),
    ]
    kind, attributes = n.pick(*kinds)
    n.then(n.op(kind, n.value, **attributes))
    return True


def bounded(n: Network) -> bool:
    """Functions that are only taken where they are tame."""
    kind = n.pick("Exp", "Log", "Sqrt", "Reciprocal", "Pow", "Div", "Clip", "PRelu")
    tame = n.op("Tanh", n.value)
    if kind == "Clip":
        n.then(n.op(kind, n.value, n.constant(np.float32(-0.4)), n.constant(np.float32(0.7))))
    elif kind == "PRelu":
        n.then(n.op(kind, n.value, n.weight(n.shape[0], 1, 1, scale=0.3)))
    elif kind == "Exp":
        n.then(n.op(kind, tame))
    else:
        shifted = n.op("Add", tame, n.constant(np.float32(1.5)))
        if kind == "Pow":
            n.then(n.op(kind, shifted, n.constant(np.float32(n.pick(2, 3, 1.5)))))
        elif kind == "Div":
            n.then(n.op(kind, n.value, shifted))
        else:
            n.then(n.op(kind, shifted))
    return True


def pool(n: Network) -> bool:
    c, h, w = n.shape
    kernel, stride = n.integer(2, 3), n.integer(1, 2)
    pad = n.integer(0, 1)
    ceil = 0 if pad else n.pick(0, 1)  # with both, whether a window may start in the padding depends on the opset
    if min(h, w) < 2 * kernel:
        return False
    kind = n.pick("MaxPool", "AveragePool", "LpPool")
    extra = {"count_include_pad": n.pick(0, 1)} if kind == "AveragePool" else {}
    value = n.op(
        kind, n.value, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4, ceil_mode=ceil, **extra
    )

    def size(s: int) -> int:
        room = s + 2 * pad - kernel
        return (-(-room // stride) if ceil else room // stride) + 1

    n.then(value, (c, size(h), size(w)))
    return True


def join(n: Network) -> bool:
    """With an earlier tensor of its shape."""
    same = [v for v, s in n.earlier if s == n.shape and v != n.value]
    if not same:
        return False
    n.then(n.op(n.pick("Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean"), n.value, n.pick(*same)))
    return True


def concat(n: Network) -> bool:
    same = [(v, s) for v, s in n.earlier if s[1:] == n.shape[1:]]
    if not same or n.shape[0] > 12:
        return False
    other, shape = n.pick(*same)
    n.then(n.op("Concat", n.value, other, axis=1), (n.shape[0] + shape[0], n.shape[1], n.shape[2]))
    return True


def squeeze_and_excite(n: Network) -> bool:
    c = n.shape[0]
    kind = n.pick("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "ReduceL2", "ReduceLogSumExp")
    axes = [n.constant(np.array([2, 3], np.int64))] if kind.startswith("Reduce") else []
    pooled = n.op(kind, n.value, *axes)
    n.then(n.op("Mul", n.value, n.op("Sigmoid", n.op("Conv", pooled, n.weight(c, c, 1, 1)))))
    return True


def move(n: Network) -> bool:
    """Numbers change their places."""
    c, h, w = n.shape
    kind = n.pick("slice", "split", "shuffle", "gather", "pad", "depth", "space")
    if kind == "slice" and h > 4:
        start, end, axis = (n.constant(np.array([k], np.int64)) for k in (1, h, 2))
        n.then(n.op("Slice", n.value, start, end, axis), (c, h - 1, w))
    elif kind == "split" and c > 1:
        left, right = n.op("Split", n.value, n.constant(np.array([1, c - 1], np.int64)), outputs=2, axis=1)
        n.then(n.op("Concat", right, left, axis=1))
    elif kind == "shuffle" and c % 2 == 0:
        apart = n.op("Reshape", n.value, n.constant(np.array([0, 2, c // 2, h, w], np.int64)))
        turned = n.op("Transpose", apart, perm=[0, 2, 1, 3, 4])
        n.then(n.op("Reshape", turned, n.constant(np.array([-1, c, h, w], np.int64))))
    elif kind == "gather":
        index = n.rng.integers(0, c, n.integer(1, 5))
        n.then(n.op("Gather", n.value, n.constant(index), axis=1), (len(index), h, w))
    elif kind == "pad":
        n.then(n.op("Pad", n.value, n.constant(np.array([0, 0, 1, 0, 0, 0, 0, 2]))), (c, h + 1, w + 2))
    elif kind == "depth" and c % 4 == 0 and h * w < 60:
        n.then(n.op("DepthToSpace", n.value, blocksize=2, mode=n.pick("DCR", "CRD")), (c // 4, 2 * h, 2 * w))
    elif kind == "space" and h % 2 == w % 2 == 0 and c < 4:
        n.then(n.op("SpaceToDepth", n.value, blocksize=2), (4 * c, h // 2, w // 2))
    else:
        return False
    return True


def norm(n: Network) -> bool:
    c = n.shape[0]
    kind = n.pick(
        "LayerNormalization", "InstanceNormalization", "LRN", "LpNormalization", "Softmax", "LogSoftmax", "CumSum"
    )
    if kind == "CumSum":
        running = n.op(
            kind, n.value, n.constant(np.array(n.integer(1, 3))), reverse=n.pick(0, 1), exclusive=n.pick(0, 1)
        )
        n.then(n.op("Mul", running, n.constant(np.float32(0.2))))
        return True
    if c % 2 == 0 and n.pick(True, False):
        n.then(
            n.op("GroupNormalization", n.value, n.weight(c, scale=0.3, offset=1), n.weight(c, scale=0.3), num_groups=2)
        )
        return True
    if kind == "LayerNormalization":
        last = n.op("Transpose", n.value, perm=[0, 2, 3, 1])
        scale, shift = n.weight(c, scale=0.3, offset=1), n.weight(c, scale=0.3)
        n.then(n.op("Transpose", n.op(kind, last, scale, shift, axis=-1), perm=[0, 3, 1, 2]))
    elif kind == "InstanceNormalization":
        n.then(n.op(kind, n.value, n.weight(c, scale=0.3, offset=1), n.weight(c, scale=0.3)))
    else:
        n.then(n.op(kind, n.value, **({"size": 3} if kind == "LRN" else {"axis": 1})))
    return True


def resample(n: Network) -> bool:
    """Another grid: interpolated, or with a border that repeats what is there."""
    c, h, w = n.shape
    if n.pick(True, False) and h * w < 80:
        mode, where = n.pick("nearest", "linear", "cubic"), n.pick("half_pixel", "asymmetric", "align_corners")
        scales = n.constant(np.array([1, 1, 2, 2], np.float32))
        more = {"coordinate_transformation_mode": where, **({"nearest_mode": "floor"} if mode == "nearest" else {})}
        n.then(n.op("Resize", n.value, "", scales, mode=mode, **more), (c, 2 * h, 2 * w))
    elif min(h, w) > 2:
        pads = n.constant(np.array([0, 0, 1, 0, 0, 0, 1, 2]))
        n.then(n.op("Pad", n.value, pads, mode=n.pick("reflect", "edge", "wrap")), (c, h + 2, w + 2))
    else:
        return False
    return True


def choose(n: Network) -> bool:
    zero = n.constant(np.float32(0.1))
    n.then(n.op("Where", n.op("Greater", n.value, zero), n.value, n.op("Mul", n.value, n.constant(np.float32(0.3)))))
    return True


def spread(n: Network) -> bool:
    """Something broadcast over the map."""
    c, h, w = n.shape
    kind = n.pick("channel", "column", "mean", "expand")
    if kind == "channel":
        n.then(n.op(n.pick("Add", "Mul"), n.value, n.weight(c, 1, 1, scale=0.5, offset=0.5)))
    elif kind == "column":
        n.then(n.op("Mul", n.value, n.weight(1, w, scale=0.5, offset=0.5)))
    else:
        mean = n.op(n.pick("ReduceMean", "ReduceSum"), n.value, n.constant(np.array([3], np.int64)))
        if kind == "expand":
            mean = n.op("Expand", mean, n.constant(np.array([1, c, h, w], np.int64)))
        n.then(n.op("Sub", n.value, mean))
    return True


def product(n: Network) -> bool:
    c, h, w = n.shape
    out = n.integer(2, 6)
    n.then(n.op("MatMul", n.value, n.weight(w, out, scale=0.4)), (c, h, out))
    return True


STEPS = [conv, conv, conv, conv_transpose, batch_norm, pointwise, pointwise, bounded, pool, join, join]
STEPS += [concat, squeeze_and_excite, move, move, norm, choose, spread, product, resample]


@st.composite
def networks(draw: Draw) -> onnx.ModelProto:
    n = Network(draw)
    while not conv(n):
        pass
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=9)):
        step(n)
    conv(n)
    c, h, w = n.shape
    if n.pick(True, False):
        pooled, width = n.op("Flatten", n.op("GlobalAveragePool", n.value)), c
    else:
        pooled, width = n.op("Flatten", n.value), c * h * w
    logits = n.op("Gemm", pooled, n.weight(CLASSES, width), n.weight(CLASSES, scale=0.3), transB=1)
    n.nodes[-1].output[0] = "logits"
    assert logits == f"v{len(n.nodes) - 1}_0"
    return n.model()


@settings(
    max_examples=EXAMPLES or 100,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(networks(), st.integers(0, 1000))
def test_gradients_of_a_random_network(model: onnx.ModelProto, number: int) -> None:
    note(" -> ".join(node.op_type for node in model.graph.node))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "random.onnx"
        source.write_bytes(model.SerializeToString())
        try:
            bundle = read_bundle(camrt.export_onnx(source, Path(folder) / "random.camrt", layers="conv"))
        except camrt.CamrtError as error:  # no convolution keeps to the picture's frame: refused by design
            assume("pads or crops the picture within the network" not in str(error))
            raise
        layers = [t.name for t in bundle.manifest.taps]
        count = 1 if bundle.manifest.batch == 1 else 2  # where shape inference loses the batch behind a Reshape
        batch = smooth_images(bundle.manifest.input_shape, count, number)
        seed = np.random.default_rng(number).standard_normal((count, CLASSES)).astype(np.float32)
        want = open_oracle(bundle, None).record(batch, seed, layers, True)
        known = [*want.activations.values(), *want.gradients.values(), want.logits]
        assume(all(t.isfinite().all() for t in known))  # not at a norm's or a root's zero
        program = bundle.program("gradients", layers)
        feeds = {"image": torch.from_numpy(batch).double(), "seed": torch.from_numpy(seed).double()}
        with torch.no_grad():
            out = Interpreter(bundle.file(program)).run(feeds, list(program.outputs))
        largest = max(float(t.norm()) for t in want.gradients.values())
        for layer in layers:
            for what, reference in (("activation", want.activations), ("gradient", want.gradients)):
                got, expected = out[f"{what}:{layer}"].numpy(), reference[layer].numpy()
                # where a mean is subtracted, gradients cancel but for what float32 constants leave of the later ones
                nothing = max(np.linalg.norm(got), np.linalg.norm(expected)) < max(1e-9, GRAPH_LIMIT * largest)
                assert nothing or relative_l2(got, expected) <= CANCELLED, (what, layer)
        single = create("onnxruntime").open(bundle, program).run({"image": batch, "seed": seed})
        logits = want.logits.numpy()
        assert np.abs(single["logits"] - logits).max() <= 1e-4 * max(1, np.abs(logits).max())


def test_a_tapped_layer_that_is_padded_next(tmp_path: Path) -> None:
    """ONNX Runtime's fusion of a Pad into the convolution behind it loses what the layer's own output reads."""
    rng = np.random.default_rng(0)
    pads = numpy_helper.from_array(np.array([0, 0, 1, 0, 0, 0, 0, 2]), "pads")
    shapes = {"w0": (4, 3, 3, 3), "w1": (4, 4, 3, 3), "w2": (CLASSES, 4)}
    weights = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["a"], name="first"),
        helper.make_node("Pad", ["a", "pads"], ["b"]),
        helper.make_node("Conv", ["b", "w1"], ["c"], name="second"),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "w2"], ["logits"], transB=1),
    ]
    image, logits = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", *s])
        for n, s in (("image", [3, 9, 9]), ("logits", [CLASSES]))
    )
    graph = helper.make_graph(nodes, "padded", [image], [logits], [pads, *weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "padded.onnx").write_bytes(model.SerializeToString())
    assert verify(camrt.export_onnx(tmp_path / "padded.onnx", tmp_path / "padded.camrt")).passed


class Rolled(Network):
    """Grows by dice, the same in every run."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__(lambda _: 9)
        self.dice = dice

    def integer(self, low: int, high: int) -> int:
        return self.dice.randint(low, high)

    def pick(self, *options: Any) -> Any:
        return self.dice.choice(options)


# fmt: off
MADE = {
    "Abs", "Add", "Asinh", "Atan", "AveragePool", "BatchNormalization", "Cast", "Celu", "Clip", "Concat",
    "Conv", "ConvTranspose", "Cos", "CumSum", "DepthToSpace", "Div", "Dropout", "Elu", "Erf", "Exp", "Expand",
    "Gather", "Gelu", "GlobalAveragePool", "GlobalMaxPool", "GroupNormalization", "HardSigmoid", "HardSwish",
    "Identity", "InstanceNormalization", "LRN", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax",
    "LpNormalization", "LpPool", "MatMul", "Max", "MaxPool", "Mean", "Min", "Mish", "Mul", "Neg", "PRelu",
    "Pad", "Pow", "Reciprocal", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceSum", "Relu",
    "Reshape", "Resize", "Selu", "Shrink", "Sigmoid", "Sin", "Slice", "Softmax", "Softplus", "Softsign",
    "SpaceToDepth", "Split", "Sqrt", "Sub", "Sum", "Tanh", "ThresholdedRelu", "Transpose", "Where",
}
# fmt: on


def test_the_steps_make_the_operators_of_ordinary_networks() -> None:
    """The others are those that only attention and old exporters need; tests/test_vjp.py has a row for each rule."""
    made, dice = set(), random.Random(0)
    for _ in range(300):
        for step in STEPS:
            n = Rolled(dice)
            conv(n)
            step(n)
            made.update(node.op_type for node in n.nodes)
    assert made & set(RULES) >= MADE, sorted(MADE - made)
