"""The metrics of `camrt evaluate`: a row each."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """heading: of its column; better: 1 if higher is better, -1 if lower is, 0 if neither."""

    heading: str
    better: int
    digits: int = 3


FAITHFULNESS = {
    "average_drop": Metric("Average Drop %", -1, 1),
    "area": Metric("area", 0),
    "rank_drop": Metric("Average Drop % at equal area", -1, 2),
    "increase": Metric("Increase %", 1, 1),
    "win": Metric("Win %", 1, 1),
    "insertion": Metric("insertion", 1),
    "deletion": Metric("deletion", -1),
    "road": Metric("ROAD", 1),
}
LOCALISATION = {
    "iou_otsu": Metric("IoU Otsu", 1),
    "iou": Metric("IoU", 1),
    "centre_distance": Metric("centre distance", -1),
    "energy": Metric("energy", 1),
    "pointing": Metric("pointing", 1),
}
# asked for by name; most of them explain the image again
CHECKS = {
    "seconds": Metric("seconds a map", -1),
    "net": Metric("insertion - deletion", 1),
    "sensitivity": Metric("sensitivity to noise", -1),
    "other_class": Metric("correlation with another class", -1),
    "other_weights": Metric("correlation with other weights", -1),
}
METRICS = FAITHFULNESS | LOCALISATION | CHECKS
