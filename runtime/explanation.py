"""What `explain` returns."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..kernels import minmax
from .bundle.manifest import Manifest
from .cams import Result, pickles, retune_of_rows
from .errors import InputError
from .images.image_batch import ImageBatch
from .images.legend import with_legend
from .images.overlay import overlay
from .scores import probabilities

Index = int | tuple[int, int]
PNG_COMPRESSION = 3  # higher levels take several times as long, for a few percent


@dataclass(frozen=True)
class Explanation:
    """Maps of a batch of B images, or of K targets for each image.

    maps (B, H, W) or (B, K, H, W) float32, on the network's grid of pixels, scaled as the method defines it. target
    (B,) or (B, K) int64, or None for a seed array. logits (B, classes) float32. layers: names. layer_weights (B, L) or
    (B, K, L) float32. options: the method's. details: name -> (B,) or (B, K), what the method reports beside its maps.
    images: what was explained. provenance: what made it (bundle and its hash, engine, precision, version of camrt).

    It pickles; made on a GPU, it then leaves what `retune` needs behind.
    """

    method: str
    maps: np.ndarray
    target: np.ndarray | None
    logits: np.ndarray
    layers: tuple[str, ...]
    layer_weights: np.ndarray
    options: dict[str, Any]
    images: ImageBatch
    manifest: Manifest
    provenance: Mapping[str, Any]
    details: dict[str, np.ndarray] = field(default_factory=dict)
    _retune: Callable[..., Result] | None = None

    def __len__(self) -> int:
        return len(self.maps)

    def __repr__(self) -> str:
        said = f"{self.method}, {len(self)} image{'s' * (len(self) != 1)}, maps {list(self.maps.shape)}"
        targets = "" if self.target is None else f", target {self.target.ravel()[:4].tolist()}"
        more = ", ..." if self.target is not None and self.target.size > 4 else ""
        return f"<Explanation: {said}{targets}{more}, {self.provenance.get('engine', '')}>"

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("pictures", "photos")}
        if not pickles(self._retune):  # it holds arrays on a GPU
            state["_retune"] = None
        return state

    # ---- numbers

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """(B, classes) float32: the softmax or sigmoid of the logits, as the bundle says."""
        return probabilities(self.logits, self.manifest)

    def top(self, count: int = 5) -> list[list[tuple[int, str, float]]]:
        """Per image the classes with the largest logits, as (number, name or "", probability), the largest first."""
        if not isinstance(count, int) or count < 0:
            raise InputError(f"top {count!r}: pass how many classes")
        names = self.manifest.classes
        order = (-self.logits).argsort(axis=1, kind="stable")[:, :count]
        return [
            [(int(c), names[c] if names else "", float(self.probabilities[i, c])) for c in row]
            for i, row in enumerate(order)
        ]

    def normalized(self) -> np.ndarray:
        """The maps scaled to [0, 1] by min-max, each by itself; a constant map becomes 0. Same shape as `maps`."""
        return minmax(self.maps)

    def photo_map(self, index: Index) -> np.ndarray:
        """The map of image `index` (or of image and target) on the photo's own pixels, (H, W) float32.

        The map goes back through crop, letterbox and resize, bilinearly. NaN where the network did not see the photo.
        """
        chosen, image = self._chosen(self.maps, index)
        return self.images.placement(image).to_photo(chosen)

    def retune(self, **options: Any) -> Explanation:
        """The same explanation with other options of its method, without running the network.

        Options that are not named keep their values. InputError if the method cannot be retuned or an option cannot be
        changed in this way.
        """
        if self._retune is None:
            raise InputError(f"{self.method} has nothing to retune: call explain again")
        result = self._retune(**options)
        details = {name: values.reshape(self.maps.shape[:-2]) for name, values in result.checked().items()}
        return replace(
            self,
            maps=result.maps.reshape(self.maps.shape),
            layer_weights=result.layer_weights.reshape(self.layer_weights.shape),
            options=self.options | options,
            details=details,
            _retune=result.retune,
        )

    def for_image(self, index: int) -> Explanation:
        """Image `index` alone, as if it had been explained alone: its arrays have one row. It can be retuned."""
        if not isinstance(index, int | np.integer) or not -len(self) <= index < len(self):
            raise InputError(f"no image {index}: there are {len(self)}")
        index = int(index) % len(self)
        which, targets = slice(index, index + 1), int(np.prod(self.maps.shape[1:-2]))
        retune = None
        if self._retune is not None:
            retune = retune_of_rows(self._retune, slice(index * targets, (index + 1) * targets))
        return replace(
            self,
            maps=self.maps[which],
            target=None if self.target is None else self.target[which],
            logits=self.logits[which],
            layer_weights=self.layer_weights[which],
            images=self.images.part(which),
            details={name: values[which] for name, values in self.details.items()},
            _retune=retune,
        )

    def _chosen(self, maps: np.ndarray, index: Index) -> tuple[np.ndarray, int]:
        """(the map (H, W), the image's number). InputError for an index that does not name one map."""
        places = index if isinstance(index, tuple) else (index,)
        leading = maps.shape[:-2]
        whole = all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in places)
        inside = whole and all(-n <= i < n for i, n in zip(places, leading, strict=False))
        if not inside or len(places) > len(leading):
            raise InputError(f"no map {index}: there are {list(leading)}")
        if len(places) < len(leading):
            raise InputError(f"{index}: there are {leading[1]} maps of this image, pass (image, target)")
        return maps[index], places[0] % len(maps)

    # ---- pictures

    @functools.cached_property
    def pictures(self) -> list[np.ndarray]:
        """Per image what the network saw, on the maps' grid, uint8 (H, W, 3)."""
        return [self.images.picture(i) for i in range(len(self))]

    @functools.cached_property
    def photos(self) -> list[np.ndarray]:
        """Per image the photo as it was given, upright, uint8 (H, W, 3)."""
        return [self.images.photo(i) for i in range(len(self))]

    def overlay(
        self,
        index: Index,
        opacity: float = 0.5,
        colormap: str = "turbo",
        size: str = "photo",
        by_value: bool = False,
        legend: bool = False,
    ) -> np.ndarray:
        """Image `index` (or image and target) under its map, scaled to [0, 1] by min-max; uint8 (H, W, 3).

        size: "photo", of the photo's own size, where what the network did not see is dark and grey; or "input", what
        the network saw. opacity: of the colours, 0 to 1; by_value: opacity times the map's value. colormap: "turbo",
        "viridis", "inferno" or "jet". legend: adds a strip with the class, its probability, the method, its percentile
        and the colours. InputError, UnknownName for an argument that does not fit.
        """
        chosen, image = self._chosen(self.maps, index)
        scaled = minmax(chosen[None])[0]
        if size not in ("photo", "input"):
            raise InputError(f"size {size!r}: use 'photo' or 'input'")
        if size == "photo":
            scaled = self.images.placement(image).to_photo(scaled)
        picture = self.images.photo(image) if size == "photo" else self.images.picture(image)
        drawn = overlay(picture, scaled, opacity, colormap, by_value)
        return with_legend(drawn, self.caption(index), colormap) if legend else drawn

    def png(self, index: Index, **options: Any) -> bytes:
        """The overlay as the bytes of a PNG file; options as for `overlay`."""
        out = io.BytesIO()
        Image.fromarray(self.overlay(index, **options)).save(out, "PNG", compress_level=PNG_COMPRESSION)
        return out.getvalue()

    def caption(self, index: Index) -> list[str]:
        """Two lines: the target with its probability, and the method with its options."""
        image = index[0] if isinstance(index, tuple) else index
        said = "a seed array"
        if self.target is not None:
            number = int(self.target[index])
            name = self.manifest.classes[number] if self.manifest.classes else f"class {number}"
            said = f"{name}: {self.probabilities[image, number]:.1%}"
        options = ", ".join(f"{k} {v}" for k, v in self.options.items() if k == "percentile")
        return [said, f"{self.method}{', ' if options else ''}{options}"]

    def plot(self, index: Index = 0, **options: Any) -> Any:
        """A matplotlib figure: the photo, its overlay, and the layers' weights. Needs the extra `bench`."""
        from .images.figure import explanation_figure

        return explanation_figure(self, index, options)

    def _repr_html_(self) -> str:
        """What a notebook shows: of up to eight images the photo, the overlay, the classes and the layers' weights."""
        from .images.page import explanation_html

        return explanation_html(self)

    # ---- files

    def to_dict(self, index: int | None = None) -> dict[str, Any]:
        """Everything but the maps, as JSON can hold it: what made it, and per image its hash, size, target, classes and
        layer weights. index: of one image alone.
        """
        if index is not None and not -len(self) <= index < len(self):
            raise InputError(f"no image {index}: there are {len(self)}")
        top = self.top()
        return {
            **self.provenance,
            "method": self.method,
            "options": {name: plain(value) for name, value in self.options.items()},
            "layers": list(self.layers),
            "images": [self._image_dict(i, top[i]) for i in (range(len(self)) if index is None else [index])],
        }

    def _image_dict(self, index: int, top: list[tuple[int, str, float]]) -> dict[str, Any]:
        height, width = self.images.placement(index).photo
        return {
            "pixels_sha256": self.images.digest(index),
            "size": [height, width],
            "target": None if self.target is None else self.target[index].tolist(),
            "top": [
                {"class": c, **({"name": name} if name else {}), "probability": plain(np.float32(p))}
                for c, name, p in top
            ],
            "layer_weights": dict(zip(self.layers, plain(self.layer_weights[index].T), strict=True)),
            "constant_map": plain(np.ptp(self.maps[index], axis=(-2, -1)) == 0),
            "details": {name: plain(values[index]) for name, values in self.details.items()},
        }

    def save(self, path: str | Path) -> None:
        """Writes an .npz file: maps, logits, layer_weights and target, and `record`, the JSON text of `to_dict`."""
        arrays: dict[str, Any] = {"maps": self.maps, "logits": self.logits, "layer_weights": self.layer_weights}
        if self.target is not None:
            arrays["target"] = self.target
        if Path(path).suffix != ".npz":
            raise InputError(f"{path}: name it .npz (a PNG of one map: png(0); a whole folder: camrt explain)")
        np.savez_compressed(path, record=np.array(json.dumps(self.to_dict())), **arrays)


def plain(value: Any) -> Any:
    """A value as JSON holds it; float32 numbers as short as they are true."""
    if isinstance(value, np.ndarray):
        return [plain(v) for v in value] if value.ndim else plain(value[()])
    if isinstance(value, np.floating):
        return float(str(value)) if np.isfinite(value) else None
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, str | int | float | bool) else repr(value)
