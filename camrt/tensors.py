"""Questions and answers as named tensors, as the inference protocol of our server and of Triton has them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .method_choice import layers_of, parse_method
from .questions import Question, question
from .runtime.errors import InputError
from .runtime.explainer import Explainer
from .runtime.explanation import Explanation
from .runtime.images.image_batch import ImageBatch

INPUTS = ("image", "picture", "target", "percentile")
PIXELS = 50_000_000  # the most of a picture, where nobody says otherwise


class PictureTooLarge(InputError):
    """A picture has more pixels than are allowed."""


class Asked(NamedTuple):
    """What a request asks. images: arrays (C, H, W) float32, or picture files; options, targets: one for each."""

    images: list[Any]
    method: str
    options: list[dict[str, Any]]
    layers: list[str] | str | None
    targets: list[Any]


def read_tensors(inputs: Mapping[str, Any], parameters: Mapping[str, Any], method: str = "winsor_cam") -> Asked:
    """inputs: image (B, C, H, W) float32, or picture, B files; target and percentile (B,) or (B, 1), both optional.
    parameters: method ("NAME" or "NAME:option=value,..."; else `method`), percentile, layers ("conv", "last", or names
    with commas between them). InputError, UnknownMethod.
    """
    if set(inputs) - set(INPUTS) or ("image" in inputs) == ("picture" in inputs):
        raise InputError(f"inputs {', '.join(inputs) or 'none'}: pass image or picture; and target, percentile")
    images: Any = inputs.get("picture", inputs.get("image"))
    if isinstance(images, np.ndarray) and (images.dtype != np.float32 or images.ndim != 4):
        raise InputError(f"input image: {images.dtype} {list(images.shape)}, pass FP32 (batch, C, H, W)")
    count = len(images)
    if count == 0:
        raise InputError("no images were given")
    choice = parse_method(str(parameters.get("method", method)))
    targets = _one_each("target", inputs["target"], count) if "target" in inputs else [None] * count
    options: list[dict[str, Any]] = [dict(choice.options) for _ in range(count)]
    if choice.name != "winsor_cam" and ("percentile" in inputs or "percentile" in parameters):
        raise InputError(f"{choice.name} has no percentile: it is winsor_cam's")
    if choice.name == "winsor_cam":
        default = parameters.get("percentile", choice.options.get("percentile", 90))
        given = inputs.get("percentile")
        own = [default] * count if given is None else _one_each("percentile", given, count)
        for row, percentile in zip(options, own, strict=True):
            row["percentile"] = percentile
    names = parameters.get("layers")
    return Asked(
        list(images), choice.name, options, layers_of(None if names is None else str(names).split(",")), targets
    )


def _one_each(name: str, value: Any, images: int) -> list[Any]:
    array = np.asarray(value)
    if array.shape not in ((images,), (images, 1)):
        raise InputError(f"input {name!r}: shape {list(array.shape)}, there are {images} images")
    return array.reshape(images).tolist()


def read_question(
    explainer: Explainer,
    image: bytes | np.ndarray,
    method: str,
    options: Mapping[str, Any],
    layers: Sequence[str] | str | None,
    target: str | int | None,
    pixels: int,
) -> Question:
    """Reads a picture, or takes a float32 array (C, H, W), and checks what is asked of it. pixels: the most of a
    picture, refused (PictureTooLarge) by its header alone. CamrtError.
    """
    if isinstance(image, bytes):
        check_pixels(image, pixels)
        read = ImageBatch(image, explainer.manifest).on_host()[0]
    else:
        read = image
        ImageBatch(image, explainer.manifest)  # checks it; a batch copies it later
    return question(explainer, read, method, options, layers, target)


def check_pixels(picture: bytes, most: int) -> None:
    """PictureTooLarge if it has more pixels than that, by its header alone."""
    try:
        with Image.open(io.BytesIO(picture)) as opened:
            width, height = opened.size
    except Image.DecompressionBombError:
        raise PictureTooLarge(f"the picture has more than {most} pixels") from None
    except Exception:
        return  # ImageBatch says what is wrong
    if width * height > most:
        raise PictureTooLarge(f"the picture has {width} x {height} pixels, at most {most} are allowed")


def write_tensors(explained: Sequence[Explanation]) -> dict[str, np.ndarray]:
    """map (B, H, W), logits (B, classes) and layer_weights (B, layers) float32; class (B,) int64."""
    return {
        "map": np.concatenate([e.maps for e in explained]),
        "logits": np.concatenate([e.logits for e in explained]),
        "layer_weights": np.concatenate([e.layer_weights for e in explained]),
        "class": np.concatenate([e.target for e in explained if e.target is not None]).astype(np.int64),
    }
