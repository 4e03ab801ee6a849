"""Divides images and targets into batches, and checks every batch's outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import NotFinite

NOT_FINITE = "the network gave NaN or infinity: check its weights and the images' preprocessing"


@dataclass(frozen=True)
class Batch:
    """S explanations that run together: S images with a seed each, or one image with S seeds.

    first: the number of the first image. images: (S or 1, C, H, W), on the GPU if the backend has one; seeds
    (S, classes), on the host. repeats: how many explanations at its start belong to the batch before too.
    """

    first: int
    images: Any
    seeds: np.ndarray
    repeats: int = 0


def batches(images: Any, seeds: np.ndarray, by_image: bool, largest: int, equal: bool = False) -> Iterator[Batch]:
    """Divides B images with seeds (B, K, classes) into batches, image after image.

    by_image: one batch per image, with all of its seeds; else a batch has at most `largest` images or seeds. equal: of
    several batches, the last one has the size of the others, and explains some images again: a GPU's engine or graph
    for another size would cost more.
    """
    if by_image:
        for index, rows in enumerate(seeds):
            yield Batch(index, images[index : index + 1], rows)
    elif seeds.shape[1] == 1:
        for start, repeats, part in _divided(len(images), largest, equal):
            yield Batch(start, images[part], seeds[part, 0], repeats)
    else:
        for index, rows in enumerate(seeds):
            for _, repeats, part in _divided(len(rows), largest, equal):
                yield Batch(index, images[index : index + 1], rows[part], repeats)


def _divided(count: int, largest: int, equal: bool) -> Iterator[tuple[int, int, slice]]:
    """(the first row, how many rows before it the part has, the part)."""
    for start in range(0, count, largest):
        stop = min(start + largest, count)
        repeats = largest - (stop - start) if equal and start else 0
        yield start, repeats, slice(start - repeats, stop)


def chunks(array: Any, size: int) -> Iterator[tuple[int, Any]]:
    """Divides an array into parts of at most `size` rows: (number of the first row, part)."""
    for start in range(0, len(array), size):
        yield start, array[start : start + size]


def repeated(array: np.ndarray, rows: int) -> np.ndarray:
    """An array (1, ...) as (rows, ...), without a copy; an array of more rows as it is."""
    return np.broadcast_to(array, (rows, *array.shape[1:])) if len(array) == 1 else array


def scores_of(out: Mapping[str, np.ndarray], batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(logits, seeds) (S, classes) of a batch, from a program's outputs on the host; a seed of zeros becomes the
    one-hot seed of the top class.
    """
    logits = repeated(out["logits"][: len(batch.seeds)], len(batch.seeds))
    return logits, top_class_where_zero(batch.seeds, logits)


def top_class_where_zero(seeds: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Seeds (S, classes), rows of zeros replaced by the one-hot row of the top class of logits (S, classes)."""
    rows = np.flatnonzero(~seeds.any(axis=1))
    if not len(rows):
        return seeds
    seeds = seeds.copy()
    seeds[rows, logits[rows].argmax(axis=1)] = 1
    return seeds


def check_finite(*arrays: np.ndarray) -> None:
    """NotFinite if an array holds NaN or infinity."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise NotFinite(NOT_FINITE)
