"""Images in every form that users have -> the network's input, and the pixels to draw maps on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InputError, first_line
from .manifest import Manifest, Preprocess

_MODES = {1: "L", 3: "RGB"}
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def as_batch(images: Any, manifest: Manifest) -> tuple[np.ndarray, list[np.ndarray]]:
    """Network input (B, C, H, W) float32, and per image the uint8 (H, W, 3) picture that a map covers.

    images: one or a sequence of paths, Pillow images or uint8 HWC arrays, which are preprocessed; or float32 arrays, NCHW
    or a sequence of CHW, taken as they are. InputError names what does not fit.
    """
    shape = manifest.input_shape
    items = _items(images)
    if not items:
        raise InputError("no images were given")
    tensors, pictures = [], []
    for i, item in enumerate(items):
        where = str(item) if isinstance(item, str | Path) else f"image {i}"
        if isinstance(item, np.ndarray) and item.dtype != np.uint8:
            tensor = _checked(item, shape, where)
            picture = undo(tensor, manifest.preprocess)
        else:
            tensor, picture = preprocess(open_image(item, shape[0], where), manifest, where)
        tensors.append(tensor)
        pictures.append(picture)
    return np.stack(tensors), pictures


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
    """A Pillow image, upright, in the network's colour mode. InputError if it is not a readable image."""
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


def preprocess(image: Image.Image, manifest: Manifest, where: str = "image") -> tuple[np.ndarray, np.ndarray]:
    """Resize, crop, scale and normalise as the manifest says: (C, H, W) float32 and the cropped picture, uint8 (H, W, 3).

    InputError if the bundle records no preprocessing.
    """
    recipe = manifest.preprocess
    if recipe is None:
        raise InputError(
            f"{where}: this bundle does not say how pictures become its input: pass preprocessed float32 arrays, or export it "
            "with preprocess= (--resize, --crop, --mean, --std)"
        )
    image = fit(image, recipe, recipe.interpolation)
    pixels = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    if pixels.shape[:2] != manifest.input_shape[1:]:
        raise InputError(
            f"{where}: preprocessing gives {pixels.shape[:2]}, the network takes {manifest.input_shape[1:]}"
        )
    tensor = (pixels / 255 - np.array(recipe.mean, np.float32)) / np.array(recipe.std, np.float32)
    return np.ascontiguousarray(tensor.transpose(2, 0, 1), np.float32), np.asarray(image.convert("RGB"))


def fit(image: Image.Image, recipe: Preprocess, interpolation: str) -> Image.Image:
    """Resized and cropped as the recipe says."""
    if isinstance(recipe.resize, int):
        short, long = sorted(image.size)
        side, other = recipe.resize, int(recipe.resize * long / short)
        size = (side, other) if image.width <= image.height else (other, side)
    else:
        size = (recipe.resize[1], recipe.resize[0])
    image = image if image.size == size else image.resize(size, _FILTERS[interpolation])
    if recipe.crop is None:
        return image
    h, w = recipe.crop
    left, top = round((image.width - w) / 2), round((image.height - h) / 2)
    return image.crop((left, top, left + w, top + h))


def undo(tensor: np.ndarray, recipe: Preprocess | None) -> np.ndarray:
    """The picture behind a network input (C, H, W), uint8 (H, W, 3); without a recipe its range is stretched to 0..255."""
    pixels = tensor.transpose(1, 2, 0).astype(np.float32)
    if recipe is not None and len(recipe.mean) in (1, pixels.shape[2]):
        pixels = pixels * np.array(recipe.std, np.float32) + np.array(recipe.mean, np.float32)
    else:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low if high > low else 1)
    pixels = np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8)
    return pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)
