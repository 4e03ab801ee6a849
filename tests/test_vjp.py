"""Every gradient rule, in float64, against autograd: one oracle over one table.

A row is one ONNX node. The node's forward pass in PyTorch (the interpreter) is first shown to be the operator by
ONNX's own reference evaluator; then the gradient graph that the rule emits, run by that evaluator, must equal
PyTorch's autograd.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from camrt.export import vjp  # noqa: F401
from camrt.export.autodiff import NOT_SHARED, RULES, gradients
from camrt.export.interpreter import Interpreter
from camrt.export.layers.follow import FOLLOWED
from camrt.export.tape import Tape
from camrt.runtime.errors import UnsupportedOperator

X = (3, 4, 9, 7)  # a batch of 3, odd spatial sizes


@dataclass(frozen=True)
class Case:
    """One node: its first input is the variable x; the other inputs are constants, or a second variable if `both`."""

    op_type: str
    attributes: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = X
    inputs: tuple[Any, ...] = ()  # shapes become random float constants, arrays stay
    outputs: int = 1
    values: str = "normal"  # normal | positive | ties | unit | above 1
    both: bool = False
    reverse: bool = False  # x is the last input
    batch: int = 0  # the axis whose size is symbolic: attention moves the batch about
    opset: int = 18
    rtol: float = 1e-9
    differentiated: int = -1  # which output
    defined_by: str = "onnx"  # or "onnxruntime", in float32, where ONNX's evaluator does not cover the row in float64

    def __str__(self) -> str:
        parts = [f"{k}={v}" for k, v in self.attributes.items()]
        return " ".join(
            [self.op_type, *parts, self.values if self.values != "normal" else "", *(["both"] if self.both else [])]
        ).strip()


NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
COORDINATES = ("half_pixel", "asymmetric", "pytorch_half_pixel")
# points of a GridSample, some of them outside
POINTS = np.random.default_rng(3).uniform(-1.3, 1.3, (3, 5, 6, 2))


def _distinct(shape: tuple[int, ...], size: int, axis: int) -> np.ndarray:
    """Indices below `size` that do not repeat along an axis."""
    order = np.random.default_rng(4).random((*shape[:axis], size, *shape[axis + 1 :])).argsort(axis=axis)
    return order.take(range(shape[axis]), axis=axis)


def _repeated(shape: tuple[int, ...], size: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, size, shape)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def conv(shape=X, weight=(6, 4, 3, 3), bias=True, **attributes: Any) -> Case:
    return Case("Conv", attributes, shape, (weight, (weight[0],)) if bias else (weight,))


POINTWISE = [
    "Relu",
    "Sigmoid",
    "Tanh",
    "HardSwish",
    "Softplus",
    "Softsign",
    "Mish",
    "Erf",
    "Exp",
    "Neg",
    "Abs",
    "Identity",
]

CASES = [
    *(Case(op) for op in POINTWISE),
    Case("Relu", values="ties"),
    Case("Dropout"),
    Case("Cast", {"to": 11}),
    *(Case(op, values="positive") for op in ("Log", "Sqrt", "Reciprocal")),
    Case("LeakyRelu", {"alpha": 0.3}),
    Case("ThresholdedRelu", {"alpha": 0.3}),
    Case("PRelu", inputs=((4, 1, 1),)),
    Case("Elu", {"alpha": 1.5}),
    Case("Celu", {"alpha": 1.5}),
    Case("Selu"),
    Case("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
    Case("HardSigmoid"),
    Case("Swish", {"alpha": 1.3}),
    Case("Gelu", defined_by="onnxruntime"),
    Case("Gelu", {"approximate": "tanh"}),
    Case("Clip", inputs=(np.float64(-0.5), np.float64(0.7))),
    Case("Clip", inputs=(None, np.float64(0.7))),
    Case("Clip", inputs=(np.float64(0.0), np.float64(2.0)), values="ties"),
    Case("Pow", inputs=(np.float64(2),)),
    Case("Pow", inputs=(np.float64(-0.75),), values="positive"),
    *(Case(op, inputs=((4, 1, 1),)) for op in ("Add", "Sub", "Mul", "Div")),
    *(Case(op, inputs=((4, 1, 1),), reverse=True) for op in ("Add", "Sub", "Mul", "Div")),
    *(Case(op, inputs=((3, 4, 1, 1),), both=True) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum")),
    *(Case(op, inputs=((3, 1, 9, 7),), both=True) for op in ("Add", "Mul", "Div")),
    Case("Max", inputs=((1,),), values="ties"),
    Case("Where", inputs=((4, 1, 1),), both=False, attributes={}),
    Case("ReduceMean", {"keepdims": 1}, inputs=(ints(2, 3),)),
    Case("ReduceMean", {"keepdims": 0}, inputs=(ints(-1, -2),)),
    Case("ReduceMean", {"keepdims": 0}, inputs=(ints(1),)),
    Case("ReduceSum", {"keepdims": 0}, inputs=(ints(2),)),
    Case("ReduceSum", {"noop_with_empty_axes": 1}, inputs=(ints(),)),
    Case("ReduceL2", {"keepdims": 1}, inputs=(ints(1),)),
    Case("ReduceSumSquare", {"keepdims": 0}, inputs=(ints(1, 3),)),
    Case("ReduceMax", {"keepdims": 0}, inputs=(ints(2, 3),)),
    Case("ReduceMax", {"keepdims": 1}, inputs=(ints(1),), values="ties"),
    Case("ReduceMin", {"keepdims": 1}, inputs=(ints(3),)),
    Case("Softmax", {"axis": 1}),
    Case("Softmax", {"axis": -1}),
    Case("LogSoftmax", {"axis": 1}),
    Case("GlobalAveragePool"),
    Case("GlobalMaxPool"),
    Case("GlobalMaxPool", values="ties"),
    Case("Gemm", {"transB": 1, "alpha": 0.7, "beta": 1.2}, (3, 5), ((6, 5), (6,))),
    Case("Gemm", {}, (3, 5), ((5, 6),)),
    Case("MatMul", {}, (3, 5), ((5, 6),)),
    Case("MatMul", {}, (3, 4, 9, 7), ((7, 5),)),
    Case("MatMul", {}, (3, 4, 9, 7), ((3, 4, 7, 5),), both=True),
    Case("MatMul", {}, (3, 4, 9, 7), ((3, 1, 7, 5),), both=True),
    Case("MatMul", {}, (3, 4, 9, 7), ((4, 5, 9),), reverse=True),
    Case("BatchNormalization", {"epsilon": 1e-3}, X, ((4,), (4,), (4,), np.array([0.5, 1, 2, 3]))),
    Case("LayerNormalization", {"epsilon": 1e-3}, X, ((7,), (7,))),
    Case("LayerNormalization", {"axis": 2}, X, ((9, 7), (9, 7))),
    Case("LayerNormalization", {"axis": -1}, X, ((7,),)),
    Case("InstanceNormalization", {"epsilon": 1e-3}, X, ((4,), (4,))),
    Case("LpNormalization", {"axis": 1, "p": 2}),
    Case("LRN", {"size": 3, "alpha": 0.5, "beta": 0.75, "bias": 1.5}, (7, 7, 3, 2), defined_by="onnxruntime"),
    Case("LRN", {"size": 4, "alpha": 0.5}, (7, 7, 3, 2)),
    Case("Reshape", inputs=(ints(0, 2, -1),)),
    Case("Reshape", inputs=(ints(-1, 4 * 63),)),
    Case("Flatten", {"axis": 1}),
    Case("Squeeze", shape=(3, 4, 1, 1), inputs=(ints(2, 3),)),
    Case("Unsqueeze", inputs=(ints(-1, 2),)),
    Case("Transpose", {"perm": [0, 2, 3, 1]}),
    Case("Transpose", {"perm": [0, 3, 1, 2]}),
    Case("Concat", {"axis": 1}, inputs=((3, 2, 9, 7),), both=True),
    Case("Concat", {"axis": -1}, inputs=((3, 4, 9, 1),), reverse=True),
    Case("Split", {"axis": 1}, inputs=(ints(1, 3),), outputs=2),
    Case("Split", {"axis": -1, "num_outputs": 3}, outputs=3),
    Case("Slice", inputs=(ints(1, -5), ints(3, 2**31), ints(1, -1))),
    Case("Slice", inputs=(ints(0), ints(9), ints(2), ints(2))),
    Case("Slice", inputs=(ints(-1), ints(-(2**31)), ints(2), ints(-1))),
    Case("Slice", inputs=(ints(0, 1), ints(2**31, 8), ints(0, 2))),
    Case("Gather", {"axis": 1}, inputs=(np.array(2),)),
    Case("Gather", {"axis": 2}, inputs=(ints(8, 0, 0, 3),)),
    Case("Gather", {"axis": -1}, inputs=(ints(2, 3, 4),)),
    Case("ScatterND", shape=(5, 3, 4), inputs=(ints(1, 3).reshape(2, 1), (2, 3, 4)), batch=-2),
    Case("ScatterND", shape=(5, 4, 3), inputs=(np.array([[0, 1], [4, 3], [2, 2]]), (3, 3)), batch=-1, both=True),
    # the batch behind another axis, as in attention
    Case("Gather", {"axis": 0}, (5, 3, 4), (np.array(2),), batch=1),
    Case("Slice", shape=(5, 3, 4), inputs=(ints(1), ints(3), ints(0)), batch=1),
    Case("Split", {"axis": 0}, (5, 3, 4), (ints(2, 3),), outputs=2, batch=1),
    Case("Concat", {"axis": 0}, (5, 3, 4), ((2, 3, 4),), both=True, batch=1),
    Case("Pad", shape=(5, 3, 4), inputs=(ints(1, 0, 0, 2, 0, 0),), batch=1),
    Case("Reshape", shape=(5, 3, 4), inputs=(ints(5, -1, 2, 2),), batch=1),
    Case("Squeeze", shape=(1, 3, 4), inputs=(ints(0),), batch=1),
    Case("Add", shape=(5, 3, 4), inputs=((5, 3, 1),), both=True, batch=1),
    Case("ReduceMean", {"keepdims": 0}, (5, 3, 4), (ints(0),), batch=1),
    Case("Expand", shape=(1, 3, 4), inputs=(ints(5, 1, 4),), batch=1),
    Case("MatMul", {}, (5, 3, 4), ((4, 6),), batch=1),
    Case("Pad", inputs=(ints(0, 0, 1, 2, 0, 0, 0, 3),)),
    Case("Pad", inputs=(ints(0, 0, -1, 2, 0, 1, 1, -2), np.float64(0.5)), defined_by="onnxruntime"),
    Case("Expand", shape=(3, 4, 1, 7), inputs=(ints(1, 4, 9, 7),)),
    Case("DepthToSpace", {"blocksize": 2}, (2, 8, 3, 5)),
    Case("DepthToSpace", {"blocksize": 2, "mode": "CRD"}, (2, 8, 3, 5)),
    Case("SpaceToDepth", {"blocksize": 2}, (2, 3, 4, 6)),
    *(
        Case(op)
        for op in ("Sin", "Cos", "Tan", "Atan", "Sinh", "Cosh", "Asinh", "Sign", "Round", "Floor", "Ceil", "Shrink")
    ),
    *(Case(op, values="unit") for op in ("Asin", "Acos", "Atanh")),
    Case("Acosh", values="above 1"),
    Case("Mod", {"fmod": 1}, inputs=(np.float64(0.7),)),
    Case("Hardmax", {"axis": 1}),
    Case("ReduceL1", {"keepdims": 0}, inputs=(ints(1, 2),)),
    Case("ReduceLogSumExp", {"keepdims": 0}, inputs=(ints(2, 3),)),
    Case("ReduceLogSumExp", {"keepdims": 1}, inputs=(ints(1),)),
    Case("ReduceLogSum", {"keepdims": 0}, inputs=(ints(2, 3),), values="positive"),
    Case("ReduceProd", {"keepdims": 0}, inputs=(ints(2),)),
    Case("ReduceProd", {"keepdims": 1}, inputs=(ints(3),), values="ties"),
    *(
        Case("CumSum", {"exclusive": exclusive, "reverse": reverse}, inputs=(np.array(axis),))
        for exclusive, reverse, axis in ((0, 0, 2), (1, 0, -1), (0, 1, 1), (1, 1, 2))
    ),
    Case("GroupNormalization", {"num_groups": 2}, X, ((4,), (4,)), opset=21),
    Case("GroupNormalization", {"num_groups": 2, "epsilon": 1e-3}, X, ((2,), (2,)), defined_by="onnxruntime"),
    Case("MeanVarianceNormalization", {"axes": [1, 2, 3]}, defined_by="onnxruntime", rtol=1e-6),
    Case("MeanVarianceNormalization", {"axes": [2, 3]}, defined_by="onnxruntime", rtol=1e-6),
    Case("RMSNormalization", {"epsilon": 1e-3}, X, ((7,),), opset=23),
    Case("LpNormalization", {"axis": 1, "p": 1}, defined_by="onnxruntime"),
    Case("LpPool", {"kernel_shape": [2, 3], "strides": [2, 1], "p": 2}),
    Case("LpPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "p": 3}),
    Case("LpPool", {"kernel_shape": [2, 2], "p": 1}),
    Case("GlobalLpPool", {"p": 2}, defined_by="onnxruntime"),
    Case("GlobalLpPool", {"p": 3}, defined_by="onnxruntime"),
    Case("Einsum", {"equation": "bchw,ck->bkhw"}, inputs=((4, 6),)),
    Case("Einsum", {"equation": "bchw,bkhw->bck"}, inputs=((3, 5, 9, 7),), both=True),
    Case("Einsum", {"equation": "bchw->bc"}),
    Case("Einsum", {"equation": "...c,ck->...k"}, inputs=((7, 6),)),
    Case("Einsum", {"equation": "b...,b...->b"}, inputs=((3, 4, 9, 7),), both=True),
    Case("Einsum", {"equation": "b...w,kw"}, inputs=((6, 7),)),
    Case("Gather", {"axis": 1}, inputs=(np.array([[2, 0, 2], [1, 3, -1]]),)),
    Case("GatherElements", {"axis": 2}, inputs=(np.random.default_rng(1).integers(0, 9, (3, 4, 5, 7)),)),
    Case("GatherElements", {"axis": 1}, inputs=(np.random.default_rng(2).integers(-4, 4, (3, 2, 9, 7)),)),
    Case("ScatterElements", {"axis": 1}, inputs=(_distinct((3, 2, 9, 7), 4, 1), (3, 2, 9, 7)), both=True),
    Case(
        "ScatterElements", {"axis": 2, "reduction": "add"}, inputs=(_repeated((3, 4, 5, 7), 9), (3, 4, 5, 7)), both=True
    ),
    Case("GatherND", shape=(3, 4, 5), inputs=(np.array([[0, 1], [2, 3], [2, 3], [1, 0]]),)),
    Case(
        "ScatterND", {"reduction": "add"}, (5, 4, 3), (np.array([[0, 1], [4, 3], [0, 1]]), (3, 3)), batch=-1, both=True
    ),
    Case("TopK", {"axis": 1}, inputs=(ints(2),), outputs=2, differentiated=0),
    Case("TopK", {"axis": -1, "largest": 0}, inputs=(ints(3),), outputs=2, differentiated=0),
    Case("Tile", inputs=(ints(1, 2, 1, 3),)),
    Case("Trilu", {"upper": 0}, inputs=(np.array(1),)),
    Case("Trilu"),
    *(Case("Pad", {"mode": mode}, inputs=(ints(0, 0, 1, 2, 0, 0, 3, 1),)) for mode in ("reflect", "edge", "wrap")),
    Case("Pad", {"mode": "reflect"}, inputs=(ints(2, 1, 0, 1), None, ints(2, -1))),
    *(
        Case("Resize", attributes, inputs=(None, np.array([1, 1, *scales], np.float32)), rtol=rtol)
        for scales, rtol in (
            ((2, 2), 1e-9),
            ((0.5, 1.5), 1e-5),
            ((2.5, 0.4), 1e-5),
        )  # positions are float32 in ONNX's evaluator
        for attributes in (
            *({"mode": "nearest", "nearest_mode": m} for m in NEAREST),
            *(
                {"mode": "nearest", "coordinate_transformation_mode": m, "nearest_mode": "floor"}
                for m in COORDINATES[1:3]
            ),
            *({"mode": mode, "coordinate_transformation_mode": m} for mode in ("linear", "cubic") for m in COORDINATES),
            {"mode": "linear", "antialias": 1},
            {"mode": "cubic", "antialias": 1},
            {"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.5},
        )
    ),
    *(
        Case(
            "Resize",
            {"mode": mode, "coordinate_transformation_mode": "align_corners", **more},
            inputs=given,
            rtol=1e-4,
            defined_by=by,
        )
        for given, by in (
            ((None, np.array([1, 1, 2, 3], np.float32)), "onnx"),
            ((None, np.array([1, 1, 1.7, 0.6], np.float32)), "onnxruntime"),
        )
        for mode, more in (("linear", {}), ("cubic", {}), ("nearest", {"nearest_mode": "floor"}))
    ),
    Case(
        "Resize",
        {"mode": "cubic", "coordinate_transformation_mode": "half_pixel_symmetric"},
        inputs=(None, np.array([1, 1, 2, 3], np.float32)),
        rtol=1e-5,
    ),
    Case("Resize", {"mode": "linear", "axes": [2, 3]}, inputs=(None, None, ints(5, 11)), rtol=1e-5),
    Case("Resize", {"mode": "nearest", "axes": [2, 3]}, inputs=(None, None, ints(18, 14))),
    Case("Resize", {"mode": "linear"}, (3, 4, 9), (None, np.array([1, 1, 1.5], np.float32)), rtol=1e-5),
    Case(
        "Resize",
        {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"},
        inputs=(np.array([0, 0, 0.2, 0.1, 1, 1, 0.9, 1.3], np.float32), np.array([1, 1, 2, 3], np.float32)),
        rtol=1e-4,
    ),
    *(
        Case(
            "GridSample",
            {"mode": mode, "padding_mode": padding, "align_corners": corners},
            X,
            (POINTS,),
            opset=20,
            rtol=1e-5,
        )
        for mode in ("linear", "nearest")
        for padding in ("zeros", "border")
        for corners in (0, 1)
    ),
    *(
        Case("GridSample", {"padding_mode": padding}, X, (POINTS,), both=True, opset=20, rtol=1e-5)
        for padding in ("zeros", "border")
    ),
    # convolutions: stride, dilation, groups, asymmetric, auto_pad and over-wide padding, odd sizes, unused last columns
    conv(),
    conv(pads=[1, 1, 1, 1]),
    conv(pads=[0, 1, 2, 0], bias=False),
    conv(pads=[3, 4, 3, 2]),
    conv(pads=[2, 2, 2, 2], dilations=[2, 1]),
    conv(strides=[2, 2], pads=[1, 1, 1, 1]),
    conv(strides=[2, 2]),
    conv(shape=(3, 4, 10, 8), strides=[2, 2], pads=[0, 0, 1, 1]),
    conv(shape=(3, 4, 10, 8), strides=[2, 2], pads=[1, 2, 0, 1]),
    conv(strides=[2, 3], pads=[1, 0, 2, 1]),
    conv(strides=[1, 2], pads=[1, 1, 1, 1]),
    conv(strides=[2, 2], pads=[3, 3, 3, 3]),
    conv(strides=[2, 2], dilations=[2, 2], pads=[2, 2, 2, 2]),
    conv(strides=[3, 2], dilations=[1, 2], pads=[0, 1, 1, 2]),
    conv(weight=(6, 4, 1, 1)),
    conv(weight=(6, 4, 1, 1), strides=[2, 2]),
    conv(weight=(6, 4, 1, 1), strides=[3, 3], shape=(2, 4, 10, 8)),
    conv(weight=(6, 4, 2, 2), strides=[2, 2]),
    conv(weight=(6, 4, 2, 2), strides=[3, 3]),
    conv(weight=(6, 4, 4, 4), strides=[4, 4], shape=(2, 4, 13, 11)),
    conv(weight=(6, 4, 1, 7), pads=[0, 3, 0, 3]),
    conv(weight=(6, 4, 11, 5), strides=[4, 4], pads=[2, 2, 2, 2], shape=(2, 4, 19, 15)),
    conv(weight=(6, 2, 3, 3), group=2, pads=[1, 1, 1, 1]),
    conv(weight=(6, 2, 3, 3), group=2, strides=[2, 2], pads=[1, 1, 1, 1]),
    conv(weight=(4, 1, 3, 3), group=4, pads=[1, 1, 1, 1]),
    conv(weight=(8, 1, 3, 3), group=4, pads=[1, 1, 1, 1]),
    conv(weight=(4, 1, 5, 5), group=4, strides=[2, 2], pads=[2, 2, 2, 2]),
    conv(weight=(8, 1, 3, 3), group=4, strides=[2, 2], pads=[1, 1, 1, 1]),
    *(
        conv(auto_pad=mode, strides=[s, s], shape=(3, 4, 9, 8))
        for mode in ("SAME_UPPER", "SAME_LOWER", "VALID")
        for s in (1, 2)
    ),
    Case("Conv", {"strides": [2], "pads": [1, 1]}, (3, 4, 9), ((6, 4, 3),)),
    Case("Conv", {"pads": [1, 1]}, (3, 4, 9), ((6, 4, 3),)),
    Case("ConvTranspose", {"strides": [2, 2], "pads": [1, 0, 0, 1]}, X, ((4, 5, 3, 3), (5,))),
    Case("ConvTranspose", {"group": 2, "dilations": [2, 1]}, X, ((4, 3, 3, 2),), defined_by="onnxruntime"),
    Case("ConvTranspose", {"strides": [2, 2], "output_padding": [1, 0]}, X, ((4, 5, 3, 3),)),
    # pooling: overlap, ceil_mode, counted padding, dilation, ties
    *(
        Case("MaxPool", attributes, values=values)
        for attributes in (
            {"kernel_shape": [2, 2], "strides": [2, 2]},
            {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
            {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
            {"kernel_shape": [2, 3], "strides": [2, 2], "pads": [0, 1, 1, 0], "ceil_mode": 1},
            {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
            {"kernel_shape": [2, 3], "strides": [2, 3]},
            {"kernel_shape": [2, 1], "strides": [3, 2]},
            {"kernel_shape": [3, 3], "strides": [1, 2], "pads": [1, 2, 0, 2]},
            {"kernel_shape": [2, 2], "strides": [2, 3], "dilations": [3, 2]},
            {"kernel_shape": [3, 2], "strides": [1, 3]},
            {"kernel_shape": [2, 2], "strides": [3, 3]},
            {"kernel_shape": [2, 3], "dilations": [2, 2], "strides": [2, 1]},
            {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
            {"kernel_shape": [2, 2], "auto_pad": "SAME_LOWER"},
        )
        for values in ("normal", "ties")
    ),
    *(
        Case("AveragePool", {**attributes, "count_include_pad": include})
        for attributes in (
            {"kernel_shape": [2, 2], "strides": [2, 2]},
            {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1]},
            {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 0, 1]},
            {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1, "pads": [1, 0, 1, 0]},
            {"kernel_shape": [5, 5], "strides": [3, 3]},
            {"kernel_shape": [2, 3], "strides": [2, 3]},
        )
        for include in (0, 1)
    ),
    Case("AveragePool", {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("MaxPool", {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}, (3, 4, 9)),
]


def sample(case: Case, rng: np.random.Generator) -> np.ndarray:
    if case.values == "ties":
        return rng.integers(-2, 3, case.shape).astype(np.float64)
    if case.values == "unit":
        return rng.uniform(-0.9, 0.9, case.shape)
    x = rng.standard_normal(case.shape)
    offset = {"positive": 0.2, "above 1": 1.2}.get(case.values)
    return x if offset is None else np.abs(x) + offset


def symbolic(shape: tuple[int, ...], axis: int) -> list[int | str]:
    sizes: list[int | str] = list(shape)
    sizes[axis] = "batch"
    return sizes


def build(case: Case, rng: np.random.Generator) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A one-node model in float64 with a symbolic batch, and its feeds."""
    feeds = {"x": sample(case, rng)}
    names, constants = ["x"], []
    for i, given in enumerate(case.inputs):
        if given is None:
            names.append("")
            continue
        array = np.asarray(given) if not isinstance(given, tuple) else rng.standard_normal(given)
        if case.op_type in ("Div", "Where") and isinstance(given, tuple):
            array = np.abs(array) + 0.5
        names.append(f"c{i}")
        if case.both and array.dtype == np.float64:
            feeds[f"c{i}"] = array
        else:
            constants.append(onnx.numpy_helper.from_array(array, f"c{i}"))
    if case.reverse:
        names.reverse()
        if case.op_type == "Div":
            feeds["x"] = np.abs(feeds["x"]) + 0.5
    if case.op_type == "Where":
        constants.append(onnx.numpy_helper.from_array(rng.random(X[1:]) < 0.5, "condition"))
        names.insert(0, "condition")
    outputs = [f"y{i}" for i in range(case.outputs)]
    node = onnx.helper.make_node(case.op_type, names, outputs, name="node", **case.attributes)
    double = onnx.TensorProto.DOUBLE
    graph = onnx.helper.make_graph(
        [node],
        "case",
        [onnx.helper.make_tensor_value_info(n, double, symbolic(a.shape, case.batch)) for n, a in feeds.items()],
        [
            onnx.helper.make_tensor_value_info(n, 7 if (case.op_type, n) == ("TopK", "y1") else double, None)
            for n in outputs
        ],
        constants,
    )
    opset = {"Swish": 24, "Gelu": 20}.get(case.op_type, case.opset)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    return ir.from_proto(model), feeds


def defined_outputs(case: Case, model: ir.Model, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What the specification says the node computes. Attributes are float32 in ONNX, hence 1e-6 in float64."""
    proto = ir.to_proto(model)
    if case.defined_by == "onnx":
        return [np.asarray(y) for y in ReferenceEvaluator(proto).run(names, feeds)]  # pyright: ignore[reportArgumentType]
    single, double = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
    for value in [*proto.graph.input, *proto.graph.output]:
        value.type.tensor_type.elem_type = single
    for i, tensor in enumerate(proto.graph.initializer):
        if tensor.data_type == double:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            proto.graph.initializer[i].CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    single_feeds = {n: a.astype(np.float32) for n, a in feeds.items()}
    return [np.asarray(y).astype(np.float64) for y in session.run(names, single_feeds)]


def close(got: np.ndarray, want: np.ndarray, what: str, rtol: float = 1e-9) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype, (what, got.shape, want.shape, got.dtype, want.dtype)
    assert np.isfinite(want).all() and want.size, what
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol / 10, err_msg=what)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule_agrees_with_float64_autograd(case: Case) -> None:
    rng = np.random.default_rng(0)
    model, feeds = build(case, rng)
    tensors = {n: torch.from_numpy(a).requires_grad_() for n, a in feeds.items()}
    names = [str(y.name) for y in model.graph.outputs]
    forward = Interpreter(model).run(tensors, names)
    for name, want in zip(names, defined_outputs(case, model, names, feeds), strict=True):
        close(
            forward[name].detach().numpy(),
            want,
            f"forward {name}",
            rtol=max(1e-6, case.rtol) if case.defined_by == "onnx" else 1e-4,
        )

    # One output alone is differentiated, so that a node's unneeded outputs are covered too.
    chosen = names[case.differentiated]
    cotangent = rng.standard_normal(forward[chosen].shape)
    result = forward[chosen]
    expected = (
        torch.autograd.grad(result, list(tensors.values()), torch.from_numpy(cotangent))
        if result.requires_grad
        else [torch.zeros_like(t) for t in tensors.values()]
    )

    target = model.graph.outputs[case.differentiated]
    seed = ir.Value(name="seed", shape=target.shape, type=target.type)
    model.graph.inputs.append(seed)
    variables = [v for v in model.graph.inputs if v.name in feeds]
    tape = Tape(model.graph, np.float64)
    results = gradients(tape, variables, target, seed)
    for i, value in enumerate(results):
        output = tape.Identity(value)
        output.name, output.type = f"d{i}", target.type
        model.graph.outputs.append(output)
    fetches = [f"d{i}" for i in range(len(results))]
    if case.defined_by == "onnx":
        got = ReferenceEvaluator(ir.to_proto(model)).run(fetches, feeds | {"seed": cotangent})
    else:
        ran = Interpreter(model).run(
            {n: torch.from_numpy(a) for n, a in (feeds | {"seed": cotangent}).items()}, fetches
        )
        got = [ran[n].numpy() for n in fetches]
    for name, value, want in zip(feeds, got, expected, strict=True):
        close(np.asarray(value), want.numpy(), f"gradient of {name}", case.rtol)


QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


@pytest.mark.parametrize("per_channel", [False, True])
def test_quantised_numbers_pass_straight_through_inside_their_range(per_channel: bool) -> None:
    """As PyTorch's fake_quantize: 0 for what is clipped, which is where converters leave rectifiers."""
    x = torch.randn(X, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale = torch.tensor([0.02, 0.005, 0.03, 0.01]) if per_channel else torch.tensor(0.01)
    zero = torch.tensor([0, 128, 20, 255] if per_channel else 100, dtype=torch.uint8)
    if per_channel:
        want = torch.fake_quantize_per_channel_affine(x, scale, zero.int(), 1, 0, 255)
    else:
        want = torch.fake_quantize_per_tensor_affine(x, 0.01, 100, 0, 255)
    g = torch.randn(X, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(want, [x], g)
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=1),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=1),
    ]
    constants = [onnx.numpy_helper.from_array(t.numpy(), n) for t, n in ((scale, "s"), (zero, "z"))]
    out, got = _differentiated(nodes, constants, x.detach().numpy(), g.numpy())
    np.testing.assert_allclose(out, want.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert (got == 0).any() and (got != 0).any()


def test_dynamic_quantisation_passes_straight_through() -> None:
    x = np.random.default_rng(0).standard_normal(X).astype(np.float32)
    g = np.random.default_rng(1).standard_normal(X).astype(np.float32)
    nodes = [
        onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    out, got = _differentiated(nodes, [], x, g)
    np.testing.assert_allclose(out, x, atol=0.02)
    np.testing.assert_allclose(got, g, rtol=1e-5)


def _differentiated(nodes, constants, x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chain's output and the cotangent of x, float32, by ONNX Runtime; and the interpreter's autograd agrees."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "chain", [value("x", 1, x.shape)], [value("y", 1, x.shape)], constants)
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(made))
    leaf = torch.from_numpy(x).double().requires_grad_()
    (reference,) = Interpreter(model).run({"x": leaf}, ["y"]).values()
    (want,) = torch.autograd.grad(reference, [leaf], torch.from_numpy(g).double())
    target = model.graph.outputs[0]
    seed = ir.Value(name="seed", shape=target.shape, type=target.type)
    model.graph.inputs.append(seed)
    tape = Tape(model.graph)
    (result,) = gradients(tape, [model.graph.inputs[0]], target, seed)
    output = tape.Identity(result)
    output.name, output.type, output.shape = "dx", target.type, target.shape
    model.graph.outputs.append(output)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    y, dx = (np.asarray(a) for a in session.run(["y", "dx"], {"x": x, "seed": g}))
    np.testing.assert_allclose(dx, want.numpy(), rtol=1e-5, atol=1e-6)
    return y, dx


def test_every_rule_has_a_row() -> None:
    missing = set(RULES) - {case.op_type for case in CASES} - set(QUANTISED)
    assert not missing, f"{missing}: add a Case to CASES in tests/test_vjp.py"


UNBATCHED = {"Mean", "Min", "Sum", "Concat", "GroupNormalization"}  # rows with two variables, or of fixed sizes


def _shared(case: Case) -> bool:
    return case.batch == 0 and not case.both and case.op_type not in {*NOT_SHARED, *UNBATCHED}


@pytest.mark.parametrize("case", [c for c in CASES if _shared(c)], ids=str)
def test_rule_serves_several_seeds_of_one_image(case: Case) -> None:
    """x has a batch of 1, the cotangent one of 2: each row is what its cotangent gives alone."""
    one = replace(case, shape=(1, *case.shape[1:]))
    model, feeds = build(one, np.random.default_rng(0))
    names = [str(y.name) for y in model.graph.outputs]
    result = defined_outputs(one, model, names, feeds)[case.differentiated]
    target = model.graph.outputs[case.differentiated]
    seed = ir.Value(name="seed", shape=target.shape, type=target.type)
    model.graph.inputs.append(seed)
    tape = Tape(model.graph, np.float64)
    (cotangent,) = gradients(tape, [model.graph.inputs[0]], target, seed)
    output = tape.Identity(cotangent)
    output.name, output.type = "dx", target.type
    model.graph.outputs.append(output)

    def run(seeds: np.ndarray) -> np.ndarray:
        given = {n: torch.from_numpy(a) for n, a in (feeds | {"seed": seeds}).items()}
        return Interpreter(model).run(given, ["dx"])["dx"].numpy()

    seeds = np.random.default_rng(1).standard_normal((2, *result.shape[1:]))
    hint = f"does {case.op_type}'s rule need shares_image=False?"
    close(run(seeds), np.concatenate([run(s[None]) for s in seeds]), hint)


NO_GRID_BEHIND = {
    *("Einsum", "GatherElements", "GatherND", "GridSample", "Hardmax", "ScatterElements", "ScatterND", "TopK")
}


def test_every_rule_is_followed_to_the_maps_grid() -> None:
    """Behind an operator whose effect on a picture's rows and columns is not known, no layer can be tapped."""
    unknown = set(RULES) - FOLLOWED - NO_GRID_BEHIND
    assert not unknown, (
        f"{unknown}: add it to ELEMENTWISE in export/layers/axes.py, to _MAPS_TO_MAPS or _AFTER in export/layers/"
        "follow.py, or to NO_GRID_BEHIND in tests/test_vjp.py"
    )


def test_a_second_rule_for_an_operator_is_refused() -> None:
    from camrt.export.autodiff import vjp as register

    with pytest.raises(ValueError, match="registered already"):
        register("Relu")(lambda op, node, g: (g,))


def test_an_operator_without_a_rule_is_named() -> None:
    model, _ = build(Case("Relu"), np.random.default_rng(0))
    node = model.graph[0]
    node.op_type = "Bernoulli"
    target = model.graph.outputs[0]
    with pytest.raises(
        UnsupportedOperator, match=r"no gradient rule for Bernoulli \(node 'node', between 'x' and the logits\)"
    ):
        gradients(Tape(model.graph, np.float64), [model.graph.inputs[0]], target, target)
