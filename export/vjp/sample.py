"""Rules for operators that read a map between its grid points: Resize and GridSample."""

from __future__ import annotations

import math

import numpy as np

from ..autodiff import vjp
from ..tape import attribute, constant_of, dims, static_dims
from .shape import zeros_like


def resize_matrix(size, out, scale, node, start=0.0, end=1.0):
    """(out, size) float64: y = matrix x along one axis of a Resize. start, end: of the region, for tf_crop_and_resize.

    By the specification's formulas (onnx.ai/onnx/operators/onnx__Resize.html).
    """
    mode = attribute(node, "mode", "nearest")
    antialias = bool(attribute(node, "antialias", 0)) and scale < 1 and mode != "nearest"
    where = attribute(node, "coordinate_transformation_mode", "half_pixel")
    matrix = np.zeros((out, size))
    # nearest: float32, as in engines, so that ties are rounded to the same side; other modes: float64, because in
    # float32 the rounding would be the only error of a gradient
    one = np.float32 if mode == "nearest" else np.float64
    for i, x in enumerate(_positions(size, out, scale, where, start, end, one)):
        if where == "tf_crop_and_resize" and not 0 <= x <= size - 1:
            continue  # the extrapolation value
        if mode == "nearest":
            matrix[i, min(max(_rounded(x, attribute(node, "nearest_mode", "round_prefer_floor")), 0), size - 1)] = 1
            continue
        taps, weights = _kernel(x, mode, scale if antialias else 1.0, attribute(node, "cubic_coeff_a", -0.75))
        if attribute(node, "exclude_outside", 0):
            inside = (taps >= 0) & (taps < size)
            taps, weights = taps[inside], weights[inside]
            weights = weights / weights.sum()
        np.add.at(matrix[i], np.clip(taps, 0, size - 1), weights)
    return matrix


def _positions(size, out, scale, mode, start, end, one):
    """Where each output element lies on the input's axis, computed in the precision `one`."""
    i, scale, half = np.arange(out, dtype=one), one(scale), one(0.5)
    if mode == "align_corners":
        positions = i * one(size - 1) / one(out - 1) if out > 1 else np.zeros(1, one)
    elif mode == "asymmetric":
        positions = i / scale
    elif mode == "tf_half_pixel_for_nn":
        positions = (i + half) / scale
    elif mode == "pytorch_half_pixel" and out == 1:
        positions = np.array([-0.5], one)
    elif mode == "half_pixel_symmetric":
        adjustment = one(out) / (scale * one(size))
        positions = one(size / 2) * (1 - adjustment) + (i + half) / scale - half
    elif mode == "tf_crop_and_resize":
        step = one(end - start) * one(size - 1) / one(max(out - 1, 1))
        positions = (
            one(start) * one(size - 1) + i * step if out > 1 else np.array([0.5 * (start + end) * (size - 1)], one)
        )
    else:
        positions = (i + half) / scale - half
    return positions.astype(np.float64)


def _rounded(x, mode):
    if mode == "round_prefer_floor":
        return math.ceil(x - 0.5)
    if mode == "round_prefer_ceil":
        return math.floor(x + 0.5)
    return math.floor(x) if mode == "floor" else math.ceil(x)


def _kernel(x, mode, scale, a):
    """(positions, weights) of the elements around x. With scale < 1 the kernel is 1 / scale times wider (antialias)."""
    reach = (1 if mode == "linear" else 2) / scale
    taps = np.arange(math.floor(x - reach) + 1, math.ceil(x + reach) + 1)
    if scale == 1:
        first = math.floor(x) + (0 if mode == "linear" else -1)
        taps = np.arange(first, first + (2 if mode == "linear" else 4))
    d = np.abs((taps - x) * scale)
    if mode == "linear":
        weights = np.maximum(1 - d, 0)
    else:
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        weights = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
    return taps, weights / weights.sum() if scale != 1 else weights


@vjp("Resize")
def resize(op, node, g):
    """y = M x along each resized axis: dx = M^T g."""
    x, y = node.inputs[0], node.outputs[0]
    rank = len(dims(x))
    axes = [a % rank for a in attribute(node, "axes", list(range(rank)))]
    constants = [constant_of(v) if v is not None else None for v in [*node.inputs[1:], None, None, None][:3]]
    roi, scales, sizes = constants
    for k, axis in enumerate(axes):
        size, out = dims(x)[axis], dims(y)[axis]
        by_scale = scales is not None and scales.size > 0 and (sizes is None or sizes.size == 0)
        region = (float(roi[k]), float(roi[k + len(axes)])) if roi is not None and roi.size else (0.0, 1.0)
        factor = float(scales[k]) if scales is not None and by_scale else None
        if size == out and region == (0.0, 1.0) and factor in (None, 1.0):
            continue
        if size is None or out is None:
            return (None, None, None, None)
        scale = out / size if factor is None else factor
        g = along_axis(op, g, rank, axis, resize_matrix(size, out, scale, node, *region))
    return (g, None, None, None)


def along_axis(op, g, rank, axis, matrix):
    """g times a matrix (out, size) along an axis of size out."""
    if axis == rank - 1:
        return op.MatMul(g, op.floats(matrix))
    if axis == rank - 2:
        return op.MatMul(op.floats(matrix.T), g)
    last = [i for i in range(rank) if i != axis] + [axis]
    moved = op.MatMul(op.Transpose(g, perm=last), op.floats(matrix))
    return op.Transpose(moved, perm=[int(i) for i in np.argsort(last)])


@vjp("GridSample", shares_image=False)
def grid_sample(op, node, g):
    """Bilinear, padded by zeros or by the border: dx = g times the bilinear weights, added to the four neighbours of
    each point; d grid = g times the slope between them. Nearest: dx = g, added to the nearest element; d grid = 0.
    """
    x, grid = node.inputs
    mode, padding = attribute(node, "mode", "linear"), attribute(node, "padding_mode", "zeros")
    if mode not in ("linear", "bilinear", "nearest") or padding not in ("zeros", "border") or len(dims(x)) != 4:
        return (None, None)
    channels, height, width = static_dims(x)
    _, rows, columns = static_dims(node.outputs[0])
    points = rows * columns
    flat = op.Reshape(g, [-1, channels, points])
    source = op.Reshape(x, [0, channels, height * width])
    places, slopes = [], []
    for index, size in ((1, height), (0, width)):
        coordinate = op.Reshape(op.Slice(grid, [index], [index + 1], [3]), [-1, 1, points])
        if attribute(node, "align_corners", 0):
            factor, position = (size - 1) / 2, op.Mul(op.Add(coordinate, op.floats(1)), op.floats((size - 1) / 2))
        else:
            factor = size / 2
            position = op.Sub(op.Mul(op.Add(coordinate, op.floats(1)), op.floats(size / 2)), op.floats(0.5))
        slope = op.floats(factor)
        if padding == "border":
            inside = op.And(op.Greater(position, op.floats(0)), op.Less(position, op.floats(size - 1)))
            slope = op.mask(inside, slope)
            position = op.Min(op.Max(position, op.floats(0)), op.floats(size - 1))
        places.append(position)
        slopes.append(slope)
    total, d_place = zeros_like(op, source), [None, None]
    for corner in _corners(op, mode, places, (height, width)):
        weight, index, inside, directions = corner
        index = op.Expand(index, op.Shape(flat))
        total = op.ScatterElements(total, index, op.Mul(flat, op.Mul(weight, inside)), axis=2, reduction="add")
        if op.wants(grid) and directions is not None:
            taken = op.Mul(op.GatherElements(source, index, axis=2), flat)
            summed = op.Mul(op.ReduceSum(taken, [1], keepdims=1), inside)
            for k in (0, 1):
                part = op.Mul(summed, directions[k])
                d_place[k] = part if d_place[k] is None else op.Add(d_place[k], part)
    dx = op.reshape_like(total, x)
    if not op.wants(grid):
        return (dx, None)
    if d_place[0] is None:
        return (dx, op.Mul(grid, op.floats(0)))
    parts = [op.Reshape(op.Mul(d_place[k], slopes[k]), [-1, rows, columns, 1]) for k in (1, 0)]
    return (dx, op.Concat(*parts, axis=3))


def _corners(op, mode, places, sizes):
    """(weight, flat index, 1 inside and 0 outside, d weight / d (row, column)) of each neighbour, (B, 1, points)."""
    if mode == "nearest":
        yield op.floats(1.0), *_index(op, [op.Round(p) for p in places], sizes), None
        return
    low = [op.Floor(p) for p in places]
    fraction = [op.Sub(p, f) for p, f in zip(places, low, strict=True)]
    for row in (0, 1):
        for column in (0, 1):
            parts = [f if k else op.Sub(op.floats(1), f) for k, f in zip((row, column), fraction, strict=True)]
            corner = [op.Add(f, op.floats(k)) for k, f in zip((row, column), low, strict=True)]
            directions = [op.Mul(parts[1], op.floats(2 * row - 1)), op.Mul(parts[0], op.floats(2 * column - 1))]
            yield op.Mul(*parts), *_index(op, corner, sizes), directions


def _index(op, corner, sizes):
    inside, clipped = None, []
    for position, size in zip(corner, sizes, strict=True):
        within = op.And(op.Greater(position, op.floats(-0.5)), op.Less(position, op.floats(size - 0.5)))
        inside = within if inside is None else op.And(inside, within)
        clipped.append(op.Min(op.Max(position, op.floats(0)), op.floats(size - 1)))
    flat = op.Add(op.Mul(clipped[0], op.floats(sizes[1])), clipped[1])
    return op.Cast(flat, to=7), op.mask(inside, op.floats(1))
