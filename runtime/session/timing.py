"""Measures how long each stage of a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..backends import Executable

Interval = tuple[float, float]


class Stages:
    """The time intervals of each stage, on all threads. Made by `Explainer.timed`.

    preprocess: makes the network's input of the caller's images. network: a program runs. method: the CAM method's own
    work around the network. synchronize: waits for the queued work of the GPU.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self._synchronize = synchronize
        self.intervals: dict[str, list[Interval]] = {"preprocess": [], "network": [], "method": []}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._synchronize()
        started = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            self.intervals[stage].append((started, time.perf_counter()))

    def seconds(self, total: float) -> dict[str, float]:
        """Seconds of each stage in calls that took `total` seconds, and `rest`: the time outside all stages.

        The method's time does not include time in which the network runs, on any thread.
        """
        network, method = self.intervals["network"], self.intervals["method"]
        seconds_by_stage = {
            "preprocess": covered(self.intervals["preprocess"]),
            "network": covered(network),
            "method": covered([*method, *network]) - covered(network),
        }
        return seconds_by_stage | {"rest": max(0.0, total - sum(seconds_by_stage.values()))}


def covered(intervals: list[Interval]) -> float:
    """Total length of the union of the intervals, in seconds."""
    length, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        length += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return length


class TimedExecutable:
    """An executable whose runs are timed as the stage "network"."""

    def __init__(self, executable: Executable, stages: Stages) -> None:
        self._executable = executable
        self._stages = stages

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        with self._stages("network"):
            return self._executable.run(feeds)
