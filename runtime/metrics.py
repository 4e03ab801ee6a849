"""Numbers that say how good a map is: faithfulness to the network, and agreement with a mask of the object.

Scores are probabilities of the explained class. Maps (H, W) must be scaled to [0, 1] by the caller. If a definition
leaves a choice open, the docstring names our choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .. import install
from .errors import CamrtError

Score = Callable[[np.ndarray], np.ndarray]  # network inputs (N, C, H, W) -> probabilities of the explained class (N,)

PERCENTILES = (20, 40, 60, 80)  # per cent of the pixels, which ROAD removes


# ---- faithfulness


def masked(image: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    """The network's input (C, H, W) multiplied by a map (H, W): float32. Pixels where the map is 0 become 0."""
    return (image * scaled).astype(np.float32)


def average_drop(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """100 max(0, Y - O) / Y per image, in percent: Y the probability of the image, O that of the image times its map.

    before: Y (B,), after: O (B,) -> (B,). Lower is better. Chattopadhyay et al., arXiv 1710.11063.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    return 100 * np.maximum(before - after, 0) / np.maximum(before, np.finfo(np.float64).tiny)


def increase_in_confidence(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """100 if O > Y, else 0, per image, so that the mean is a percentage of images; O and Y as in average_drop.

    before: Y (B,), after: O (B,) -> (B,). Higher is better. arXiv 1710.11063.
    """
    return 100.0 * (np.asarray(after) > np.asarray(before))


TIE = 0.01  # percentage points of average drop: what rounding alone changes


def win_percentage(drops: np.ndarray, tie: float = TIE) -> np.ndarray:
    """Per image, 100 for the method with the lowest average drop, else 0; methods that tie share the 100.

    drops (B, methods), from average_drop -> (B, methods); each row sums to 100. Higher is better. tie: drops that
    differ by no more are equal: two methods that are the same by mathematics differ by rounding. arXiv 1710.11063 has
    it for two methods.
    """
    best = drops <= drops.min(axis=1, keepdims=True) + tie
    return 100 * best / best.sum(axis=1, keepdims=True)


def area(scaled: np.ndarray) -> float:
    """The mean of a map (H, W) in [0, 1]: how much of the image it keeps. A map of ones hides nothing, and its average
    drop is 0.
    """
    return float(scaled.mean(dtype=np.float64))


def equalised(scaled: np.ndarray) -> np.ndarray:
    """The map with its values replaced by their ranks, 0 for the lowest to 1 for the highest, equal values by the mean
    of their ranks: (H, W) float32 whose mean is 1/2, whatever the map. An average drop of it compares where maps look,
    not how much of the image they keep.
    """
    _, places, counts = np.unique(scaled.ravel(), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts + 1) / 2)[places.ravel()]
    return (ranks / max(1, scaled.size - 1)).reshape(scaled.shape).astype(np.float32)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation of two maps (H, W), -1 to 1; 0 if one is constant."""
    a, b = (np.asarray(m, np.float64) - np.mean(m, dtype=np.float64) for m in (one, other))
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / size) if size > 0 else 0.0


def max_sensitivity(
    scaled: np.ndarray,
    batch: np.ndarray,
    explained: Callable[[np.ndarray], np.ndarray],
    draws: int = 4,
    radius: float = 0.02,
    seed: int = 0,
) -> float:
    """The largest relative change of a map, |M(x + noise) - M(x)| / |M(x)| in L2, over draws of noise. Lower is better.

    scaled (H, W): M(x); batch (1, C, H, W): x; explained: an input like it -> its map (H, W). The noise is uniform,
    within `radius` of the input's standard deviation. Yeh et al., arXiv 1901.09392, whose radius is the user's choice.
    """
    rng = np.random.default_rng(seed)
    reach = radius * float(batch.std())
    size = float(np.linalg.norm(scaled)) or 1.0
    changes = []
    for _ in range(draws):
        noisy = (batch + rng.uniform(-reach, reach, batch.shape)).astype(np.float32)
        changes.append(float(np.linalg.norm(explained(noisy) - scaled)) / size)
    return max(changes)


def _ranks(scaled: np.ndarray) -> np.ndarray:
    """Rank of each pixel (H, W), 0 for the most relevant; equal pixels rank from left to right, top to bottom."""
    order = np.argsort(-scaled.ravel(), kind="stable")
    ranks = np.empty(order.size, np.int64)
    ranks[order] = np.arange(order.size)
    return ranks.reshape(scaled.shape)


def exchanged(image: np.ndarray, other: np.ndarray, scaled: np.ndarray, steps: int) -> np.ndarray:
    """Copies of `image` in which more and more pixels, the most relevant first, are replaced by those of `other`.

    image, other (C, H, W), scaled (H, W) -> (steps + 1, C, H, W) float32, from none replaced to all.
    """
    ranks = _ranks(scaled)
    counts = np.round(np.linspace(0, scaled.size, steps + 1))
    taken = ranks[None] < counts[:, None, None]
    return np.where(taken[:, None], other, image).astype(np.float32)


def area_under(curve: np.ndarray) -> float:
    """Trapezoid rule over equal steps from 0 to 1."""
    return float((curve[:-1] + curve[1:]).mean() / 2)


def deletion(image: np.ndarray, scaled: np.ndarray, score: Score, steps: int = 32) -> float:
    """Area, 0..1, under the probability while pixels of the network's input become 0, the most relevant first.

    0 is the mean colour if the recipe subtracts it. Lower is better. Petsiuk et al., RISE, arXiv 1806.07421.
    """
    return area_under(score(exchanged(image, np.zeros_like(image), scaled, steps)))


def insertion(image: np.ndarray, scaled: np.ndarray, score: Score, steps: int = 32) -> float:
    """Area, 0..1, under the probability while a blurred image gets its pixels back, the most relevant first.

    The blur is RISE's: a Gaussian of sigma 5 over 11 x 11 pixels; at the border our blur repeats the nearest pixel,
    RISE's uses black. Higher is better. arXiv 1806.07421. CamrtError without scipy.
    """
    return area_under(score(exchanged(blurred(image), image, scaled, steps)))


def blurred(image: np.ndarray) -> np.ndarray:
    """Each channel of (C, H, W), blurred by a Gaussian of sigma 5 over 11 x 11 pixels. CamrtError without scipy."""
    ndimage = _scipy("ndimage")
    return np.stack([ndimage.gaussian_filter(c, sigma=5, radius=5, mode="nearest") for c in image]).astype(np.float32)


def road(
    image: np.ndarray,
    scaled: np.ndarray,
    score: Score,
    percentiles: Sequence[float] = PERCENTILES,
    noise: float = 0.01,
    seed: int = 0,
) -> float:
    """Mean over percentiles of (probability without the least relevant pixels - without the most relevant) / 2.

    image (C, H, W), scaled (H, W). Removed pixels are imputed from their neighbours (`impute`), plus Gaussian noise of
    standard deviation `noise`. Higher is better. Rong et al., arXiv 2202.00449; the two curves are combined as in
    pytorch-grad-cam. CamrtError without scipy; ValueError if a percentile removes every pixel.
    """
    ranks, rng = _ranks(scaled), np.random.default_rng(seed)
    batch = []
    for percentile in percentiles:
        count = round(scaled.size * percentile / 100)
        for removed in (ranks >= scaled.size - count, ranks < count):  # the least, the most relevant
            batch.append(impute(image, removed, noise, rng))
    scores = np.asarray(score(np.stack(batch)), np.float64).reshape(-1, 2)
    return float((scores[:, 0] - scores[:, 1]).mean() / 2)


def impute(image: np.ndarray, removed: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Noisy linear imputation: each removed pixel is a weighted mean of its eight neighbours, plus noise.

    Direct neighbours have the weight 1/6, diagonal ones 1/12; at the border, where some are missing, the weights are
    rescaled to sum to 1. Removed neighbours are unknowns of the same sparse linear system. image (C, H, W), removed
    (H, W) bool -> (C, H, W) float32. arXiv 2202.00449, section 4. ValueError if every pixel is removed.
    """
    height, width = removed.shape
    if not removed.any():
        return image.astype(np.float32)
    sparse, linalg = _scipy("sparse"), _scipy("sparse.linalg")
    rows, columns = np.nonzero(removed)
    number = np.full(removed.shape, -1)
    number[rows, columns] = np.arange(len(rows))
    right = np.zeros((len(rows), len(image)))
    weight_sum = np.zeros(len(rows))
    entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            if dy == dx == 0:
                continue
            weight = 1 / 6 if dy == 0 or dx == 0 else 1 / 12
            y, x = rows + dy, columns + dx
            inside = np.flatnonzero((y >= 0) & (y < height) & (x >= 0) & (x < width))
            y, x = y[inside], x[inside]
            weight_sum[inside] += weight
            unknown = removed[y, x]
            right[inside[~unknown]] += weight * image[:, y[~unknown], x[~unknown]].T
            entries.append((inside[unknown], number[y[unknown], x[unknown]], np.full(unknown.sum(), -weight)))
    entries.append((np.arange(len(rows)), np.arange(len(rows)), weight_sum))
    i, j, values = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    if removed.all():
        raise ValueError("every pixel was removed: there is nothing to impute from")
    matrix = sparse.csc_matrix((values, (i, j)), shape=(len(rows), len(rows)))
    solved = linalg.splu(matrix, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}).solve(right)
    filled = image.astype(np.float32).copy()
    filled[:, rows, columns] = (solved + noise * rng.standard_normal(solved.shape)).T
    return filled


def _scipy(module: str):
    try:
        import importlib

        return importlib.import_module(f"scipy.{module}")
    except ImportError as error:
        raise CamrtError(install.repair("insertion, like road,", "scipy", "evaluate", error)) from None


# ---- agreement with a mask: object (H, W) bool, the object's pixels; valid (H, W) bool, the pixels that count


def otsu(values: np.ndarray) -> float:
    """Otsu's threshold of values in [0, 1]: it maximises the variance between the values above it and those below.

    The values are rounded to 256 levels, round(255 x). Values above the threshold are foreground. Otsu, IEEE TSMC 1979.
    """
    levels = np.round(np.clip(values, 0, 1) * 255).astype(np.int64)
    counts = np.bincount(levels.ravel(), minlength=256).astype(np.float64)
    below = np.cumsum(counts)
    first = np.cumsum(counts * np.arange(256))
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = first / below - (first[-1] - first) / above
    between = np.where((below > 0) & (above > 0), below * above * gap**2, 0)
    return (int(between.argmax()) + 0.5) / 255


def iou(scaled: np.ndarray, object: np.ndarray, valid: np.ndarray, threshold: float | None = None) -> float:
    """Intersection over union of the object and of the map above a threshold, by default Otsu's. Higher is better."""
    front = scaled > (otsu(scaled[valid]) if threshold is None else threshold)
    joint, union = (front & object & valid).sum(), ((front | object) & valid).sum()
    return float(joint / union) if union else 0.0


def centre_distance(scaled: np.ndarray, object: np.ndarray, valid: np.ndarray) -> float:
    """Distance between the map's and the object's centres of mass, divided by the picture's diagonal; 0..1.

    Lower is better. A map of zeros has its centre in the middle.
    """
    weights = np.where(valid, scaled, 0).astype(np.float64)
    centres = [
        _centre(weights if weights.any() else np.ones_like(weights)),
        _centre((object & valid).astype(np.float64)),
    ]
    return float(np.hypot(*(centres[0] - centres[1])) / math.hypot(*scaled.shape))


def _centre(weights: np.ndarray) -> np.ndarray:
    rows, columns = weights.sum(axis=1), weights.sum(axis=0)
    total = weights.sum()
    return np.array([(rows * np.arange(len(rows))).sum(), (columns * np.arange(len(columns))).sum()]) / total


def energy(scaled: np.ndarray, object: np.ndarray, valid: np.ndarray) -> float:
    """Energy-based pointing game: the fraction of the map's sum that lies on the object; 0 for a map of zeros.

    Higher is better. Wang et al., Score-CAM, arXiv 1910.01279.
    """
    total = scaled[valid].sum(dtype=np.float64)
    return float(scaled[object & valid].sum(dtype=np.float64) / total) if total > 0 else 0.0


def pointing(scaled: np.ndarray, object: np.ndarray, valid: np.ndarray) -> float:
    """Pointing game: 1 if the map's maximum (the first, in a tie) lies on the object, else 0, without a margin.

    Higher is better; a constant map points nowhere and gets 0. Zhang et al., arXiv 1608.00507.
    """
    seen = np.where(valid, scaled, -np.inf)
    return float((object & valid).ravel()[seen.argmax()]) if np.ptp(scaled[valid]) > 0 else 0.0
