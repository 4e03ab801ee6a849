"""Runs an ONNX graph with PyTorch, in any precision and with autograd: an oracle that shares nothing with the autodiff.

Semantics are the ONNX specification's (onnx.ai/onnx/operators). Reads graphs in opset 18 or later form.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import torch
import torch.nn.functional as F

from ..runtime.errors import ExportError

Operator = Callable[..., Any]
OPERATORS: dict[str, Operator] = {}


def operator(*op_types: str) -> Callable[[Operator], Operator]:
    """Registers (attributes, *inputs) -> output or tuple of outputs."""

    def register(function: Operator) -> Operator:
        for op_type in op_types:
            if op_type in OPERATORS:
                raise ValueError(f"{op_type} is registered already")
            OPERATORS[op_type] = function
        return function

    return register


class Interpreter:
    """A graph whose floating-point numbers are held in `dtype`.

    rounding: what the graph calls float16 is rounded to it after every node, as a GPU does whose units add in float32.
    """

    def __init__(self, model: ir.Model | str | Path, dtype: torch.dtype = torch.float64, rounding: bool = False):
        self.model = ir.load(model) if isinstance(model, str | Path) else model
        self.dtype = dtype
        self.rounding = rounding
        self._constants = {
            str(name): self._tensor(value.const_value.numpy())  # type: ignore[union-attr]
            for name, value in self.model.graph.initializers.items()
        }

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(array))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def run(self, feeds: dict[str, torch.Tensor], fetches: Sequence[str]) -> dict[str, torch.Tensor]:
        """Values by name. ExportError for an operator that is not known here."""
        values: dict[str, Any] = dict(self._constants) | feeds
        for node in self.model.graph:
            function = OPERATORS.get(node.op_type)
            if function is None:
                raise ExportError(f"verification does not know the operator {node.op_type} (node {node.name!r})")
            attributes = {name: a.value for name, a in node.attributes.items()}
            inputs = [None if x is None else values[str(x.name)] for x in node.inputs]
            if node.op_type in ("Constant", "ConstantOfShape"):
                outputs = self._constant(node.op_type, attributes, inputs)
            elif node.op_type == "Cast":
                outputs = _cast(attributes, inputs[0], self.dtype)
            elif node.op_type == "Split":
                outputs = _split(attributes, *inputs, count=len(node.outputs))
            else:
                outputs = function(attributes, *inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for y, value in zip(node.outputs, outputs, strict=False):
                rounded = self.rounding and y.dtype == ir.DataType.FLOAT16
                values[str(y.name)] = value.half().to(self.dtype) if rounded else value
        return {name: values[name] for name in fetches}

    def biased(self) -> dict[str, torch.Tensor]:
        """Values (B, K, h, w) to which a convolution or a batch norm adds a constant, and that constant (K,)."""
        found = {}
        for node in self.model.graph:
            constants = [None if x is None else self._constants.get(str(x.name)) for x in node.inputs]
            y = node.outputs[0]
            if y.shape is None or len(y.shape) != 4:
                continue
            bias = None
            if node.op_type == "Conv" and len(constants) > 2:
                bias = constants[2]
            elif node.op_type == "BatchNormalization":
                gamma, beta, mean, variance = constants[1:5]
                if gamma is not None and beta is not None and mean is not None and variance is not None:
                    epsilon = node.attributes["epsilon"].value if "epsilon" in node.attributes else 1e-5
                    bias = beta - gamma * mean / (variance + epsilon).sqrt()
            if bias is not None:
                found[str(y.name)] = bias
        return found

    def _constant(self, op_type: str, attributes: dict[str, Any], inputs: list[Any]) -> torch.Tensor:
        value = attributes.get("value")
        array = value.numpy() if value is not None else np.zeros(1, np.float32)
        if op_type == "Constant":
            for key, kind in (("value_int", np.int64), ("value_ints", np.int64), ("value_float", np.float32)):
                if key in attributes:
                    array = np.array(attributes[key], kind)
            return self._tensor(array)
        return self._tensor(array).reshape(()).expand(tuple(inputs[0].tolist())).clone()


def _cast(attributes: dict[str, Any], x: Any, working: torch.dtype) -> torch.Tensor:
    """Casts between floating types keep the working precision."""
    kind = ir.DataType(attributes["to"]).numpy()
    if np.issubdtype(kind, np.floating):
        return x.to(working)
    return x.to(torch.from_numpy(np.zeros(0, kind)).dtype)


def _split(attributes: dict[str, Any], x: Any, sizes: Any = None, *, count: int) -> Any:
    axis = attributes.get("axis", 0)
    if sizes is not None:
        return tuple(torch.split(x, sizes.tolist(), axis))
    length = -(-x.shape[axis] // count)
    return tuple(torch.split(x, length, axis))


for _name in ("Constant", "ConstantOfShape", "Cast", "Split"):
    OPERATORS[_name] = lambda *_: None  # handled by Interpreter.run, which knows the precision and the node's outputs

for _name, _function in {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "HardSwish": F.hardswish,
    "Softsign": F.softsign,
    "Mish": F.mish,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tan": torch.tan,
    "Asin": torch.asin,
    "Acos": torch.acos,
    "Atan": torch.atan,
    "Sinh": torch.sinh,
    "Cosh": torch.cosh,
    "Asinh": torch.asinh,
    "Acosh": torch.acosh,
    "Atanh": torch.atanh,
    "Round": torch.round,
    "IsNaN": torch.isnan,
    "Xor": torch.logical_xor,
    "StopGradient": lambda x: x.detach(),
    "Softplus": F.softplus,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Not": torch.logical_not,
    "Identity": lambda x: x,
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "MatMul": torch.matmul,
    "Pow": lambda x, p: torch.pow(x, p),
    "Max": lambda *xs: _fold(torch.maximum, xs),
    "Min": lambda *xs: _fold(torch.minimum, xs),
    "Sum": lambda *xs: _fold(torch.add, xs),
    "Mean": lambda *xs: _fold(torch.add, xs) / len(xs),
}.items():
    OPERATORS[_name] = lambda attributes, *xs, _function=_function: _function(*xs)


def _fold(function: Callable[..., torch.Tensor], xs: Sequence[torch.Tensor]) -> torch.Tensor:
    total = xs[0]
    for x in xs[1:]:
        total = function(total, x)
    return total


@operator("Dropout")
def dropout(attributes, x, *_):
    return x


@operator("Div")
def div(attributes, a, b):
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("LeakyRelu")
def leaky_relu(attributes, x):
    return F.leaky_relu(x, attributes.get("alpha", 0.01))


@operator("ThresholdedRelu")
def thresholded_relu(attributes, x):
    return F.threshold(x, attributes.get("alpha", 1.0), 0.0)


@operator("PRelu")
def prelu(attributes, x, slope):
    return torch.where(x > 0, x, x * slope)


@operator("Elu")
def elu(attributes, x):
    return F.elu(x, attributes.get("alpha", 1.0))


@operator("Celu")
def celu(attributes, x):
    return F.celu(x, attributes.get("alpha", 1.0))


@operator("Selu")
def selu(attributes, x):
    alpha = attributes.get("alpha", 1.67326319217681884765625)
    gamma = attributes.get("gamma", 1.05070102214813232421875)
    return gamma * torch.where(x > 0, x, alpha * (torch.exp(x) - 1))


@operator("Shrink")
def shrink(attributes, x):
    lambd, bias = attributes.get("lambd", 0.5), attributes.get("bias", 0.0)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0))


@operator("Mod")
def mod(attributes, a, b):
    return torch.fmod(a, b) if attributes.get("fmod", 0) else torch.remainder(a, b)


@operator("Hardmax")
def hardmax(attributes, x):
    axis = attributes.get("axis", -1)
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


@operator("HardSigmoid")
def hard_sigmoid(attributes, x):
    return F.hardtanh(attributes.get("alpha", 0.2) * x + attributes.get("beta", 0.5), 0.0, 1.0)


@operator("Swish")
def swish(attributes, x):
    return x * torch.sigmoid(attributes.get("alpha", 1.0) * x)


@operator("Gelu")
def gelu(attributes, x):
    return F.gelu(x, approximate=attributes.get("approximate", "none"))


@operator("Clip")
def clip(attributes, x, low=None, high=None):
    """By hardtanh, whose gradient is that of ReLU6: zero on the bounds."""
    if not x.is_floating_point():
        return x.clamp(low, high)
    return F.hardtanh(x, -math.inf if low is None else low.item(), math.inf if high is None else high.item())


@operator("Where")
def where(attributes, condition, a, b):
    return torch.where(condition, a, b)


@operator("Softmax")
def softmax(attributes, x):
    return torch.softmax(x, attributes.get("axis", -1))


@operator("LogSoftmax")
def log_softmax(attributes, x):
    return torch.log_softmax(x, attributes.get("axis", -1))


# ---- reductions


def _reduction(function: Callable[..., torch.Tensor]) -> Operator:
    def run(attributes, x, axes=None):
        chosen = attributes.get("axes") if axes is None else axes.tolist()
        if not chosen:
            if attributes.get("noop_with_empty_axes", 0):
                return x
            chosen = range(x.dim())
        return function(x, tuple(a % x.dim() for a in chosen), bool(attributes.get("keepdims", 1)))

    return run


OPERATORS["ReduceSum"] = _reduction(lambda x, a, k: x.sum(a, keepdim=k))
OPERATORS["ReduceMean"] = _reduction(lambda x, a, k: x.mean(a, keepdim=k))
OPERATORS["ReduceMax"] = _reduction(lambda x, a, k: x.amax(a, keepdim=k))
OPERATORS["ReduceMin"] = _reduction(lambda x, a, k: x.amin(a, keepdim=k))
OPERATORS["ReduceL2"] = _reduction(lambda x, a, k: (x * x).sum(a, keepdim=k).sqrt())
OPERATORS["ReduceSumSquare"] = _reduction(lambda x, a, k: (x * x).sum(a, keepdim=k))
OPERATORS["ReduceL1"] = _reduction(lambda x, a, k: x.abs().sum(a, keepdim=k))
OPERATORS["ReduceLogSumExp"] = _reduction(lambda x, a, k: x.logsumexp(a, keepdim=k))
OPERATORS["ReduceLogSum"] = _reduction(lambda x, a, k: x.sum(a, keepdim=k).log())
OPERATORS["ReduceProd"] = _reduction(lambda x, a, k: _fold(torch.mul, [x.prod(a[0], keepdim=k)]))


@operator("ArgMax")
def arg_max(attributes, x):
    return x.argmax(attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


@operator("ArgMin")
def arg_min(attributes, x):
    return x.argmin(attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


@operator("CumSum")
def cum_sum(attributes, x, axis):
    axis = int(axis.item())
    x = x.flip(axis) if attributes.get("reverse", 0) else x
    y = x.cumsum(axis)
    y = y - x if attributes.get("exclusive", 0) else y
    return y.flip(axis) if attributes.get("reverse", 0) else y


@operator("TopK")
def top_k(attributes, x, k):
    largest = bool(attributes.get("largest", 1))
    return tuple(
        torch.topk(x, int(k.reshape(-1)[0]), attributes.get("axis", -1), largest, bool(attributes.get("sorted", 1)))
    )


# ---- quantised numbers, which stand for real ones: held as floats, so that autograd passes straight through their
# rounding

_RANGES = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-32768, 32767)}


def _along(value, x, attributes):
    if value is None or value.dim() == 0 or value.numel() == 1:
        return value
    axis = attributes.get("axis", 1) % x.dim()
    return value.reshape([-1 if i == axis else 1 for i in range(x.dim())])


@operator("QuantizeLinear")
def quantize_linear(attributes, x, scale, zero=None):
    low, high = _RANGES[torch.uint8 if zero is None else zero.dtype]
    position = x / _along(scale, x, attributes)
    rounded = position + (position.round() - position).detach()
    shifted = rounded if zero is None else rounded + _along(zero, x, attributes)
    return shifted.clamp(low, high)


@operator("DequantizeLinear")
def dequantize_linear(attributes, x, scale, zero=None):
    number = x if x.is_floating_point() else x.to(scale.dtype)
    shifted = number if zero is None else number - _along(zero, x, attributes)
    return shifted * _along(scale, x, attributes)


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(attributes, x):
    low, high = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
    scale = (high - low) / 255
    zero = (-low / scale).round().clamp(0, 255)
    position = x / scale
    return position + (position.round() - position).detach() + zero, scale, zero


# ---- shapes


@operator("Shape")
def shape(attributes, x):
    return torch.tensor(list(x.shape)[attributes.get("start", 0) : attributes.get("end")])


@operator("Reshape")
def reshape(attributes, x, target):
    sizes = [x.shape[i] if n == 0 and not attributes.get("allowzero", 0) else n for i, n in enumerate(target.tolist())]
    return x.reshape(sizes)


@operator("Flatten")
def flatten(attributes, x):
    axis = attributes.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operator("Squeeze")
def squeeze(attributes, x, axes=None):
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


@operator("Unsqueeze")
def unsqueeze(attributes, x, axes):
    rank = x.dim() + axes.numel()
    for axis in sorted(a % rank for a in axes.tolist()):
        x = x.unsqueeze(axis)
    return x


@operator("Transpose")
def transpose(attributes, x):
    return x.permute(tuple(attributes.get("perm", range(x.dim())[::-1])))


@operator("Concat")
def concat(attributes, *xs):
    return torch.cat(xs, attributes["axis"])


@operator("Slice")
def slice_(attributes, x, starts, ends, axes=None, steps=None):
    axes = list(range(len(starts))) if axes is None else axes.tolist()
    steps = [1] * len(starts) if steps is None else steps.tolist()
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), axes, steps, strict=True):
        stop = None if step < 0 and end < -x.shape[axis] else end
        index = torch.arange(x.shape[axis])[slice(start, stop)] if step > 0 else None
        positions = range(*slice(start, stop, step).indices(x.shape[axis])) if index is None else index[::step]
        x = x.index_select(axis, torch.as_tensor(list(positions), dtype=torch.int64))
    return x


@operator("Gather")
def gather(attributes, x, indices):
    axis = attributes.get("axis", 0) % x.dim()
    wrapped = torch.where(indices < 0, indices + x.shape[axis], indices)
    picked = x.index_select(axis, wrapped.reshape(-1))
    return picked.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@operator("ScatterND")
def scatter_nd(attributes, x, indices, updates):
    return x.index_put(tuple(indices.unbind(-1)), updates, accumulate=attributes.get("reduction", "none") == "add")


@operator("GatherND")
def gather_nd(attributes, x, indices):
    if attributes.get("batch_dims", 0):
        raise ExportError("verification does not know GatherND with batch_dims")
    return x[tuple(indices.unbind(-1))]


@operator("GatherElements")
def gather_elements(attributes, x, indices):
    axis = attributes.get("axis", 0)
    return x.gather(axis, torch.where(indices < 0, indices + x.shape[axis], indices))


@operator("ScatterElements")
def scatter_elements(attributes, x, indices, updates):
    axis = attributes.get("axis", 0)
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    return (x.scatter_add if attributes.get("reduction", "none") == "add" else x.scatter)(axis, indices, updates)


@operator("Tile")
def tile(attributes, x, repeats):
    return x.repeat(tuple(repeats.tolist()))


@operator("Trilu")
def trilu(attributes, x, k=None):
    return (torch.triu if attributes.get("upper", 1) else torch.tril)(x, 0 if k is None else int(k.item()))


@operator("Einsum")
def einsum(attributes, *xs):
    return torch.einsum(attributes["equation"], *xs)


@operator("Pad")
def pad(attributes, x, pads, value=None, axes=None):
    rank = x.dim()
    axes = list(range(rank)) if axes is None else [a % rank for a in axes.tolist()]
    amounts, mode = pads.tolist(), attributes.get("mode", "constant")
    if mode != "constant":
        for i, axis in enumerate(axes):
            size = x.shape[axis]
            picked = np.pad(np.arange(size), (amounts[i], amounts[i + len(axes)]), mode=mode)
            x = x.index_select(axis, torch.from_numpy(picked))
        return x
    flat = [0] * 2 * rank
    for i, axis in enumerate(axes):
        flat[2 * (rank - 1 - axis)], flat[2 * (rank - 1 - axis) + 1] = amounts[i], amounts[i + len(axes)]
    return F.pad(x, flat, value=0.0 if value is None else value.item())


@operator("Resize")
def resize(attributes, x, roi=None, scales=None, sizes=None):
    """Along each axis a matrix, which ONNX's own evaluator gives for the unit vectors."""
    rank = x.dim()
    axes = [a % rank for a in attributes.get("axes", range(rank))]
    for i, axis in enumerate(axes):
        scale = float(scales[i]) if scales is not None and sizes is None else None
        if scale is not None:
            size = math.floor(x.shape[axis] * scale)
        else:
            size = x.shape[axis] if sizes is None else int(sizes[i])
        mode, whole = attributes.get("coordinate_transformation_mode"), scale is None or size == x.shape[axis] * scale
        if mode == "half_pixel_symmetric" and not whole:
            raise ExportError(f"verification does not know Resize with {mode} and sizes that are rounded")
        if mode == "align_corners":
            scale = None  # ONNX's evaluator aligns the corner of a size that is not rounded, engines that of the output
        if size == x.shape[axis] and scale in (None, 1.0):
            continue
        region = None if roi is None or not roi.numel() else (float(roi[i]), float(roi[i + len(axes)]))
        kept = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(attributes.items()) if k != "axes")
        matrix = torch.from_numpy(_resize_matrix(x.shape[axis], size, scale, region, kept)).to(x.dtype)
        x = (x.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return x


@functools.cache
def _resize_matrix(size, out, scale, region, attributes) -> np.ndarray:
    """(size, out)."""
    given = ["x", "", "scales" if scale is not None else "", "sizes" if scale is None else ""]
    feeds: dict[str, Any] = {"x": np.eye(size)}
    feeds |= {"scales": np.array([1, scale], np.float32)} if scale is not None else {"sizes": np.array([size, out])}
    if region is not None:
        given[1], feeds["roi"] = "roi", np.array([0, region[0], 1, region[1]], np.float32)
    while not given[-1]:
        given.pop()
    make = onnx.helper.make_tensor_value_info
    kinds = {"x": 11, "scales": 1, "sizes": 7, "roi": 1}
    node = onnx.helper.make_node("Resize", given, ["y"], **dict(attributes))
    graph = onnx.helper.make_graph([node], "resize", [make(n, kinds[n], None) for n in feeds], [make("y", 11, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    return np.asarray(onnx.reference.ReferenceEvaluator(model).run(None, feeds)[0])  # type: ignore[arg-type]


@operator("GridSample")
def grid_sample(attributes, x, grid):
    given = str(attributes.get("mode", "linear"))
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(given, given)
    return F.grid_sample(
        x, grid, mode, attributes.get("padding_mode", "zeros"), bool(attributes.get("align_corners", 0))
    )


@operator("Expand")
def expand(attributes, x, target):
    return x.expand(torch.broadcast_shapes(x.shape, tuple(target.tolist())))


@operator("Range")
def range_(attributes, start, limit, delta):
    return torch.arange(start.item(), limit.item(), delta.item())


@operator("DepthToSpace")
def depth_to_space(attributes, x):
    b = attributes["blocksize"]
    n, c, h, w = x.shape
    if attributes.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, b)
    return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(attributes, x):
    b = attributes["blocksize"]
    n, c, h, w = x.shape
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)


# ---- linear


@operator("Gemm")
def gemm(attributes, a, b, c=None):
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    y = attributes.get("alpha", 1.0) * (a @ b)
    return y if c is None else y + attributes.get("beta", 1.0) * c


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _paddings(attributes, size, kernel, strides, dilations) -> list[tuple[int, int]]:
    """(before, after) per axis; the specification's auto_pad."""
    rank = len(kernel)
    mode = attributes.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        pads = attributes.get("pads", [0] * 2 * rank) if mode == "NOTSET" else [0] * 2 * rank
        return list(zip(pads[:rank], pads[rank:], strict=True))
    result = []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        small, large = total // 2, total - total // 2
        result.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return result


def _torch_pad(x, paddings, value=0.0):
    return F.pad(x, [p for pair in reversed(paddings) for p in pair], value=value)


@operator("Conv")
def conv(attributes, x, weight, bias=None):
    rank = x.dim() - 2
    strides, dilations = (attributes.get(k, [1] * rank) for k in ("strides", "dilations"))
    padded = _torch_pad(x, _paddings(attributes, x.shape[2:], weight.shape[2:], strides, dilations))
    return _CONV[rank](padded, weight, bias, tuple(strides), 0, tuple(dilations), attributes.get("group", 1))


@operator("ConvTranspose")
def conv_transpose(attributes, x, weight, bias=None):
    rank = x.dim() - 2
    strides, dilations = (tuple(attributes.get(k, [1] * rank)) for k in ("strides", "dilations"))
    extra = tuple(attributes.get("output_padding", [0] * rank))
    if attributes.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in attributes:
        raise ExportError("verification does not know ConvTranspose with auto_pad or output_shape")
    pads = attributes.get("pads", [0] * 2 * rank)
    full = _CONV_TRANSPOSE[rank](x, weight, bias, strides, 0, 0, attributes.get("group", 1), dilations)
    full = F.pad(full, [p for e in reversed(extra) for p in (0, e)])
    if bias is not None and any(extra):
        raise ExportError("verification does not know ConvTranspose with bias and output_padding")
    for i in range(rank):
        full = full.narrow(2 + i, pads[i], full.shape[2 + i] - pads[i] - pads[rank + i])
    return full


def _windows(attributes, x, fill):
    """x padded for pooling, so that windows start at 0 and the last, under ceil_mode, is whole; and the geometry."""
    kernel = attributes["kernel_shape"]
    rank = len(kernel)
    strides, dilations = (attributes.get(k, [1] * rank) for k in ("strides", "dilations"))
    paddings = _paddings(attributes, x.shape[2:], kernel, strides, dilations)
    hang = []
    for i in range(rank):
        before, after = paddings[i]
        span = x.shape[2 + i] + before + after - (dilations[i] * (kernel[i] - 1) + 1)
        count = (-(-span // strides[i]) if attributes.get("ceil_mode", 0) else span // strides[i]) + 1
        if attributes.get("ceil_mode", 0) and (count - 1) * strides[i] >= x.shape[2 + i] + before:
            count -= 1  # the last window must start inside the input or the padding before it
        hang.append(max((count - 1) * strides[i] - span, 0))
    padded = _torch_pad(x, [(b, a + h) for (b, a), h in zip(paddings, hang, strict=True)], fill)
    return padded, kernel, strides, dilations, paddings, hang


@operator("MaxPool")
def max_pool(attributes, x):
    padded, kernel, strides, dilations, _, _ = _windows(attributes, x, -math.inf)
    return _MAX_POOL[len(kernel)](padded, tuple(kernel), tuple(strides), 0, tuple(dilations))


@operator("AveragePool")
def average_pool(attributes, x):
    padded, kernel, strides, dilations, paddings, hang = _windows(attributes, x, 0.0)
    if any(d != 1 for d in dilations):
        raise ExportError("verification does not know AveragePool with dilations")
    counted = torch.ones_like(x[:1, :1])
    counted = _torch_pad(counted, paddings, 1.0 if attributes.get("count_include_pad", 0) else 0.0)
    counted = _torch_pad(counted, [(0, h) for h in hang])
    pool = _AVERAGE_POOL[len(kernel)]
    return pool(padded, tuple(kernel), tuple(strides)) / pool(counted, tuple(kernel), tuple(strides))


@operator("GlobalAveragePool")
def global_average_pool(attributes, x):
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(attributes, x):
    flat = x.flatten(2)
    return flat.gather(2, flat.argmax(2, keepdim=True)).reshape(*x.shape[:2], *[1] * (x.dim() - 2))


# ---- normalisation


@operator("BatchNormalization")
def batch_normalization(attributes, x, scale, bias, mean, variance):
    """Written out: the backward pass of F.batch_norm is wrong for one image's channels-last gradients (PyTorch
    2.13).
    """
    sizes = (1, -1, *(1,) * (x.dim() - 2))
    mean, variance, scale, bias = (c.reshape(sizes) for c in (mean, variance, scale, bias))
    return (x - mean) * (scale / (variance + attributes.get("epsilon", 1e-5)).sqrt()) + bias


@operator("LayerNormalization")
def layer_normalization(attributes, x, scale, bias=None):
    axis = attributes.get("axis", -1) % x.dim()
    return F.layer_norm(x, x.shape[axis:], scale, bias, attributes.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def instance_normalization(attributes, x, scale, bias):
    axes = tuple(range(2, x.dim()))
    centred = x - x.mean(axes, keepdim=True)
    normalised = centred / ((centred * centred).mean(axes, keepdim=True) + attributes.get("epsilon", 1e-5)).sqrt()
    sizes = (1, -1, *(1,) * (x.dim() - 2))
    return normalised * scale.reshape(sizes) + bias.reshape(sizes)


@operator("GroupNormalization")
def group_normalization(attributes, x, scale, bias):
    groups = attributes["num_groups"]
    if scale.numel() == groups and groups != x.shape[1]:  # before opset 21
        scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return F.group_norm(x, groups, scale, bias, attributes.get("epsilon", 1e-5))


@operator("MeanVarianceNormalization")
def mean_variance_normalization(attributes, x):
    axes = tuple(attributes.get("axes", [0, 2, 3]))
    centred = x - x.mean(axes, keepdim=True)
    return centred / ((centred * centred).mean(axes, keepdim=True).sqrt() + 1e-9)


@operator("RMSNormalization")
def rms_normalization(attributes, x, scale):
    axis = attributes.get("axis", -1) % x.dim()
    square = (x * x).mean(tuple(range(axis, x.dim())), keepdim=True)
    return x * (square + attributes.get("epsilon", 1e-5)).rsqrt() * scale


@operator("LpPool")
def lp_pool(attributes, x):
    p = attributes.get("p", 2)
    padded, kernel, strides, _, _, _ = _windows(attributes, x, 0.0)
    pooled = _AVERAGE_POOL[len(kernel)](padded.abs() ** p, tuple(kernel), tuple(strides))
    return (pooled * math.prod(kernel)) ** (1 / p)


@operator("GlobalLpPool")
def global_lp_pool(attributes, x):
    p = attributes.get("p", 2)
    return (x.abs() ** p).sum(tuple(range(2, x.dim())), keepdim=True) ** (1 / p)


@operator("LpNormalization")
def lp_normalization(attributes, x):
    axis, p = attributes.get("axis", -1), attributes.get("p", 2)
    return x / x.norm(p, axis, keepdim=True)


@operator("LRN")
def lrn(attributes, x):
    size, alpha = attributes["size"], attributes.get("alpha", 1e-4)
    square = F.pad(x * x, (0, 0, 0, 0, (size - 1) // 2, size // 2))
    total = square.unfold(1, size, 1).sum(-1)
    return x / (attributes.get("bias", 1.0) + alpha / size * total) ** attributes.get("beta", 0.75)
