"""Operators that move numbers, resize, or say sizes."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import onnx
import onnx.reference
import torch
import torch.nn.functional as F

from ...runtime.errors import ExportError
from .registry import operator


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
    """A matrix product along each axis. The matrix is what ONNX's own evaluator gives for the unit vectors."""
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
            scale = None  # ONNX's evaluator aligns the corners by the unrounded size, engines by the output's size
        if size == x.shape[axis] and scale in (None, 1.0):
            continue
        region = None if roi is None or not roi.numel() else (float(roi[i]), float(roi[i + len(axes)]))
        settings = tuple(
            (k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(attributes.items()) if k != "axes"
        )
        matrix = torch.from_numpy(_resize_matrix(x.shape[axis], size, scale, region, settings)).to(x.dtype)
        x = (x.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return x


@functools.cache
def _resize_matrix(size, out, scale, region, attributes) -> np.ndarray:
    """(size, out)."""
    input_names = ["x", "", "scales" if scale is not None else "", "sizes" if scale is None else ""]
    feeds: dict[str, Any] = {"x": np.eye(size)}
    feeds |= {"scales": np.array([1, scale], np.float32)} if scale is not None else {"sizes": np.array([size, out])}
    if region is not None:
        input_names[1], feeds["roi"] = "roi", np.array([0, region[0], 1, region[1]], np.float32)
    while not input_names[-1]:
        input_names.pop()
    make = onnx.helper.make_tensor_value_info
    kinds = {"x": 11, "scales": 1, "sizes": 7, "roi": 1}
    node = onnx.helper.make_node("Resize", input_names, ["y"], **dict(attributes))
    graph = onnx.helper.make_graph([node], "resize", [make(n, kinds[n], None) for n in feeds], [make("y", 11, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    return np.asarray(onnx.reference.ReferenceEvaluator(model).run(None, feeds)[0])  # type: ignore[arg-type]


@operator("GridSample")
def grid_sample(attributes, x, grid):
    onnx_mode = str(attributes.get("mode", "linear"))
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(onnx_mode, onnx_mode)
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
