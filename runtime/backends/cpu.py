"""What backends on the CPU have in common."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bundle.manifest import Program
from ..errors import InputError, first_line


def shapes_of(arrays: Mapping[str, Any]) -> str:
    """For a message: each array's name and shape."""
    return ", ".join(f"{name} {array.shape}" for name, array in arrays.items())


def give_back_freed() -> None:
    """Gives freed memory back to the system: glibc keeps what a load of weights needed (ResNet-50: 230 MB)."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # other C libraries do not have the function
        ctypes.CDLL(None).malloc_trim(0)


class CpuExecutable(ABC):
    """A program that is loaded up to twice, on first use: with every size fixed, for single images, and for all other
    sizes. A concurrent program is loaded once, and each of its runs takes one thread.
    """

    engine: str  # its name in messages

    def __init__(self, program: Program, concurrent: bool, one_by_one: bool = False) -> None:
        """one_by_one: several images, with as many seeds, run one after another."""
        self._program = program
        self._concurrent = concurrent
        self._one_by_one = one_by_one
        self._loaded: dict[bool, Any] = {}
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        counts = {len(array) for array in feeds.values()}
        by_one = self._one_by_one and len(counts) == 1 and max(counts) > 1
        single = by_one or (not self._concurrent and counts == {1})
        with self._lock:
            if single not in self._loaded:
                self._loaded[single] = self._load(single)
            loaded = self._loaded[single]
        try:
            if by_one:
                rows = [self._infer(loaded, {n: a[i : i + 1] for n, a in feeds.items()}) for i in range(max(counts))]
                out = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
            else:
                out = self._infer(loaded, feeds)
        except Exception as error:
            raise InputError(f"{self.engine} refused {shapes_of(feeds)}: {first_line(error)}") from error
        self._program.check_outputs(feeds, out)
        return out

    @abstractmethod
    def _load(self, single: bool) -> Any:
        """What `_infer` runs. single: every symbolic size is 1. BundleError if the file cannot be loaded."""

    @abstractmethod
    def _infer(self, loaded: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...
