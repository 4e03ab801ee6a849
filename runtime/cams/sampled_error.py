"""How far a sum of weighted maps is from an exact one, of which only some of the weights are known."""

from __future__ import annotations

import numpy as np

SAMPLE = 16
LARGE_ERROR = 2e-3  # 1 - cosine, estimated: what is told, so that few maps further off than 1e-2 stay untold
UNIFORM = 0.25  # of the chance to be taken, the part that does not go by size: small terms can be wrong, too


def chances(weights: np.ndarray, maps: np.ndarray, count: int = SAMPLE) -> np.ndarray:
    """(K,): how probable it is that each term of sum_k weights[s, k] maps[k] is among `count` that are taken.

    weights (S, K), maps (K, h, w). By size of the term, so that a few large ones are not missed; in all min(count, K).
    """
    size = np.abs(weights).max(axis=0) * np.sqrt(np.square(maps).sum(axis=(1, 2)))
    total, terms = size.sum(), len(size)
    size = UNIFORM / terms + (1 - UNIFORM) * (size / total if total > 0 else np.full(terms, 1 / terms))
    certain = np.zeros(terms, bool)
    while True:  # what would be more than certain leaves its surplus to the others
        left = max(count - int(certain.sum()), 0)
        chance = np.where(certain, 1.0, left * size / max(size[~certain].sum(), 1e-300))
        above = (chance >= 1) & ~certain
        if not above.any():
            return chance
        certain |= above


def taken(chance: np.ndarray) -> np.ndarray:
    """The numbers of the terms of a sample with these chances: systematic, the same at every call."""
    points = np.arange(round(float(chance.sum()))) + 0.5
    return np.unique(np.minimum(np.searchsorted(np.cumsum(chance), points), len(chance) - 1))


def map_error(
    weights: np.ndarray, maps: np.ndarray, sample: np.ndarray, exact: np.ndarray, chance: np.ndarray
) -> np.ndarray:
    """(S,): an estimate of 1 - cosine between minmax(ReLU(sum_k weights[s, k] maps[k])) and the same of exact weights.

    weights (S, K), maps (K, h, w), sample (n,), exact (S, n): the exact weights of the sample, chance (K,), float64.
    After the best common factor, which a min-max ignores, the errors of the weights are taken for a mean, that moves
    the map along sum_k maps[k], and independent noise about it; only what is at right angles to the map counts.
    """
    share = 1 / chance[sample]
    found = np.zeros(len(weights))
    for row, (all_weights, want) in enumerate(zip(weights, exact, strict=True)):
        got = all_weights[sample]
        if not want.any() and not got.any():
            continue
        factor = (share * got * want).sum() / max((share * got * got).sum(), 1e-300)
        error = factor * got - want
        mean = (share * error).sum() / share.sum()
        noise = share * np.square(error - mean) * len(sample) / max(len(sample) - 1, 1)
        total = factor * np.tensordot(all_weights, maps, 1)
        rectified = np.maximum(total, 0)
        rectified -= rectified.min()
        length = np.square(rectified).sum()
        if length == 0:  # an even map, which any change that shows makes another one
            spread = mean**2 * np.square(maps.sum(axis=0)) + np.tensordot(noise, np.square(maps[sample]), 1)
            found[row] = float((total + 2 * np.sqrt(spread) > 0).any() and error.any())
            continue
        visible, seen = total > 0, maps
        if visible.all():  # the min-max takes the lowest pixel as zero
            seen = maps - maps.reshape(len(maps), -1)[:, rectified.argmin(), None, None]

        def across(shape: np.ndarray, along: np.ndarray = rectified, length: float = length) -> np.ndarray:
            return shape - (shape * along).sum(axis=(-2, -1), keepdims=True) / length * along

        change = mean**2 * np.square(across(seen.sum(axis=0))) + np.tensordot(noise, np.square(across(seen[sample])), 1)
        found[row] = min(change[visible].sum() / length / 2, 1.0)
    return found
