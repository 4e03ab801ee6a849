"""Makes the network's input, and the pictures under the maps, of files, Pillow images or arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...kernels import GpuStream, resize_picture
from ..bundle.manifest import Manifest, Preprocess
from ..errors import InputError, first_line

_MODES = {1: "L", 3: "RGB"}
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


Draw = Callable[[], list[np.ndarray]]
"""Draws per image the uint8 (H, W, 3) picture that a map covers."""


def as_batch(images: Any, manifest: Manifest) -> tuple[np.ndarray, list[np.ndarray]]:
    """Preprocesses images on the host: network input (B, C, H, W) float32, and per image its picture, uint8 (H, W, 3).

    images: as for ImageBatch. InputError names the image that does not fit.
    """
    batch, draw = ImageBatch(images, manifest).on_host()
    return batch, draw()


class ImageBatch:
    """Images that are read and checked; on_host or on_gpu preprocesses them.

    images: one path, Pillow image or uint8 HWC array, or a sequence of them: these are preprocessed. Or float32 arrays,
    NCHW or a sequence of CHW: these are taken as they are. InputError names the image that does not fit.
    """

    def __init__(self, images: Any, manifest: Manifest) -> None:
        self._manifest = manifest
        self._items: list[np.ndarray | Image.Image] = []
        items = _items(images)
        if not items:
            raise InputError("no images were given")
        for i, item in enumerate(items):
            where = str(item) if isinstance(item, str | Path) else f"image {i}"
            if isinstance(item, np.ndarray) and item.dtype != np.uint8:
                self._items.append(_checked(item, manifest.input_shape, where))
            else:
                opened = open_image(item, manifest.input_shape[0], where)
                _recipe(manifest, where, opened.size)
                self._items.append(opened)

    def __len__(self) -> int:
        return len(self._items)

    def on_host(self) -> tuple[np.ndarray, Draw]:
        """(network input (B, C, H, W) float32, a function that draws the pictures under the maps)."""
        made = [(i, None) if isinstance(i, np.ndarray) else preprocess(i, self._manifest) for i in self._items]
        batch, recipe = np.stack([tensor for tensor, _ in made]), self._manifest.preprocess

        def draw() -> list[np.ndarray]:
            pictures = (picture for _, picture in made)
            return [undo(x, recipe) if p is None else p for x, p in zip(batch, pictures, strict=True)]

        return batch, draw

    def on_gpu(self, stream: GpuStream) -> tuple[Any, Draw]:
        """As on_host, with the network input on the GPU: the same bits as on the host."""
        batch, recipe = stream.empty((len(self), *self._manifest.input_shape)), self._manifest.preprocess
        kept = [i.copy() if isinstance(i, np.ndarray) else i for i in self._items]  # callers may reuse arrays
        for i, item in enumerate(kept):
            image = batch[i : i + 1].reshape(*self._manifest.input_shape)
            if (
                isinstance(item, np.ndarray)
                or recipe is None
                or recipe.interpolation == "nearest"
                or recipe.fit == "letterbox"
            ):
                stream.upload(self._one(item)[0], out=image)
                continue
            (height, width), crop = placed(item.size, recipe)
            picture = in_order(np.asarray(item, np.uint8).reshape(item.height, item.width, -1), recipe)
            turned = rows_first(picture.shape[:2], (height, width))
            shades = recipe.mean, recipe.std, recipe.interpolation
            resize_picture(stream.upload(picture), (height, width), crop, *shades, turned, out=image, stream=stream)
        return batch, lambda: [self._one(item)[1] for item in kept]

    def _one(self, item: np.ndarray | Image.Image) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(item, np.ndarray):
            return item, undo(item, self._manifest.preprocess)
        return preprocess(item, self._manifest)


def _items(images: Any) -> list[Any]:
    if isinstance(images, str | Path | Image.Image):
        return [images]
    if hasattr(images, "__array__"):
        array = np.asarray(images)
        return list(array) if array.ndim == 4 else [array]
    if not isinstance(images, Sequence):
        raise InputError(
            f"images of type {type(images).__name__}: pass float32 NCHW or uint8 HWC arrays, paths or Pillow images"
        )
    plain = (str, Path, Image.Image)
    return [x if isinstance(x, plain) else np.asarray(x) for x in images]


def _checked(array: np.ndarray, shape: tuple[int, int, int], where: str) -> np.ndarray:
    if array.dtype != np.float32:
        raise InputError(f"{where}: dtype {array.dtype}: pass preprocessed float32 arrays or uint8 pictures")
    if array.shape != shape:
        raise InputError(f"{where}: shape {array.shape}, the network takes {shape} (channels, height, width)")
    if not np.isfinite(array).all():
        raise InputError(f"{where}: holds NaN or infinity")
    return array


def open_image(item: Any, channels: int, where: str) -> Image.Image:
    """A Pillow image, rotated as its EXIF data says, in grey or RGB.

    item: a path, a Pillow image or a uint8 array (height, width[, 1, 3 or 4]); channels: 1 or 3, the network's;
    where: names the image in messages. InputError if it is not a readable 8-bit image.
    """
    if channels not in _MODES:
        raise InputError(f"{where}: the network takes {channels} channels: pass preprocessed float32 arrays")
    try:
        if isinstance(item, str | Path):
            with Image.open(item) as opened:
                return _upright(opened, channels, where)
        if isinstance(item, np.ndarray):
            if item.ndim not in (2, 3) or (item.ndim == 3 and item.shape[2] not in (1, 3, 4)) or 0 in item.shape:
                raise InputError(f"{where}: uint8 array of shape {item.shape}: pass (height, width, 3)")
            item = Image.fromarray(item[..., 0] if item.ndim == 3 and item.shape[2] == 1 else item)
        return _upright(item, channels, where)
    except FileNotFoundError:
        raise InputError(f"{where}: no such file") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: not a readable image ({first_line(error)})") from None


def _upright(image: Image.Image, channels: int, where: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"{where}: has more than 8 bits a channel ({image.mode}): scale it to 8 bits, or pass float32 arrays"
        )
    return ImageOps.exif_transpose(image).convert(_MODES[channels])


def _recipe(manifest: Manifest, where: str, size: tuple[int, int]) -> Preprocess:
    """The bundle's recipe for a picture of size (width, height). InputError if there is none, or it does not fit."""
    recipe = manifest.preprocess
    if recipe is None:
        raise InputError(
            f"{where}: this bundle does not say how to preprocess pictures: set it with camrt recipe BUNDLE "
            "(--resize, --crop, --mean, --std), or pass preprocessed float32 arrays"
        )
    (height, width), (top, left, *given) = placed(size, recipe)
    if recipe.fit == "letterbox" and tuple(given) == manifest.input_shape[1:]:
        return recipe
    if (
        tuple(given) != manifest.input_shape[1:]
        or min(top, left) < 0
        or top + given[0] > height
        or left + given[1] > width
    ):
        raise InputError(f"{where}: preprocessing gives {tuple(given)}, the network takes {manifest.input_shape[1:]}")
    return recipe


def preprocess(image: Image.Image, manifest: Manifest, where: str = "image") -> tuple[np.ndarray, np.ndarray]:
    """Resizes, crops, scales and normalises as the manifest says: (C, H, W) float32, and the cropped picture, uint8
    (H, W, 3), RGB.

    InputError if the bundle records no preprocessing, or its result has another size than the network's input.
    """
    recipe = _recipe(manifest, where, image.size)
    image = fit(image, recipe, recipe.interpolation)
    pixels = in_order(np.asarray(image, np.float32).reshape(image.height, image.width, -1), recipe)
    tensor = (pixels / 255 - np.array(recipe.mean, np.float32)) / np.array(recipe.std, np.float32)
    return np.ascontiguousarray(tensor.transpose(2, 0, 1), np.float32), np.asarray(image.convert("RGB"))


def placed(size: tuple[int, int], recipe: Preprocess) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """For a picture of size (width, height): the size (height, width) that it is resized to, and then the crop (top,
    left, height, width).

    In a letterbox the crop is at least as large as the resized picture: top and left are 0 or negative. If the fill is
    odd, the extra row or column is at the bottom or right.
    """
    if recipe.fit == "letterbox":
        (full_height, full_width), (picture_width, picture_height) = recipe.resize, size  # type: ignore[misc]
        scale = min(full_height / picture_height, full_width / picture_width)
        inner = max(1, round(picture_height * scale)), max(1, round(picture_width * scale))
        top, left = (full_height - inner[0]) // 2, (full_width - inner[1]) // 2
        return inner, (-top, -left, full_height, full_width)
    width, height = size
    if isinstance(recipe.resize, int):
        short, long = sorted(size)
        side, other = recipe.resize, int(recipe.resize * long / short)
        resized = (other, side) if width <= height else (side, other)
    else:
        resized = recipe.resize
    h, w = resized if recipe.crop is None else recipe.crop
    return resized, (round((resized[0] - h) / 2), round((resized[1] - w) / 2), h, w)


def fit(image: Image.Image, recipe: Preprocess, interpolation: str) -> Image.Image:
    """The image, resized and cropped, or letterboxed, as the recipe says; interpolation replaces the recipe's."""
    (height, width), (top, left, h, w) = placed(image.size, recipe)
    image = image if image.size == (width, height) else image.resize((width, height), _FILTERS[interpolation])
    if recipe.fit == "letterbox":
        canvas = Image.new(image.mode, (w, h), (recipe.fill,) * len(image.getbands()))
        canvas.paste(image, (-left, -top))
        return canvas
    return image if recipe.crop is None else image.crop((left, top, left + w, top + h))


def in_order(pixels: np.ndarray, recipe: Preprocess) -> np.ndarray:
    """Converts pixels (H, W, C) from RGB to the network's channel order, or back."""
    return pixels if recipe.channels == "RGB" else np.ascontiguousarray(pixels[..., ::-1])


def rows_first(size: Sequence[int], target: Sequence[int]) -> bool:
    """Whether the installed Pillow resizes the height first, then the width. size, target: (height, width).

    Pillow 13 does where the height shrinks by more than twice what the width does; older ones never do.
    """
    return target[0] < size[0] and size[0] - target[0] > 2 * (size[1] - target[1]) and _turns()


@functools.cache
def _turns() -> bool:
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
