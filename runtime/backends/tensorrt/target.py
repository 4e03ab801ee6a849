"""What an engine is built for, a GPU and the sizes of a run, and the engine's key in the cache."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....kernels import GpuDevice
from ...bundle.manifest import Program
from ...bundle.reading import Bundle
from .bindings import Capability, Library

_RECIPE = 2  # version of build_engine: raise it with every change that gives other engines


@dataclass(frozen=True)
class Target:
    """The GPUs that an engine is built for: one model, or every GPU of the compute capability if `gpu` is None."""

    capability: Capability
    gpu: str | None

    @classmethod
    def of(cls, library: Library, card: GpuDevice) -> Target:
        """The GPU of this machine."""
        return cls(card.compute_capability, None if library.ahead_of_time else card.model)

    def __str__(self) -> str:
        return "compute capability {}.{}".format(*self.capability) if self.gpu is None else self.gpu


SHAPES = ("single", "batch", "targets")  # one image; as many images as seeds; one image with several seeds


@dataclass(frozen=True)
class Shapes:
    """The sizes that an engine accepts. kind: one of SHAPES; largest: the most images or seeds in one run.

    Each kind has its own engine: one engine for all kinds takes many times as long to build, and is slower.
    """

    kind: str
    largest: int = 1

    @classmethod
    def of(cls, sizes: Mapping[str, int], max_batch: int) -> Shapes:
        """The shapes that a run needs. sizes: symbol ("batch", "seeds") -> its size in this run."""
        if all(size == 1 for size in sizes.values()):
            return cls("single")
        return cls.of_kind("targets" if "seeds" in sizes and sizes.get("batch", 1) == 1 else "batch", max_batch)

    @classmethod
    def of_kind(cls, kind: str, max_batch: int) -> Shapes:
        """`largest` is 1 for "single", else max_batch rounded up to 16, 32, ...: one engine serves several settings."""
        largest = 1 if kind == "single" else 16
        while largest < max_batch and kind != "single":
            largest *= 2
        return cls(kind, largest)

    def of_input(self, shape: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest and the largest shape of an input."""

        def sized(batch: int, seeds: int) -> tuple[int, ...]:
            return tuple(batch if d == "batch" else seeds if d == "seeds" else d for d in shape)

        return sized(1, 1), sized(1 if self.kind == "targets" else self.largest, self.largest)


def engine_key(library: Library, bundle: Bundle, program: Program, target: Target, shapes: Shapes) -> dict[str, Any]:
    """Everything that the engine depends on; the cache names its file by the hash of this."""
    return {
        "recipe": _RECIPE,
        "program": program.sha256,
        "weights": bundle.manifest.weights["sha256"],
        "model": bundle.manifest.name,
        "file": program.file,
        "precision": program.precision,
        "library": f"{library.name} {library.version}",
        "platform": f"{platform.system()} {platform.machine()}".lower(),
        "compute_capability": list(target.capability),
        "gpu": target.gpu,
        "shapes": shapes.kind,
        "largest": shapes.largest,
    }
