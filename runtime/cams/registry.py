"""The table of CAM methods and the data that they are given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UnknownMethod, near
from ..manifest import Tap


@dataclass(frozen=True)
class LayerMaps:
    """What the layer_maps program gives, for S explanations of L layers, side by side in the order of `taps`.

    alphas (S, sum K): mean over the grid of the gradient; maps (S, sum h w): sum_k alpha_k A_k, not rectified;
    size (H, W): the network's input.
    """

    taps: tuple[Tap, ...]
    alphas: np.ndarray
    maps: np.ndarray
    size: tuple[int, int]

    @property
    def grids(self) -> list[tuple[int, int]]:
        return [t.grid for t in self.taps]

    def alpha_of_layers(self) -> list[np.ndarray]:
        """(S, K) per layer."""
        return np.split(self.alphas, np.cumsum([t.channels for t in self.taps])[:-1], axis=1)

    def map_of_layers(self) -> list[np.ndarray]:
        """(S, h, w) per layer."""
        parts = np.split(self.maps, np.cumsum([h * w for h, w in self.grids])[:-1], axis=1)
        return [p.reshape(-1, *grid) for p, grid in zip(parts, self.grids, strict=True)]

    def select(self, layers: Sequence[str]) -> LayerMaps:
        """The same for some of the layers, in their order here."""
        if len(layers) == len(self.taps):
            return self
        kept = [i for i, t in enumerate(self.taps) if t.name in set(layers)]
        alphas, maps = self.alpha_of_layers(), self.map_of_layers()
        return LayerMaps(
            tuple(self.taps[i] for i in kept),
            np.concatenate([alphas[i] for i in kept], axis=1),
            np.concatenate([maps[i].reshape(len(self.maps), -1) for i in kept], axis=1),
            self.size,
        )


@dataclass(frozen=True)
class Result:
    """maps (S, H, W) float32; layer_weights (S, L) float32; retune: new options -> Result, without the network."""

    maps: np.ndarray
    layer_weights: np.ndarray
    retune: Callable[..., Result] | None = None


@dataclass(frozen=True)
class Method:
    """A registered method: the program kind it reads, the role of its default layers, and its function."""

    name: str
    needs: str
    layers: str
    function: Callable[..., Result]

    def check_options(self, options: dict[str, object]) -> None:
        """UnknownMethod names an option that the method does not have."""
        known = list(inspect.signature(self.function).parameters)[1:]
        for option in options:
            if option not in known:
                raise UnknownMethod(f"{self.name} has no option {option!r}: it has {', '.join(known) or 'none'}")


METHODS: dict[str, Method] = {}


def cam(name: str, needs: str, layers: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Registers a method under `name`; ValueError if the name is taken."""

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        if name in METHODS:
            raise ValueError(f"a method {name!r} is registered already")
        METHODS[name] = Method(name, needs, layers, function)
        return function

    return register


def method_named(name: str) -> Method:
    """UnknownMethod, with near misses, if there is none."""
    if name not in METHODS:
        raise UnknownMethod(f"no method {name!r}{near(str(name), list(METHODS))}")
    return METHODS[name]
