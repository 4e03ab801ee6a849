"""From an upright picture to the network's input: resize, crop or letterbox, normalise; and back."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ...kernels import resize_picture
from ..bundle.manifest import Manifest, Preprocess
from ..errors import InputError
from .placement import Placement

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


LARGEST = 100_000_000  # pixels of a resized picture: a narrow one grows without bound on its longer side


def checked_recipe(manifest: Manifest, where: str, size: tuple[int, int]) -> Preprocess:
    """The bundle's recipe for a picture of size (width, height). InputError if there is none, or it does not fit."""
    recipe = manifest.preprocess
    if recipe is None:
        raise InputError(
            f"{where}: this bundle does not say how to preprocess pictures: set it with camrt recipe BUNDLE "
            "(--resize, --crop, --mean, --std), or pass preprocessed float32 arrays"
        )
    place = placed(size, recipe)
    if place.resized[0] * place.resized[1] > LARGEST:
        raise InputError(
            f"{where}: {size[0]} x {size[1]} pixels become {place.resized[1]} x {place.resized[0]} by the recipe: it "
            "is too narrow, crop it first"
        )
    wanted = manifest.input_shape[1:]
    inside = place.top >= 0 and place.left >= 0 and place.top + place.size[0] <= place.resized[0]
    inside = inside and place.left + place.size[1] <= place.resized[1]
    if place.size != wanted or not (inside or recipe.fit == "letterbox"):
        raise InputError(f"{where}: preprocessing gives {place.size}, the network takes {wanted}")
    return recipe


def preprocess(image: Image.Image, manifest: Manifest, where: str = "image") -> np.ndarray:
    """Resizes, crops, scales and normalises as the manifest says: (C, H, W) float32.

    InputError if the bundle records no preprocessing, or its result has another size than the network's input.
    """
    recipe = checked_recipe(manifest, where, image.size)
    image = fit(image, recipe, recipe.interpolation)
    pixels = in_order(np.asarray(image, np.float32).reshape(image.height, image.width, -1), recipe)
    tensor = (pixels / 255 - np.array(recipe.mean, np.float32)) / np.array(recipe.std, np.float32)
    return np.ascontiguousarray(tensor.transpose(2, 0, 1), np.float32)


def placed(size: tuple[int, int], recipe: Preprocess) -> Placement:
    """Where the network's input lies in a picture of size (width, height).

    In a letterbox, an odd row or column of the fill is at the bottom or right.
    """
    width, height = size
    if recipe.fit == "letterbox":
        (full_height, full_width) = recipe.resize  # type: ignore[misc]
        scale = min(full_height / height, full_width / width)
        resized = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = (full_height - resized[0]) // 2, (full_width - resized[1]) // 2
        return Placement((height, width), resized, -top, -left, (full_height, full_width))
    if isinstance(recipe.resize, int):
        short, long = sorted(size)
        side, other = recipe.resize, int(recipe.resize * long / short)
        resized = (other, side) if width <= height else (side, other)
    else:
        resized = recipe.resize
    h, w = resized if recipe.crop is None else recipe.crop
    return Placement((height, width), resized, round((resized[0] - h) / 2), round((resized[1] - w) / 2), (h, w))


def fit(image: Image.Image, recipe: Preprocess, interpolation: str) -> Image.Image:
    """The image, resized and cropped, or letterboxed, as the recipe says; interpolation replaces the recipe's."""
    place = placed(image.size, recipe)
    (height, width), (h, w) = place.resized, place.size
    image = image if image.size == (width, height) else image.resize((width, height), _FILTERS[interpolation])
    if recipe.fit == "letterbox":
        canvas = Image.new(image.mode, (w, h), (recipe.fill,) * len(image.getbands()))
        canvas.paste(image, (-place.left, -place.top))
        return canvas
    box = (place.left, place.top, place.left + w, place.top + h)
    return image if recipe.crop is None else image.crop(box)


def in_order(pixels: np.ndarray, recipe: Preprocess) -> np.ndarray:
    """Converts pixels (H, W, C) from RGB to the network's channel order, or back."""
    return pixels if recipe.channels == "RGB" else np.ascontiguousarray(pixels[..., ::-1])


def rows_first(size: Sequence[int], target: Sequence[int]) -> bool:
    """Whether the installed Pillow resizes the height first, then the width. size, target: (height, width).

    Pillow 13 does where the height shrinks by more than twice what the width does; older ones never do.
    """
    return target[0] < size[0] and size[0] - target[0] > 2 * (size[1] - target[1]) and pillow_turns()


@functools.cache
def pillow_turns() -> bool:
    """Whether the installed Pillow ever resizes the height first: tested on a picture where the order matters."""
    picture = np.random.default_rng(0).integers(0, 256, (64, 8, 1), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(picture[..., 0]).resize((6, 5), Image.Resampling.BICUBIC), np.float32)
    found = [
        np.array_equal(
            resize_picture(picture, (5, 6), (0, 0, 5, 6), [0], [1 / 255], "bicubic", turned).round()[0], resized
        )
        for turned in (False, True)
    ]
    return found == [False, True]


def undo(tensor: np.ndarray, recipe: Preprocess | None) -> np.ndarray:
    """The picture of a network input (C, H, W), uint8 (H, W, 3): undoes the recipe's mean and std; without a recipe,
    stretches the values to 0..255.
    """
    pixels = tensor.transpose(1, 2, 0).astype(np.float32)
    if recipe is not None and len(recipe.mean) in (1, pixels.shape[2]):
        pixels = in_order(pixels * np.array(recipe.std, np.float32) + np.array(recipe.mean, np.float32), recipe)
    else:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low if high > low else 1)
    pixels = np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8)
    return pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)
