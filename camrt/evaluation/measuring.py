"""The metrics of one map."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..method_choice import MethodChoice
from ..runtime import metrics
from ..runtime.explainer import Explainer
from .masks import Mask
from .metric_table import LOCALISATION

NOISE_DRAWS = 4


@dataclass(frozen=True)
class Question:
    """What is asked of a map. batch (1, C, H, W): the network's input; target: a class, None for the top class;
    layers: as for `explain`; mask: of the object; steps: of insertion and deletion; threshold: of the metric "iou";
    other: an explainer of the same network with other weights.
    """

    batch: np.ndarray
    target: int | None = None
    layers: Any = None
    mask: Mask | None = None
    steps: int = 32
    threshold: float = 0.5
    other: Explainer | None = None


def measure(explainer: Explainer, method: MethodChoice, names: Sequence[str], asked: Question) -> dict[str, Any]:
    """The metrics `names` of one image's map, with its class and that class's probability; in int8, map_error."""
    started = time.perf_counter()
    result = explainer.explain(asked.batch, method.name, asked.target, asked.layers, **method.options)
    seconds = time.perf_counter() - started
    assert result.target is not None
    target, image, scaled = int(result.target[0]), explainer.normalized(asked.batch)[0], result.normalized()[0]

    def score(inputs: np.ndarray) -> np.ndarray:
        return explainer.normalized_probabilities(inputs)[:, target]

    def explained(by: Explainer, batch: np.ndarray, of: int) -> np.ndarray:
        return by.explain(batch, method.name, of, asked.layers, **method.options).normalized()[0]

    @functools.cache
    def insertion() -> float:
        return metrics.insertion(image, scaled, score, asked.steps)

    @functools.cache
    def deletion() -> float:
        return metrics.deletion(image, scaled, score, asked.steps)

    ranked = metrics.equalised(scaled)
    before, after, after_ranked = score(np.stack([image, metrics.masked(image, scaled), metrics.masked(image, ranked)]))
    computations: dict[str, Callable[[], Any]] = {
        "average_drop": lambda: metrics.average_drop(before, after),
        "area": lambda: metrics.area(scaled),
        "rank_drop": lambda: metrics.average_drop(before, after_ranked),
        "increase": lambda: metrics.increase_in_confidence(before, after),
        "insertion": insertion,
        "deletion": deletion,
        "net": lambda: insertion() - deletion(),
        "road": lambda: metrics.road(image, scaled, score),
        "seconds": lambda: seconds,
        "sensitivity": lambda: metrics.max_sensitivity(
            scaled, asked.batch, lambda noisy: explained(explainer, noisy, target), NOISE_DRAWS
        ),
        "other_class": lambda: metrics.correlation(
            scaled, explained(explainer, asked.batch, _middle_class(result.logits[0], target))
        ),
    }
    if asked.other is not None:
        other = asked.other
        computations["other_weights"] = lambda: metrics.correlation(scaled, explained(other, asked.batch, target))
    if asked.mask is not None:
        mask = asked.mask
        region = (scaled, mask.object, mask.valid)
        computations |= {
            "iou_otsu": lambda: metrics.iou(*region),
            "iou": lambda: metrics.iou(*region, asked.threshold),
            "centre_distance": lambda: metrics.centre_distance(*region),
            "energy": lambda: metrics.energy(*region),
            "pointing": lambda: metrics.pointing(*region),
        }
    computed = [n for n in names if n != "win" and (asked.mask is not None or n not in LOCALISATION)]
    values = {name: round(float(computations[name]()), 6) for name in computed}
    inexact = {name: float(error[0]) for name, error in result.details.items() if name == "map_error"}
    return {"target": target, "probability": round(float(before), 6), **inexact, **values}


def _middle_class(logits: np.ndarray, target: int) -> int:
    """The class in the middle of the ranking by logits, another than the target."""
    order = [int(c) for c in (-logits).argsort(kind="stable") if c != target]
    return order[len(order) // 2] if order else target
