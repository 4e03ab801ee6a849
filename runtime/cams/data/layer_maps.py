"""What the layer_maps program gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.kinds import Kind
from ...bundle.manifest import UNMEASURED, Noise, Tap
from ...session.batches import check_finite, scores_of
from ...session.memory import HOST, Memory
from .base import MethodData, columns

if TYPE_CHECKING:
    from ...session.batches import Batch
    from ...session.session import Session


GRADIENT_AGGREGATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda g: g.mean(axis=(2, 3)),
    "max": lambda g: g.max(axis=(2, 3)),
    "min": lambda g: g.min(axis=(2, 3)),
    "absmean": lambda g: np.abs(g).mean(axis=(2, 3)),
    "absmax": lambda g: np.abs(g).max(axis=(2, 3)),
    "sum": lambda g: g.sum(axis=(2, 3)),
    "l2": lambda g: np.sqrt((g * g).sum(axis=(2, 3))),
}


@dataclass(frozen=True)
class NoiseOfLayers:
    """`Noise` of L layers, an array (L,) of each of its numbers."""

    mean: np.ndarray
    extreme: np.ndarray
    zero: np.ndarray

    @classmethod
    def of(cls, taps: Sequence[Tap], precision: str, aggregation: str) -> NoiseOfLayers:
        noise = [noise_of(t, precision, aggregation) for t in taps]
        return cls(*(np.array([getattr(n, name) for n in noise]) for name in ("mean", "extreme", "zero")))

    @property
    def alone(self) -> np.ndarray:
        """Whether every alpha of a layer is rounding noise, (L,)."""
        return self.zero >= 2

    def part(self, indices: Sequence[int]) -> NoiseOfLayers:
        which = list(indices)
        return NoiseOfLayers(self.mean[which], self.extreme[which], self.zero[which])


@dataclass(frozen=True)
class LayerMaps(MethodData):
    """The outputs of the layer_maps program for L layers, concatenated in the order of `taps`.

    logits (S, classes). seeds (S, classes): the cotangent of the logits. alphas (S, sum K): mean of the gradient over
    the grid. maps (S, sum h w): sum_k alpha_k A_k, not rectified. size (H, W): of the network's input. memory: where
    logits, alphas and maps are. On the host, a seed of zeros (the top class) is replaced by the one-hot seed; on a GPU
    it is not. noise: of each layer's alphas. Where it says that a layer's alphas are rounding noise, they and the map
    are zero on the host.
    """

    kinds = (Kind.LAYER_MAPS,)
    on_gpu = True
    captured = True

    taps: tuple[Tap, ...]
    logits: np.ndarray
    seeds: np.ndarray
    alphas: Any
    maps: Any
    size: tuple[int, int]
    noise: NoiseOfLayers
    memory: Memory = HOST

    @property
    def grids(self) -> list[tuple[int, int]]:
        return [t.grid for t in self.taps]

    def map_of_layers(self) -> list[np.ndarray]:
        """(S, h, w) per layer."""
        parts = np.split(self.maps, np.cumsum([h * w for h, w in self.grids])[:-1], axis=1)
        return [p.reshape(-1, *grid) for p, grid in zip(parts, self.grids, strict=True)]

    def rows(self, which: slice) -> LayerMaps:
        """The same data of some of the S explanations."""
        parts = (array[which] for array in (self.logits, self.seeds, self.alphas, self.maps))
        return replace(self, **dict(zip(("logits", "seeds", "alphas", "maps"), parts, strict=True)))

    def select(self, layers: Sequence[str]) -> LayerMaps:
        """The same data of the named layers only, in the order of `taps`."""
        if len(layers) == len(self.taps):
            return self
        wanted = set(layers)
        indices = tuple(i for i, t in enumerate(self.taps) if t.name in wanted)
        channels, pixels = tuple(t.channels for t in self.taps), tuple(h * w for h, w in self.grids)
        return replace(
            self,
            taps=tuple(self.taps[i] for i in indices),
            alphas=self.memory.columns(self.alphas, columns(channels, indices)),
            maps=self.memory.columns(self.maps, columns(pixels, indices)),
            noise=self.noise.part(indices),
        )

    @classmethod
    def read(
        cls, session: Session, batch: Batch, layers: Sequence[str], options: Mapping[str, Any], on_gpu: bool = False
    ) -> LayerMaps:
        """Runs the layer_maps program; for another gradient_aggregation than "mean", and where the backward pass is
        much shorter for these layers alone, the gradients program.

        On a GPU the result has all of the program's layers; on the host only `layers`. CamrtError for NaN or infinity
        on the host.
        """
        aggregation = str(options.get("gradient_aggregation", "mean"))
        kind = Kind.LAYER_MAPS if aggregation == "mean" and not session.spares(layers) else Kind.GRADIENTS
        program = session.program(kind, layers)
        out = session.run(program, batch, session.manifest.seeds_share_image, on_gpu)
        names = program.taps if kind == Kind.LAYER_MAPS else layers
        taps = session.taps(names)
        key = ("noise", program.precision, aggregation, *names)
        noise = session.once(key, lambda: NoiseOfLayers.of(taps, program.precision, aggregation))
        if on_gpu:
            seeds, memory = batch.seeds, session.memory
            return cls(taps, out["logits"], seeds, out["alphas"], out["maps"], session.size, noise, memory)
        if kind == Kind.LAYER_MAPS:
            alphas, maps = out["alphas"], out["maps"]
        else:
            weighed = [_weigh(out, t.name, aggregation) for t in taps]
            alphas, maps = (np.concatenate(parts, axis=1) for parts in zip(*weighed, strict=True))
        check_finite(alphas, maps)
        alone = noise.alone
        if alone.any():
            alphas = np.where(np.repeat(alone, [t.channels for t in taps]), np.float32(0), alphas)
            maps = np.where(np.repeat(alone, [h * w for h, w in (t.grid for t in taps)]), np.float32(0), maps)
        return cls(taps, *scores_of(out, batch), alphas, maps, session.size, noise).select(layers)

    @classmethod
    def stays_on_gpu(cls, options: Mapping[str, Any]) -> bool:
        return options.get("gradient_aggregation", "mean") == "mean"


def noise_of(tap: Tap, precision: str, aggregation: str) -> Noise:
    """Of the alphas under a gradient_aggregation: what was measured of means says nothing of maxima and magnitudes."""
    if aggregation not in ("mean", "sum"):
        return Noise(0.0, 0.0, 0.0)
    return tap.noise.get(precision, UNMEASURED)


def _weigh(out: Mapping[str, np.ndarray], name: str, aggregation: str) -> tuple[np.ndarray, np.ndarray]:
    """alpha (S, K) = aggregate over the grid of the gradient, and sum_k alpha_k A_k (S, h w)."""
    gradient, activation = out[f"gradient:{name}"], out[f"activation:{name}"]
    alpha = GRADIENT_AGGREGATIONS[aggregation](gradient)
    flat = activation.reshape(*activation.shape[:2], -1)
    return alpha, (alpha[:, None] @ flat)[:, 0]
