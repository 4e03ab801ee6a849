"""Pictures in every form that users have -> an upright Pillow image in the network's colour mode.

Stated rules: transparent pixels are composed on white; of an animation the first frame is taken; pixels of 16 bits are
divided by 257 (65535 is white); floating-point pixels must lie in 0..1, or else in 0..255.
"""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError, first_line

_MODES = {1: "L", 3: "RGB"}


def open_image(item: Any, channels: int, where: str) -> Image.Image:
    """A Pillow image, upright, in the network's colour mode.

    item: a path, the bytes of an image file, a file object, a Pillow image, or a uint8 or uint16 array (height, width),
    (height, width, 1), 3 or 4. channels: the network's, 1 or 3. InputError if it is not a readable image.
    """
    if channels not in _MODES:
        raise InputError(f"{where}: the network takes {channels} channels: pass preprocessed float32 arrays")
    try:
        if isinstance(item, bytes | bytearray | memoryview):
            item = io.BytesIO(item)
        if isinstance(item, str | os.PathLike) or hasattr(item, "read"):
            with Image.open(item) as opened:
                return _upright(opened, channels, where)
        if isinstance(item, np.ndarray):
            item = _from_array(item, where)
        return _upright(item, channels, where)
    except FileNotFoundError:
        raise InputError(f"{where}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{where}: a folder, not an image") from None
    except UnidentifiedImageError:
        raise InputError(f"{where}: not a readable image (its format is not known)") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: not a readable image ({first_line(error)})") from None


def _from_array(array: np.ndarray, where: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        raise InputError(f"{where}: {array.dtype} array of shape {array.shape}: pass (height, width, 3)")
    if array.dtype != np.uint8:
        array = _to_bytes(array, where)
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _to_bytes(pixels: np.ndarray, where: str) -> np.ndarray:
    """Pixels of more than 8 bits as uint8, by the rules above. InputError where they do not say how bright they are."""
    if pixels.dtype.kind in "iu":
        low, high = int(pixels.min(initial=0)), int(pixels.max(initial=0))
        if low < 0 or high > 65535:
            raise InputError(f"{where}: pixels from {low} to {high}: scale them to 8 bits, or pass float32 arrays")
        return (pixels.astype(np.float64) / 257 + 0.5).astype(np.uint8)
    if not np.isfinite(pixels).all() or pixels.min(initial=0) < 0 or pixels.max(initial=0) > 255:
        raise InputError(f"{where}: floating-point pixels must lie in 0..1, or in 0..255")
    scale = 255 if pixels.max(initial=0) <= 1 else 1
    return (pixels * scale + 0.5).astype(np.uint8)


def _upright(image: Image.Image, channels: int, where: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_bytes(np.asarray(image), where))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(_MODES[channels])
