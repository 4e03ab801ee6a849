"""Runs programs over batches of images and targets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from .backends import Backend, Executable
from .bundle import Bundle
from .cams import LayerMaps
from .errors import CamrtError
from .manifest import Program

GRADIENT_AGGREGATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda g: g.mean(axis=(2, 3)),
    "max": lambda g: g.max(axis=(2, 3)),
    "min": lambda g: g.min(axis=(2, 3)),
    "absmean": lambda g: np.abs(g).mean(axis=(2, 3)),
    "absmax": lambda g: np.abs(g).max(axis=(2, 3)),
    "sum": lambda g: g.sum(axis=(2, 3)),
    "l2": lambda g: np.sqrt((g * g).sum(axis=(2, 3))),
}


class Runs:
    """The programs of one bundle, opened when they are first needed. May be used from several threads."""

    def __init__(self, bundle: Bundle, backend: Backend, max_batch: int):
        self.bundle = bundle
        self.backend = backend
        self.max_batch = 1 if bundle.manifest.batch == 1 else max_batch
        self._opened: dict[str, Executable] = {}
        self._lock = threading.Lock()

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """(B, C, H, W) -> (B, classes)."""
        program = self._open(self.bundle.program("classify"))
        return np.concatenate([program.run({"image": part})["logits"] for _, part in _chunks(batch, self.max_batch)])

    def layer_maps(
        self, batch: np.ndarray, seeds: np.ndarray, names: Sequence[str], gradient_aggregation: str = "mean"
    ) -> tuple[np.ndarray, LayerMaps]:
        """Logits (B, classes) and the maps of B x K explanations, image-major; seeds (B, K, classes).

        The layers are those of `names`, in the bundle's order. An aggregation other than the mean takes whole gradients
        out of the network. CamrtError if the network gives NaN or infinity.
        """
        mean = gradient_aggregation == "mean"
        program = self.bundle.program("layer_maps" if mean else "gradients", names)
        logits = np.empty((len(batch), self.bundle.manifest.num_classes), np.float32)
        alphas, maps = [], []
        for start, count, out in self._run(program, batch, seeds):
            logits[start : start + count] = out["logits"][:count]
            if mean:
                alphas.append(out["alphas"])
                maps.append(out["maps"])
            else:
                weighed = [_weigh(out, name, gradient_aggregation) for name in program.taps]
                alphas.append(np.concatenate([a for a, _ in weighed], axis=1))
                maps.append(np.concatenate([m for _, m in weighed], axis=1))
        taps = tuple(self.bundle.manifest.tap(name) for name in program.taps)
        joined = LayerMaps(taps, np.concatenate(alphas), np.concatenate(maps), self.bundle.manifest.input_shape[1:])
        if not all(np.isfinite(a).all() for a in (logits, joined.alphas, joined.maps)):
            raise CamrtError("the network gave NaN or infinity: check its weights and the images' preprocessing")
        return logits, joined.select(names)

    def _run(
        self, program: Program, batch: np.ndarray, seeds: np.ndarray
    ) -> Iterator[tuple[int, int, Mapping[str, np.ndarray]]]:
        """Per run: the first image it covers, how many, and its outputs.

        Many images with one seed each, or one image with all of its seeds.
        """
        executable = self._open(program)
        if seeds.shape[1] == 1:
            for start, images in _chunks(batch, self.max_batch):
                rows = seeds[start : start + len(images), 0]
                yield start, len(images), executable.run({"image": images, "seed": rows})
            return
        for index, (image, rows) in enumerate(zip(batch, seeds, strict=True)):
            for _, part in _chunks(rows, self.max_batch):
                images = image[None]
                if not self.bundle.manifest.seeds_share_image:
                    images = np.repeat(images, len(part), axis=0)
                yield index, 1, executable.run({"image": images, "seed": part})

    def _open(self, program: Program) -> Executable:
        with self._lock:
            if program.file not in self._opened:
                self._opened[program.file] = self.backend.open(self.bundle.path / program.file)
            return self._opened[program.file]


def _weigh(out: Mapping[str, np.ndarray], name: str, aggregation: str) -> tuple[np.ndarray, np.ndarray]:
    """alpha (S, K) = aggregate over the grid of the gradient, and sum_k alpha_k A_k (S, h w)."""
    gradient, activation = out[f"gradient:{name}"], out[f"activation:{name}"]
    alpha = GRADIENT_AGGREGATIONS[aggregation](gradient)
    flat = activation.reshape(*activation.shape[:2], -1)
    return alpha, (alpha[:, None] @ flat)[:, 0]


def _chunks(array: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(array), size):
        yield start, array[start : start + size]
