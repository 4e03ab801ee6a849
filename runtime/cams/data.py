"""What the programs give a method, for S explanations of one part of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..bundle.manifest import Tap
from ..session.memory import HOST, Memory


@dataclass(frozen=True)
class LayerMaps:
    """What the layer_maps program gives for L layers, side by side in the order of `taps`.

    logits (S, classes); seeds (S, classes), the explained combination of logits; alphas (S, sum K): mean over the grid of the
    gradient; maps (S, sum h w): sum_k alpha_k A_k, not rectified; size (H, W): the network's input. memory: where logits,
    alphas and maps are; on a GPU a seed of zeros is left as it is.
    """

    taps: tuple[Tap, ...]
    logits: np.ndarray
    seeds: np.ndarray
    alphas: Any
    maps: Any
    size: tuple[int, int]
    memory: Memory = HOST

    @property
    def grids(self) -> list[tuple[int, int]]:
        return [t.grid for t in self.taps]

    def map_of_layers(self) -> list[np.ndarray]:
        """(S, h, w) per layer."""
        parts = np.split(self.maps, np.cumsum([h * w for h, w in self.grids])[:-1], axis=1)
        return [p.reshape(-1, *grid) for p, grid in zip(parts, self.grids, strict=True)]

    def select(self, layers: Sequence[str]) -> LayerMaps:
        """The same for some of the layers, in their order here."""
        if len(layers) == len(self.taps):
            return self
        kept = [i for i, t in enumerate(self.taps) if t.name in set(layers)]
        channels, pixels = [t.channels for t in self.taps], [h * w for h, w in self.grids]
        return replace(
            self,
            taps=tuple(self.taps[i] for i in kept),
            alphas=self.memory.columns(self.alphas, _columns(channels, kept)),
            maps=self.memory.columns(self.maps, _columns(pixels, kept)),
        )


def _columns(widths: Sequence[int], kept: Sequence[int]) -> np.ndarray:
    """Of arrays side by side, the columns of those that are kept."""
    ends = np.cumsum([0, *widths])
    return np.concatenate([np.arange(ends[i], ends[i + 1]) for i in kept])


@dataclass(frozen=True)
class Gradients:
    """Whole activations and gradients of L layers: (S, K, h, w) each, in the order of `taps`; else as LayerMaps.

    Several seeds of one image see one activation, repeated without a copy. gradients is empty where none were asked for.
    """

    taps: tuple[Tap, ...]
    logits: np.ndarray
    seeds: np.ndarray
    activations: tuple[np.ndarray, ...]
    gradients: tuple[np.ndarray, ...]
    size: tuple[int, int]

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(activation, gradient) per layer."""
        return zip(self.activations, self.gradients, strict=True)


@dataclass(frozen=True)
class GridMaps:
    """What the full_grad program gives: per grid size, summed maps (S, h, w); else as LayerMaps."""

    taps: tuple[Tap, ...]
    logits: np.ndarray
    seeds: np.ndarray
    maps: tuple[np.ndarray, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class Lane:
    """A place where batches run one after the other: run(masked (n, C, H, W)) -> logits (n, classes), and its buffers,
    masked (N, C, H, W) and on the host gates (N, H, W), N the most that a part holds.
    """

    number: int
    run: Callable[[Any], Any]
    masked: Any
    gates: np.ndarray | None


@dataclass(frozen=True)
class MaskedRuns:
    """One image (C, H, W), its activations (K, h, w) per layer, and the network to run masked images through.

    logits and seeds (S, classes) are on the host, the image and the activations in `memory`. probability: the kind of
    kernels.class_scores that makes logits probabilities. batches(count, work): calls work(part, lane) for parts of 0..count,
    several at a time where the backend has several lanes; a part always goes to the same lane.
    """

    taps: tuple[Tap, ...]
    logits: np.ndarray
    seeds: np.ndarray
    image: Any
    activations: tuple[Any, ...]
    probability: str
    batches: Callable[[int, Callable[[slice, Lane], None]], None]
    memory: Memory = HOST

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[1:]


@dataclass(frozen=True)
class Heads:
    """One image, its activations (K, h, w) per layer, and the rest of the network after each layer.

    heads: changed activations (N, K, h, w) -> logits (N, classes), for any N; batch: how many to make at a time. in_lanes(work,
    parts): what work gives for each part, in their order, several at a time where the backend has several lanes.
    """

    taps: tuple[Tap, ...]
    logits: np.ndarray
    seeds: np.ndarray
    activations: tuple[np.ndarray, ...]
    heads: tuple[Callable[[np.ndarray], np.ndarray], ...]
    probabilities: Callable[[np.ndarray], np.ndarray]
    batch: int
    in_lanes: Callable[[Callable[[slice], np.ndarray], Sequence[slice]], list[np.ndarray]]
    size: tuple[int, int]
