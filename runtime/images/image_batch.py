"""A batch of images on their way to the network, and back from its maps to the photos."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...kernels import GpuStream, resize_picture
from ..bundle.manifest import Manifest
from ..errors import InputError
from .opening import open_image
from .placement import Placement
from .preprocess import checked_recipe, fit, in_order, placed, preprocess, rows_first, undo

_ONE = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)


class ImageBatch:
    """Images that are read and checked; on_host or on_gpu preprocesses them.

    images: one picture or a sequence of them: paths, bytes of image files, file objects, Pillow images, uint8 or uint16
    arrays (height, width, 1, 3 or 4); these are preprocessed. Or float32 arrays or tensors, NCHW or a sequence of CHW:
    these are taken as they are. InputError names the image that does not fit.

    It keeps the photos as long as it lives, for the pictures under the maps.
    """

    def __init__(self, images: Any, manifest: Manifest) -> None:
        self._manifest = manifest
        self._items: list[np.ndarray | Image.Image] = []
        items = _items(images)
        if not items:
            raise InputError("no images were given")
        for i, item in enumerate(items):
            where = os.fspath(item) if isinstance(item, str | os.PathLike) else f"image {i}"
            if isinstance(item, np.ndarray) and (item.dtype.kind != "u" or item.dtype.itemsize > 2):
                self._items.append(_checked(item, manifest.input_shape, where))
            else:
                opened = open_image(item, manifest.input_shape[0], where)
                checked_recipe(manifest, where, opened.size)
                self._items.append(opened)

    def __len__(self) -> int:
        return len(self._items)

    def part(self, which: slice) -> ImageBatch:
        """Some of the images."""
        chosen = copy.copy(self)
        chosen._items = self._items[which]
        return chosen

    def on_host(self) -> np.ndarray:
        """The network's input (B, C, H, W) float32."""
        batch = np.stack([self._tensor(item) for item in self._items])
        for i, item in enumerate(self._items):
            if isinstance(item, np.ndarray):
                self._items[i] = batch[i]  # callers may use their arrays again
        return batch

    def on_gpu(self, stream: GpuStream) -> Any:
        """As on_host, on the GPU: the same bits as on the host."""
        batch, recipe = stream.empty((len(self), *self._manifest.input_shape)), self._manifest.preprocess
        for i, item in enumerate(self._items):
            image = batch[i : i + 1].reshape(*self._manifest.input_shape)
            if isinstance(item, np.ndarray):
                item = self._items[i] = item.copy()  # callers may use their arrays again
            if (
                isinstance(item, np.ndarray)
                or recipe is None
                or recipe.interpolation == "nearest"
                or recipe.fit == "letterbox"
            ):
                stream.upload(self._tensor(item), out=image)
                continue
            place = placed(item.size, recipe)
            picture = in_order(np.asarray(item, np.uint8).reshape(item.height, item.width, -1), recipe)
            crop = (place.top, place.left, *place.size)
            turned = rows_first(picture.shape[:2], place.resized)
            shades = recipe.mean, recipe.std, recipe.interpolation
            resize_picture(stream.upload(picture), place.resized, crop, *shades, turned, out=image, stream=stream)
        return batch

    def _tensor(self, item: np.ndarray | Image.Image) -> np.ndarray:
        return item if isinstance(item, np.ndarray) else preprocess(item, self._manifest)

    # ---- back to the photos

    def picture(self, index: int) -> np.ndarray:
        """What the network saw of an image, uint8 (H, W, 3), of the input's size."""
        item, recipe = self._items[index], self._manifest.preprocess
        if isinstance(item, np.ndarray) or recipe is None:
            return undo(np.asarray(item), recipe)
        return np.asarray(fit(item, recipe, recipe.interpolation).convert("RGB"))

    def photo(self, index: int) -> np.ndarray:
        """The photo, upright, uint8 (H, W, 3); of a float32 array the picture."""
        item = self._items[index]
        return self.picture(index) if isinstance(item, np.ndarray) else np.asarray(item.convert("RGB"))

    def placement(self, index: int) -> Placement:
        """Where the network's input lies in the photo."""
        item, recipe = self._items[index], self._manifest.preprocess
        if isinstance(item, np.ndarray) or recipe is None:
            return Placement.whole(self._manifest.input_shape[1:])
        return placed(item.size, recipe)

    def digest(self, index: int) -> str:
        """SHA-256 of the image as it was decoded: mode, size and pixels, or dtype, shape and numbers."""
        item = self._items[index]
        if isinstance(item, np.ndarray):
            said, data = f"{item.dtype}{list(item.shape)}", np.ascontiguousarray(item).tobytes()
        else:
            said, data = f"{item.mode}{list(item.size)}", item.tobytes()
        return hashlib.sha256(said.encode() + data).hexdigest()


def _items(images: Any) -> list[Any]:
    if isinstance(images, _ONE) or hasattr(images, "read"):
        return [images]
    if _is_array(images):
        array = _as_array(images)
        return list(array) if array.ndim == 4 else [array]
    if not isinstance(images, Sequence):
        raise InputError(
            f"images of type {type(images).__name__}: pass float32 NCHW or uint8 HWC arrays, paths, bytes, files or "
            "Pillow images"
        )
    return [x if isinstance(x, _ONE) or hasattr(x, "read") else _as_array(x) for x in images]


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") or hasattr(value, "detach")


def _as_array(value: Any) -> np.ndarray:
    """NumPy's array of an array, a nested list or a tensor, also one with a gradient or on a GPU."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value)


def _checked(array: np.ndarray, shape: tuple[int, int, int], where: str) -> np.ndarray:
    if array.dtype != np.float32:
        raise InputError(f"{where}: dtype {array.dtype}: pass preprocessed float32 arrays or uint8 pictures")
    if array.shape != shape:
        raise InputError(f"{where}: shape {array.shape}, the network takes {shape} (channels, height, width)")
    if not np.isfinite(array).all():
        raise InputError(f"{where}: holds NaN or infinity")
    return array
