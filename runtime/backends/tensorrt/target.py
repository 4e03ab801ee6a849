"""What an engine is built for, a GPU and the sizes of its runs, and the engine's key in the cache."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....kernels import GpuDevice
from ...bundle.manifest import Program
from ...bundle.reading import Bundle
from .bindings import Capability, Library

_RECIPE = 3  # version of build_engine: raise it with every change that gives other engines


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


@dataclass(frozen=True)
class Profile:
    """The sizes of runs that an engine is optimized for; each engine has several, which share its weights.

    kind: "single", one image with one seed; "batch", as many images as seeds; "targets", one image with several seeds;
    "masks", masked images. least, most: how many images or seeds a run may have.
    """

    kind: str
    least: int = 1
    most: int = 1

    def of_input(self, shape: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest and the largest shape of an input."""

        def sized(count: int) -> tuple[int, ...]:
            images = 1 if self.kind == "targets" else count
            return tuple(images if d == "batch" else count if d == "seeds" else d for d in shape)

        return sized(self.least), sized(self.most)

    def __str__(self) -> str:
        return self.kind if self.most == 1 else f"{self.kind} {self.most}"


def profiles_of(bundle: Bundle, program: Program, max_batch: int, masks: int) -> tuple[Profile, ...]:
    """Every profile that a program's runs need.

    max_batch, masks: the most images or targets, and masked images, in one run. max_batch is rounded up to 16, 32, ...:
    one engine serves several settings. Masked images run in batches of exactly `masks`; smaller ones are a "batch". A
    batch has at least two images: then the builder finds by itself that images and seeds are as many. `masks` alone
    would be a fixed size, and the builder would store constants once for every mask: so the least is one mask fewer.
    """
    symbols = {d for shape in program.inputs.values() for d in shape if isinstance(d, str)}
    profiles, most = [Profile("single")], 16
    scores = any(program == bundle.mask_program(p, on_gpu=True) for p in bundle.mask_precisions)
    while most < (max(max_batch, masks) if scores else max_batch):
        most *= 2
    if "batch" in symbols:
        profiles.append(Profile("batch", 2, most))
    if "seeds" in symbols and (bundle.manifest.seeds_share_image or "batch" not in symbols):
        profiles.append(Profile("targets", 2, most))
    if "batch" in symbols and scores and masks > 1:
        profiles.append(Profile("masks", max(2, masks - 1), masks))
    return tuple(profiles)


def chosen(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """The number of the profile for a run. sizes: symbol ("batch", "seeds") -> its size in this run."""
    kinds = {profile.kind: number for number, profile in enumerate(profiles)}
    count = max(sizes.values(), default=1)
    if count == 1:
        return kinds["single"]
    if "targets" in kinds and "seeds" in sizes and sizes.get("batch", 1) == 1:
        return kinds["targets"]
    masks = kinds.get("masks")
    return masks if masks is not None and profiles[masks].most == count else kinds["batch"]


def engine_key(
    library: Library, bundle: Bundle, program: Program, target: Target, profiles: Sequence[Profile]
) -> dict[str, Any]:
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
        "profiles": [str(p) for p in profiles],
    }
