"""Masks of the object in an image."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..runtime.errors import InputError
from ..runtime.explainer import Explainer
from ..runtime.images.opening import open_image
from ..runtime.images.preprocess import fit


@dataclass(frozen=True)
class Mask:
    """object, valid (H, W) bool, resized and cropped as the network's input; valid: pixels that count."""

    object: np.ndarray
    valid: np.ndarray


def read_mask(path: Path, image: Path, explainer: Explainer, void: int | None = None) -> Mask:
    """Reads an object mask, which must have its image's size, and preprocesses it like the image.

    0 is background; any other value is the object; pixels with the value `void` do not count. void: by default 255 in
    palette pictures, as in Pascal VOC, and none in grey pictures. InputError if the mask cannot be read, has another
    size than its image, or has no object inside the crop that the network sees.
    """
    try:
        with Image.open(path) as opened:
            if opened.mode not in ("1", "L", "P"):
                raise InputError(f"{path}: mode {opened.mode}: save masks as palette or 8-bit grey pictures")
            void = 255 if void is None and opened.mode == "P" else void
            values = np.asarray(opened if opened.mode != "1" else opened.convert("L"), np.uint8)
        size = open_image(image, explainer.manifest.input_shape[0], str(image)).size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable mask ({error})") from None
    if values.shape != size[::-1]:
        width, height = values.shape[::-1]
        raise InputError(f"{path}: {width} x {height}, its image is {size[0]} x {size[1]}: make the sizes equal")
    recipe = explainer.manifest.preprocess
    assert recipe is not None  # the image was preprocessed
    kinds = np.where(values == void, 2, values > 0).astype(np.uint8)
    fitted = np.asarray(fit(Image.fromarray(kinds), recipe, "nearest"))
    if not (fitted == 1).any():
        raise InputError(f"{path}: has no object inside the crop that the network sees")
    return Mask(fitted == 1, fitted != 2)


MASK_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")


def find_masks(images: Sequence[Path], folder: Path, names: Mapping[Path, str] | None = None) -> dict[Path, Path]:
    """image -> its mask, for the images that have one.

    names: image -> its path below the folder of images; by default below what they have in common.
    A mask has its image's relative path, without the suffix; or, if only one image has that stem, the stem alone.
    InputError if the folder does not exist or no image has a mask.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of masks")
    if names is None:
        root = Path(os.path.commonpath([image.parent for image in images]))
        names = {image: image.relative_to(root).as_posix() for image in images}
    masks = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in MASK_SUFFIXES]
    by_place = {p.relative_to(folder).with_suffix(""): p for p in masks}
    stems = Counter(image.stem for image in images)
    found = {}
    for image in images:
        place = Path(names[image]).with_suffix("")
        if place in by_place:
            found[image] = by_place[place]
        elif stems[image.stem] == 1 and Path(image.stem) in by_place:
            found[image] = by_place[Path(image.stem)]
    if not found:
        raise InputError(f"{folder}: no mask has the name of an image, e.g. {images[0].stem}.png")
    return found
