"""What `explain` returns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..kernels import minmax
from .cams import Result
from .errors import InputError
from .images.overlay import overlay


@dataclass(frozen=True)
class Explanation:
    """Maps of a batch of B images, or of K targets for each.

    maps (B, H, W) or (B, K, H, W) float32, scaled as the method defines it; target (B,) or (B, K) int64, None for a
    seed array; logits (B, classes) float32; layers: names; layer_weights (B, L) or (B, K, L) float32; options: the
    method's; details: what the method reports beside its maps, name -> (B,) or (B, K).
    """

    method: str
    maps: np.ndarray
    target: np.ndarray | None
    logits: np.ndarray
    layers: tuple[str, ...]
    layer_weights: np.ndarray
    options: dict[str, Any]
    _draw: Callable[[], list[np.ndarray]] = field(repr=False)
    details: dict[str, np.ndarray] = field(default_factory=dict)
    _retune: Callable[..., Result] | None = field(default=None, repr=False)

    @functools.cached_property
    def pictures(self) -> list[np.ndarray]:
        """The picture under each image's map, uint8 (H, W, 3): resized and cropped, not normalised."""
        return self._draw()

    def retune(self, **options: Any) -> Explanation:
        """The same explanation with other options of its method, without running the network.

        Options that are not named keep their values. InputError if the method cannot be retuned or an option cannot be
        changed; InputError or UnknownMethod for a value that does not fit.
        """
        if self._retune is None:
            raise InputError(f"{self.method} has nothing to retune: call explain again")
        result = self._retune(**options)
        if result.check is not None:
            result.check(result)
        return replace(
            self,
            maps=result.maps.reshape(self.maps.shape),
            layer_weights=result.layer_weights.reshape(self.layer_weights.shape),
            options=self.options | options,
            _retune=result.retune,
        )

    def normalized(self) -> np.ndarray:
        """Each map min-max scaled to [0, 1], in the shape of `maps`; a constant map becomes zeros."""
        return minmax(self.maps)

    def overlay(self, index: int | tuple[int, int], opacity: float = 0.5) -> np.ndarray:
        """The picture of image `index` with its map drawn over it, uint8 (H, W, 3).

        index: the image, or (image, target) if there are several targets; opacity: of the map, 0..1. InputError if one
        image has several maps and no target is named.
        """
        scaled = self.normalized()[index]
        if scaled.ndim != 2:
            raise InputError(f"overlay({index}): there are {scaled.shape[0]} maps of this image, pass (image, target)")
        return overlay(self.pictures[index[0] if isinstance(index, tuple) else index], scaled, opacity)

    def __len__(self) -> int:
        return len(self.maps)
