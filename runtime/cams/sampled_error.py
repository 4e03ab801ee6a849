"""How far a sum of weighted maps is from an exact one, of which only some of the weights are known."""

from __future__ import annotations

import numpy as np

SAMPLE = 16  # for each target
DRAWS = 32
LARGE_ERROR = 2e-3  # 1 - cosine, estimated: what is told, so that few maps further off than 1e-2 stay untold
UNIFORM = 0.25  # of the chance to be taken, the part that does not go by size: small terms can be wrong, too


def chances(weights: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """(K,): how probable it is that each term of sum_k weights[s, k] maps[k] is among those that are taken.

    weights (S, K), maps (K, h, w). By size of the term beside the others of its sum, so that a few large ones are not
    missed in any of the S sums; in all SAMPLE for each sum, at most K.
    """
    sizes = np.abs(weights) * np.sqrt(np.square(maps).sum(axis=(1, 2)))
    sums = sizes.sum(axis=1, keepdims=True)
    size = (sizes / np.where(sums > 0, sums, 1)).max(axis=0)
    total, terms, count = size.sum(), len(size), SAMPLE * len(weights)
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
    Where the sample is of all terms, it is no estimate. Else the errors of the weights, after the best common factor,
    are taken for their mean and independent noise about it, as large as in the sample: the mean distance of some maps
    that are drawn so, by numbers that are the same at every call.
    """
    if len(sample) == weights.shape[1]:
        sums = (np.tensordot(w, maps, 1) for w in (weights, exact))
        return np.array([_distance(a, b[None]) for a, b in zip(*sums, strict=True)])
    share, drawn = 1 / chance[sample], np.random.default_rng(0).standard_normal((DRAWS, len(sample)))
    found = np.zeros(len(weights))
    for row, (all_weights, want) in enumerate(zip(weights, exact, strict=True)):
        got = all_weights[sample]
        factor = (share * got * want).sum() / max((share * got * got).sum(), 1e-300)
        error = factor * got - want
        mean = (share * error).sum() / share.sum()
        spread = np.sqrt(share * len(sample) / (len(sample) - 1)) * (error - mean)
        total = np.tensordot(all_weights, maps, 1)
        noise = np.tensordot(drawn * spread, maps[sample], 1)
        found[row] = _distance(total, factor * total - mean * maps.sum(axis=0) - noise)
    return found


def _distance(total: np.ndarray, others: np.ndarray) -> float:
    """The mean of 1 - cosine between minmax(ReLU(total)) (h, w) and that of each of `others` (n, h, w): 0 where both
    are zero everywhere, 1 where one is.
    """
    flat = np.maximum(np.concatenate([total[None], others]), 0).reshape(1 + len(others), -1)
    flat -= flat.min(axis=1, keepdims=True)
    lengths = np.linalg.norm(flat, axis=1)
    unit = flat / np.where(lengths > 0, lengths, 1)[:, None]
    either, both = (lengths[0] > 0) | (lengths[1:] > 0), (lengths[0] > 0) & (lengths[1:] > 0)
    distance = np.square(unit[1:] - unit[0]).sum(axis=1) / 2  # exact where the cosine is near 1
    return float(np.where(both, distance, either).mean())
