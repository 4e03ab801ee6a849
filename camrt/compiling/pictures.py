"""Pictures inside the graph: from pixels to the network's input, as Pillow makes it, and maps drawn over pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from PIL import Image

from ..export.tape import Tape
from ..kernels.operations.resize_picture import FRACTION_BITS, resize_spans
from ..runtime.bundle.manifest import Manifest, Preprocess
from ..runtime.errors import InputError
from ..runtime.images.colormaps import colorize
from ..runtime.images.overlay import UNSEEN
from ..runtime.images.placement import Placement
from ..runtime.images.preprocess import checked_recipe, pillow_turns, placed, rows_first
from .maps import minmax

HALF_BITS = FRACTION_BITS // 2
ROUNDING = 1e-4  # pixels, of a position that float32 computes
FILTER = "bilinear"  # of pictures whose size is free; of a fixed size it may be any of Pillow's


@dataclass(frozen=True)
class Axis:
    """One axis of a picture on its way to the network's input. Numbers, or for a free size values of the graph.

    photo: the picture's size; resized: what it is resized to; offset: where the input begins in that; size: the
    input's.
    """

    photo: Any
    resized: Any
    offset: Any
    size: int


@dataclass(frozen=True)
class Picture:
    """The picture that goes in. pixels (batch, C, H, W) float32, 0 to 255, RGB or grey; rows, columns: its axes; place:
    where the input lies in it, None for a free size; turned: whether the height is resized first, or a value that says
    so.
    """

    pixels: ir.Value
    rows: Axis
    columns: Axis
    place: Placement | None = None
    turned: bool | ir.Value = False


def picture_of(tape: Tape, picture: ir.Value, size: tuple[int, int] | None, manifest: Manifest, where: str) -> Picture:
    """picture (batch, H, W, 3) uint8; size: (H, W), or None where it is free. InputError if the bundle has no recipe,
    or one that does not fit, or the network does not take 1 or 3 channels.
    """
    if manifest.input_shape[0] not in (1, 3):
        raise InputError(f"{where}: the network takes {manifest.input_shape[0]} channels, a picture has 1 or 3")
    height, width = size or (2 * manifest.input_shape[1], 2 * manifest.input_shape[2])
    recipe = checked_recipe(manifest, where, (width, height))
    pixels = tape.Transpose(tape.Cast(picture, to=ir.DataType.FLOAT), perm=[0, 3, 1, 2])
    if manifest.input_shape[0] == 1:  # Pillow's grey, in whole numbers that float32 holds exactly
        weights = np.array([19595, 38470, 7471], np.float32).reshape(1, 3, 1, 1)
        grey = tape.ReduceSum(tape.Mul(pixels, tape.floats(weights)), [1], keepdims=1)
        pixels = tape.Floor(tape.Mul(tape.Add(grey, tape.floats(2**15)), tape.floats(2**-16)))
    if size is None:
        if recipe.interpolation != FILTER:
            raise InputError(
                f"{where}: a picture of any size is resized by {FILTER} in one file, and the recipe says "
                f"{recipe.interpolation}: fix the size, for example --uint8 480x640"
            )
        shape = tape.Shape(picture)
        sizes = [tape.Slice(shape, [i], [i + 1]) for i in (1, 2)]
        rows, columns = _free_axes(tape, sizes, recipe)
        return Picture(pixels, rows, columns, None, _turned(tape, rows, columns))
    place = placed((width, height), recipe)
    rows = Axis(height, place.resized[0], place.top, place.size[0])
    columns = Axis(width, place.resized[1], place.left, place.size[1])
    return Picture(pixels, rows, columns, place, rows_first(size, place.resized))


def _free_axes(tape: Tape, sizes: list[ir.Value], recipe: Preprocess) -> tuple[Axis, Axis]:
    """As `placed` computes them; sizes: height and width, each (1,) int64. All that Axis holds is then (1,) float32,
    but the input's size.
    """
    height, width = sizes

    def number(value: Any) -> ir.Value:
        return tape.Cast(value, to=ir.DataType.FLOAT)

    def half(difference: ir.Value) -> ir.Value:
        return tape.Round(tape.Mul(number(difference), tape.floats(0.5)))  # to the nearest even number, as Python

    if recipe.fit == "letterbox":
        full = recipe.resize
        assert isinstance(full, tuple)
        precise = [tape.Cast(n, to=ir.DataType.DOUBLE) for n in sizes]
        ratios = [tape.Div(tape.constant(np.array([f], np.float64)), n) for f, n in zip(full, precise, strict=True)]
        scale = tape.Min(*ratios)
        axes = []
        for side, n, f in zip(sizes, precise, full, strict=True):
            resized = tape.Max(number(tape.Round(tape.Mul(n, scale))), tape.floats(1))
            offset = tape.Neg(tape.Floor(tape.Mul(tape.Sub(tape.floats(f), resized), tape.floats(0.5))))
            axes.append(Axis(number(side), resized, offset, f))
        return axes[0], axes[1]
    if isinstance(recipe.resize, int):
        short = tape.Min(height, width)
        resized = [tape.Div(tape.Mul(n, tape.value([recipe.resize])), short) for n in sizes]
    else:
        resized = [tape.value([n]) for n in recipe.resize]
    axes = []
    for i, side in enumerate(sizes):
        if recipe.crop is None:
            assert isinstance(recipe.resize, tuple)  # else the input would not have one size
            axes.append(Axis(number(side), number(resized[i]), tape.floats([0]), recipe.resize[i]))
        else:
            offset = half(tape.Sub(resized[i], tape.value([recipe.crop[i]])))
            axes.append(Axis(number(side), number(resized[i]), offset, recipe.crop[i]))
    return axes[0], axes[1]


def network_input(tape: Tape, picture: Picture, manifest: Manifest) -> ir.Value:
    """(batch, C, h, w): resized, cropped or letterboxed, scaled and normalised as the recipe says."""
    recipe = manifest.preprocess
    assert recipe is not None
    width_first = [(picture.columns, 3), (picture.rows, 2)]
    height_first = width_first[::-1]
    if isinstance(picture.turned, ir.Value):
        orders = (_resized(tape, picture.pixels, order, recipe) for order in (height_first, width_first))
        pixels = tape.Where(picture.turned, *orders)
    else:
        pixels = _resized(tape, picture.pixels, height_first if picture.turned else width_first, recipe)
    if recipe.fit == "letterbox":
        inside = tape.And(_inside(tape, picture.rows, (-1, 1)), _inside(tape, picture.columns, (1, -1)))
        pixels = tape.Where(inside, pixels, tape.floats(recipe.fill))
    if recipe.channels == "BGR" and manifest.input_shape[0] == 3:
        pixels = tape.Gather(pixels, [2, 1, 0], axis=1)
    mean, std = (np.array(numbers, np.float32).reshape(1, -1, 1, 1) for numbers in (recipe.mean, recipe.std))
    scaled = tape.Div(pixels, tape.floats(255))
    return tape.Div(tape.Sub(scaled, tape.floats(mean)), tape.floats(std))


def _turned(tape: Tape, rows: Axis, columns: Axis) -> bool | ir.Value:
    """Whether Pillow resizes the height of such a picture first: see runtime.images.preprocess.rows_first."""
    if not pillow_turns():
        return False
    lost_rows, lost_columns = (tape.Sub(axis.photo, axis.resized) for axis in (rows, columns))
    return tape.Greater(lost_rows, tape.Mul(tape.Max(lost_columns, tape.floats(0)), tape.floats(2)))


def _resized(tape: Tape, pixels: ir.Value, order: Sequence[tuple[Axis, int]], recipe: Preprocess) -> ir.Value:
    for axis, place in order:
        pixels = _resized_axis(tape, pixels, axis, place, recipe)
    return pixels


def _resized_axis(tape: Tape, pixels: ir.Value, axis: Axis, place: int, recipe: Preprocess) -> ir.Value:
    """One axis resized and cut, rounded to 8 bits. place: 2 for rows, 3 for columns."""

    def product(matrix: ir.Value) -> ir.Value:
        return tape.MatMul(matrix, pixels) if place == 2 else tape.MatMul(pixels, tape.Transpose(matrix, perm=[1, 0]))

    if isinstance(axis.photo, ir.Value):
        weights = _triangle(tape, axis)
        upper = tape.Floor(tape.Mul(weights, tape.floats(2.0**-HALF_BITS)))
        lower = tape.Sub(weights, tape.Mul(upper, tape.floats(2.0**HALF_BITS)))
    elif axis.photo == axis.size == axis.resized:
        return pixels
    else:
        fixed = _fixed_weights(axis, recipe.interpolation)
        upper, lower = (tape.floats(w) for w in (fixed >> HALF_BITS, fixed & (2**HALF_BITS - 1)))
    # two matrices of whole numbers below 2^11: every product and every sum is exact
    high, low = product(upper), product(lower)
    carried = tape.Floor(tape.Mul(low, tape.floats(2.0**-HALF_BITS)))
    summed = tape.Add(tape.Add(high, carried), tape.floats(2 ** (HALF_BITS - 1)))
    rounded = tape.Floor(tape.Mul(summed, tape.floats(2.0**-HALF_BITS)))
    return tape.Min(tape.Relu(rounded), tape.floats(255))


def _fixed_weights(axis: Axis, interpolation: str) -> np.ndarray:
    """Pillow's weights in fixed point: (size, photo) int64; rows outside the picture are 0."""
    weights = np.zeros((axis.size, axis.photo), np.int64)
    if interpolation == "nearest":
        numbers = Image.fromarray(np.arange(axis.photo, dtype=np.int32)[None])
        firsts = np.asarray(numbers.resize((axis.resized, 1), Image.Resampling.NEAREST))[0]
        counts, values = np.ones(axis.resized, np.int64), np.full((axis.resized, 1), 1 << FRACTION_BITS)
    else:
        firsts, counts, values = resize_spans(axis.photo, axis.resized, interpolation)
    for i in range(axis.size):
        row = i + axis.offset
        if 0 <= row < axis.resized:
            first, count = firsts[row], counts[row]
            weights[i, first : first + count] = values[row, :count]
    return weights


def _numbers(tape: Tape, axis: Axis, shape: tuple[int, int]) -> ir.Value:
    """The numbers of the input's positions in the resized picture, in a shape."""
    return tape.Add(tape.floats(np.arange(axis.size).reshape(shape)), axis.offset)


def _centres(tape: Tape, axis: Axis) -> tuple[ir.Value, ir.Value]:
    """In float64, as Pillow: the centres of the input's positions in the picture, (size, 1), and the picture's pixels
    for one of the resized picture, (1,).
    """
    photo, resized = (tape.Cast(n, to=ir.DataType.DOUBLE) for n in (axis.photo, axis.resized))
    step = tape.Div(photo, resized)
    numbers = tape.Cast(tape.Add(_numbers(tape, axis, (-1, 1)), tape.floats(0.5)), to=ir.DataType.DOUBLE)
    return tape.Mul(numbers, step), step


def _range(tape: Tape, size: ir.Value, shape: list[int]) -> ir.Value:
    """0, 1, ... size - 1 in a shape. size: (1,) float32."""
    count = tape.Squeeze(tape.Cast(size, to=ir.DataType.INT64), [0])
    numbers = tape.Range(tape.constant(np.array(0)), count, tape.constant(np.array(1)))
    return tape.Cast(tape.Reshape(numbers, shape), to=ir.DataType.FLOAT)


def _triangle(tape: Tape, axis: Axis) -> ir.Value:
    """(size, photo): Pillow's bilinear filter in fixed point, stretched where the picture shrinks."""

    def number(value: float) -> ir.Value:
        return tape.constant(np.array(value))

    centres, step = _centres(tape, axis)
    pixels = tape.Cast(tape.Add(_range(tape, axis.photo, [1, -1]), tape.floats(0.5)), to=ir.DataType.DOUBLE)
    distance = tape.Div(tape.Abs(tape.Sub(pixels, centres)), tape.Max(step, number(1.0)))
    weights = tape.Max(tape.Sub(number(1.0), distance), number(0.0))
    total = tape.ReduceSum(weights, [1], keepdims=1)
    scale = tape.Div(number(2.0**FRACTION_BITS), tape.Max(total, number(1e-9)))  # 0 for a position outside the picture
    return tape.Cast(tape.Floor(tape.Add(tape.Mul(weights, scale), number(0.5))), to=ir.DataType.FLOAT)


def _inside(tape: Tape, axis: Axis, shape: tuple[int, int]) -> ir.Value:
    """Whether positions of the input lie inside the resized picture, in a shape."""
    if not isinstance(axis.photo, ir.Value):
        rows = np.arange(axis.size).reshape(shape) + axis.offset
        return tape.constant((rows >= 0) & (rows < axis.resized))
    numbers = _numbers(tape, axis, shape)
    return tape.And(tape.Greater(numbers, tape.floats(-1)), tape.Less(numbers, axis.resized))


# ---- the map drawn over the picture


def drawn(tape: Tape, pixels: ir.Value, maps: ir.Value, colormap: str, opacity: float, seen: Any = None) -> ir.Value:
    """(batch, H, W, 3), whole numbers. pixels (batch, 3, H, W), 0 to 255; maps (batch, H, W) in [0, 1]; seen
    (1, 1, H, W) bool: what the network saw; the rest is dark and grey.
    """
    table = colorize(np.arange(256, dtype=np.float32) / 255, colormap).astype(np.float32)
    levels = tape.Cast(tape.Floor(tape.Add(tape.Mul(maps, tape.floats(255)), tape.floats(0.5))), to=ir.DataType.INT64)
    colours = tape.Transpose(tape.Gather(tape.floats(table), levels, axis=0), perm=[0, 3, 1, 2])
    blended = tape.Add(tape.Mul(pixels, tape.floats(1 - opacity)), tape.Mul(colours, tape.floats(opacity)))
    rounded = tape.Floor(tape.Add(blended, tape.floats(0.5)))
    if seen is not None:
        grey = tape.Floor(tape.Mul(tape.ReduceMean(pixels, [1], keepdims=1), tape.floats(UNSEEN)))
        rounded = tape.Where(seen, rounded, grey)
    return tape.Transpose(rounded, perm=[0, 2, 3, 1])


def overlay_of_picture(tape: Tape, picture: Picture, maps: ir.Value, colormap: str, opacity: float) -> ir.Value:
    """The map over the whole picture, at the picture's size. maps (batch, h, w)."""
    scaled, seen = minmax(tape, maps), None
    if picture.place is None:
        (rows, seen_rows), (columns, seen_columns) = _back(tape, picture.rows), _back(tape, picture.columns)
        columns = tape.Transpose(columns, perm=[1, 0])
        seen = tape.And(tape.Unsqueeze(seen_rows, [0, 1, 3]), tape.Unsqueeze(seen_columns, [0, 1, 2]))
    elif picture.place.is_whole:
        return drawn(tape, picture.pixels, scaled, colormap, opacity)
    else:
        rows, columns = map(tape.floats, picture.place.weights())
        inside = picture.place.seen()
        seen = None if inside.all() else tape.constant(inside[None, None])
    return drawn(tape, picture.pixels, tape.MatMul(tape.MatMul(rows, scaled), columns), colormap, opacity, seen)


def _back(tape: Tape, axis: Axis) -> tuple[ir.Value, ir.Value]:
    """From the input to a picture of any size: weights (photo, size), as Placement has them; what was seen (photo,)."""
    scale = tape.Div(axis.resized, axis.photo)
    centres = tape.Mul(tape.Add(_range(tape, axis.photo, [-1]), tape.floats(0.5)), scale)
    at = tape.Sub(tape.Sub(centres, tape.floats(0.5)), axis.offset)
    near = tape.Unsqueeze(tape.Min(tape.Relu(at), tape.floats(axis.size - 1)), [1])
    distance = tape.Abs(tape.Sub(near, tape.floats(np.arange(axis.size)[None])))
    weights = tape.Relu(tape.Sub(tape.floats(1), tape.Div(distance, tape.Max(scale, tape.floats(1)))))
    weights = tape.Div(weights, tape.ReduceSum(weights, [1], keepdims=1))
    inside = tape.And(
        tape.Greater(at, tape.floats(-0.5 - ROUNDING)), tape.Less(at, tape.floats(axis.size - 0.5 + ROUNDING))
    )
    return weights, inside


def overlay_of_input(
    tape: Tape, image: ir.Value, maps: ir.Value, manifest: Manifest, colormap: str, opacity: float
) -> ir.Value:
    """The map over what the network saw, from its preprocessed input (batch, C, h, w)."""
    recipe, channels = manifest.preprocess, manifest.input_shape[0]
    if recipe is not None and len(recipe.mean) in (1, channels):
        mean, std = (np.array(numbers, np.float32).reshape(1, -1, 1, 1) for numbers in (recipe.mean, recipe.std))
        pixels = tape.Add(tape.Mul(image, tape.floats(std)), tape.floats(mean))
        if recipe.channels == "BGR" and channels == 3:
            pixels = tape.Gather(pixels, [2, 1, 0], axis=1)
    else:
        low = tape.ReduceMin(image, [1, 2, 3], keepdims=1)
        span = tape.Sub(tape.ReduceMax(image, [1, 2, 3], keepdims=1), low)
        pixels = tape.Div(tape.Sub(image, low), tape.Where(tape.Greater(span, tape.floats(0)), span, tape.floats(1)))
    levels = tape.Floor(tape.Add(tape.Mul(pixels, tape.floats(255)), tape.floats(0.5)))
    levels = tape.Min(tape.Relu(levels), tape.floats(255))
    levels = tape.Gather(levels, [0, 1, 2] if channels >= 3 else [0, 0, 0], axis=1)
    return drawn(tape, levels, minmax(tape, maps), colormap, opacity)
