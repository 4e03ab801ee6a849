"""Images to compare implementations with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def smooth_images(shape: Sequence[int], count: int = 2, seed: int = 0) -> np.ndarray:
    """Random network inputs with structure at several scales, float32 (count, *shape)."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    images = np.zeros((count, *shape), np.float32)
    for plane in images.reshape(-1, *shape[1:]):
        for cells in (3, 7, 17, 41):
            coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
            plane += np.asarray(coarse.resize((shape[2], shape[1]), Image.Resampling.BICUBIC)) / 2
    return images


def as_pixels(images: np.ndarray) -> np.ndarray:
    """The same for networks that take pixels: whole numbers, 0..255, still float32."""
    return np.clip(np.round(images * 50 + 128), 0, 255).astype(np.float32)


def last_bits(batch: np.ndarray, count: int, units: float = 4) -> Iterator[np.ndarray]:
    """The batch, and count - 1 copies whose numbers differ from it by a few units in the last place.

    units: the standard deviation of the relative difference, in units of 2^-24.
    """
    yield batch
    rng = np.random.default_rng(0)
    for _ in range(count - 1):
        yield (batch * (1 + units * 2.0**-24 * rng.standard_normal(batch.shape))).astype(np.float32)
