"""Means over images, their intervals, and paired differences between methods."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime import metrics
from .metric_table import METRICS

_AT_ONCE = 1 << 20  # numbers that the bootstrap draws at once


@dataclass(frozen=True)
class Cell:
    """A mean over images and its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    images: int


def bootstrap(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> Cell:
    """Mean and 95 % percentile bootstrap interval of values (B,). Efron, 1979. ValueError if there are none."""
    if not len(values):
        raise ValueError("no values")
    rng = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // len(values))
    means = [
        values[rng.integers(0, len(values), (min(rows, resamples - start), len(values)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Cell(float(values.mean()), float(low), float(high), len(values))


Records = Sequence[Mapping[str, Any]]


def tabulate(records: Records, methods: Sequence[str]) -> dict[str, dict[str, Cell]]:
    """method -> metric -> Cell. methods: as they were written. Win compares these methods, over the images that all of
    them have.
    """
    values = _values(records, methods)
    return {
        method: {
            name: bootstrap(np.array(list(values[method][name].values()))) for name in METRICS if values[method][name]
        }
        for method in methods
    }


def differences(records: Records, methods: Sequence[str]) -> dict[tuple[str, str], dict[str, Cell]]:
    """(method, other) -> metric -> the mean of method - other over the images that both have, with its interval. An
    interval without 0 says that the two differ in this metric, more than their images' choice explains.
    """
    values = _values(records, methods)
    found: dict[tuple[str, str], dict[str, Cell]] = {}
    for one, other in itertools.combinations(methods, 2):
        cells = {}
        for name in METRICS:
            common = [image for image in values[one][name] if image in values[other][name]]
            if common and name != "win":
                cells[name] = bootstrap(np.array([values[one][name][i] - values[other][name][i] for i in common]))
        found[one, other] = cells
    return found


def _values(records: Records, methods: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """method -> metric -> image -> value."""
    rows = {m: {r["image"]: r for r in records if r["method"] == m} for m in methods}
    values: dict[str, dict[str, dict[str, float]]] = {
        m: {name: {i: float(r[name]) for i, r in rows[m].items() if name in r} for name in METRICS} for m in methods
    }
    common = sorted(set.intersection(*(set(v["average_drop"]) for v in values.values()))) if methods else []
    if len(methods) > 1 and common:
        drops = np.array([[values[m]["average_drop"][i] for m in methods] for i in common])
        for method, wins in zip(methods, metrics.win_percentage(drops).T, strict=True):
            values[method]["win"] = dict(zip(common, map(float, wins), strict=True))
    return values
