"""Batches of explanations: how images and targets are cut, and what every batch's outputs are checked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import CamrtError

NOT_FINITE = "the network gave NaN or infinity: check its weights and the images' preprocessing"


@dataclass(frozen=True)
class Batch:
    """S explanations that run together: S images with a seed each, or one image with S seeds. `first`: the first
    image's number.

    The images are where the backend runs, the seeds on the host.
    """

    first: int
    images: Any
    seeds: np.ndarray


def batches(images: Any, seeds: np.ndarray, by_image: bool, largest: int) -> Iterator[Batch]:
    """B images with seeds (B, K, classes), image-major. by_image: an image with all of its seeds is one batch."""
    if by_image:
        for index, rows in enumerate(seeds):
            yield Batch(index, images[index : index + 1], rows)
    elif seeds.shape[1] == 1:
        for start, some in chunks(images, largest):
            yield Batch(start, some, seeds[start : start + len(some), 0])
    else:
        for index, rows in enumerate(seeds):
            for _, some in chunks(rows, largest):
                yield Batch(index, images[index : index + 1], some)


def chunks(array: Any, size: int) -> Iterator[tuple[int, Any]]:
    """Where each starts, and at most `size` rows from there on."""
    for start in range(0, len(array), size):
        yield start, array[start : start + size]


def repeated(array: np.ndarray, rows: int) -> np.ndarray:
    """One image's array seen as that of every row; several are left as they are."""
    return np.broadcast_to(array, (rows, *array.shape[1:])) if len(array) == 1 else array


def scores_of(out: Mapping[str, np.ndarray], batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Logits and seeds (S, classes) of a program's outputs on the host; a row of zeros becomes the one-hot row of the
    top class.
    """
    logits = repeated(out["logits"][: len(batch.seeds)], len(batch.seeds))
    return logits, top_class_where_zero(batch.seeds, logits)


def top_class_where_zero(seeds: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Seeds (S, classes), rows of zeros replaced by the one-hot row of the top class of logits (S, classes)."""
    seeds = seeds.copy()
    rows = np.flatnonzero(~seeds.any(axis=1))
    seeds[rows, logits[rows].argmax(axis=1)] = 1
    return seeds


def check_finite(*arrays: np.ndarray) -> None:
    """CamrtError if one holds NaN or infinity."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise CamrtError(NOT_FINITE)
