"""Rows of explanations, as Arrow tables."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from ..kernels import minmax
from ..runtime.bundle.manifest import Manifest
from ..runtime.cams.data.masked_runs import APPROXIMATE
from ..runtime.errors import CamrtError
from ..runtime.explainer import Explainer
from ..runtime.explanation import Explanation
from ..runtime.images.image_batch import ImageBatch
from ..tensors import PIXELS, check_pixels

MAPS = ("float16", "float32", "png", "none")


@dataclass(frozen=True)
class Wanted:
    """What is asked of every image, and what its row holds.

    map: "float16", "float32", "png" (8 bits, scaled to 0..255 by min-max), or "none". overlay: whether the map over the
    photo is kept, as PNG. pixels: the most of a picture.
    """

    method: str = "winsor_cam"
    options: dict[str, Any] = field(default_factory=dict)
    layers: Sequence[str] | str | None = None
    target: int | None = None
    map: str = "float16"
    overlay: bool = False
    pixels: int = PIXELS


def schema(manifest: Manifest, wanted: Wanted, precision: str) -> Any:
    """The columns: path, target, probabilities, layer_weights, map and overlay if they are wanted, in int8 and bf16
    map_error (empty where a map is exact), error.
    """
    import pyarrow as pa

    fields = [
        ("path", pa.string()),
        ("target", pa.int64()),
        ("probabilities", pa.list_(pa.float32(), manifest.num_classes)),
        ("layer_weights", pa.list_(pa.float32())),
    ]
    if wanted.map in ("float16", "float32"):
        height, width = manifest.input_shape[1:]
        fields.append(("map", pa.list_(pa.float16() if wanted.map == "float16" else pa.float32(), height * width)))
    elif wanted.map == "png":
        fields.append(("map", pa.binary()))
    if wanted.overlay:
        fields.append(("overlay", pa.binary()))
    if precision in APPROXIMATE:
        fields.append(("map_error", pa.float32()))
    return pa.schema([*fields, ("error", pa.string())])


@dataclass(frozen=True)
class Prepared:
    """An image that was read: where it is from, and the network's input with its photo, or why there is none."""

    path: str
    image: np.ndarray | None = None
    photo: ImageBatch | None = None
    problem: str | None = None


def prepare(path: str, picture: bytes | np.ndarray | Exception, manifest: Manifest, wanted: Wanted) -> Prepared:
    """Decodes and preprocesses one picture. Whatever is wrong with it is told in its row."""
    if isinstance(picture, Exception):
        return Prepared(path, problem=str(picture))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's: what matters is in the row
            if isinstance(picture, bytes):
                check_pixels(picture, wanted.pixels)
            photo = ImageBatch(picture, manifest)
            return Prepared(path, photo.on_host()[0], photo if wanted.overlay else None)
    except CamrtError as error:
        return Prepared(path, problem=str(error).removeprefix("image 0: "))


def explain_rows(explainer: Explainer, images: Sequence[Prepared], wanted: Wanted) -> tuple[list[str], dict[str, Any]]:
    """Explains images by one run of the network; if it fails, one by one, so that one bad image spoils no other.

    Returns their problems ("" where there is none), and columns of those that were explained: target (n,),
    probabilities (n, classes), layer_weights (n, layers), map (n, H, W), overlay (n,), map_error (n,).
    """
    problems = [image.problem or "" for image in images]
    good = [i for i, image in enumerate(images) if image.image is not None]
    found = _explained(explainer, [images[i] for i in good], wanted)
    for i, one in zip(good, found, strict=True):
        if isinstance(one, str):
            problems[i] = one
    explained = [e for e in found if not isinstance(e, str)]
    return problems, _columns(explained, [images[i] for i in good if not problems[i]], wanted)


_Row = tuple[Explanation, int]  # an explanation of several images, and which of them


def _explained(explainer: Explainer, images: Sequence[Prepared], wanted: Wanted) -> list[_Row | str]:
    if not images:
        return []
    given = np.stack([image.image for image in images if image.image is not None])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constant maps: the map is in the row
            targets = None if wanted.target is None else [wanted.target] * len(images)
            explanation = explainer.explain(given, wanted.method, targets, wanted.layers, **wanted.options)
        return [(explanation, i) for i in range(len(images))]
    except CamrtError as error:
        if len(images) == 1:
            return [str(error).removeprefix("image 0: ")]
    return [row for image in images for row in _explained(explainer, [image], wanted)]


def _columns(rows: Sequence[_Row], images: Sequence[Prepared], wanted: Wanted) -> dict[str, Any]:
    if not rows:
        return {}
    columns: dict[str, Any] = {
        "target": np.array([_target(e, i) for e, i in rows], np.int64),
        "probabilities": np.stack([e.probabilities[i] for e, i in rows]),
        "layer_weights": np.stack([e.layer_weights[i] for e, i in rows]),
    }
    if wanted.map in ("float16", "float32"):
        columns["map"] = np.stack([e.maps[i] for e, i in rows]).astype(wanted.map)
    elif wanted.map == "png":
        columns["map"] = [_png(minmax(e.maps[i : i + 1])[0]) for e, i in rows]
    if wanted.overlay:
        drawn = [replace(e.for_image(i), images=image.photo).png(0) for (e, i), image in zip(rows, images, strict=True)]
        columns["overlay"] = drawn
    if "map_error" in rows[0][0].details:
        columns["map_error"] = np.array([e.details["map_error"][i] for e, i in rows], np.float32)
    return columns


def _target(explanation: Explanation, index: int) -> int:
    assert explanation.target is not None
    return int(explanation.target[index])


def _png(scaled: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.rint(scaled * 255).astype(np.uint8)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def as_table(paths: Sequence[str], problems: Sequence[str], columns: dict[str, Any], schema: Any) -> Any:
    """An Arrow table: a row for each path, those with a problem empty but for it."""
    import pyarrow as pa

    good = np.array([not problem for problem in problems], bool)
    place = np.where(good, np.cumsum(good) - 1, -1)
    take = pa.array(place, mask=~good)
    arrays = []
    for one in schema:
        if one.name == "path":
            arrays.append(pa.array(paths, pa.string()))
        elif one.name == "error":
            arrays.append(pa.array([problem or None for problem in problems], pa.string()))
        elif not good.any() or one.name not in columns:
            arrays.append(pa.nulls(len(paths), one.type))
        else:
            made = _array(columns[one.name], one.type)
            arrays.append(made if good.all() else made.take(take))
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(values: Any, kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_fixed_size_list(kind):
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    return pa.array(list(values) if pa.types.is_list(kind) else values, kind)
