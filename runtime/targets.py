"""What to explain: class numbers, class names, or seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .bundle.manifest import Manifest
from .errors import InputError, near


@dataclass(frozen=True)
class Targets:
    """What to explain. seeds (B, K, classes) float32: cotangents of the logits; a row of zeros means the top class."""

    seeds: np.ndarray
    classes: np.ndarray | None  # (B, K) int64; None for seed arrays; -1 where the top class was asked for
    several: bool  # maps are (B, K, H, W) rather than (B, H, W)


def read_targets(target: Any, images: int, manifest: Manifest) -> Targets:
    """Converts the `target` of `explain` to Targets for that many images.

    InputError for a class out of range or a shape that does not fit.
    """
    classes = manifest.num_classes
    if isinstance(target, str) and target == "not" and (classes == 1 or "not" not in (manifest.classes or ())):
        if classes != 1:
            raise InputError(
                f"target 'not' is for networks with a single score, this one has {classes} classes: name one"
            )
        return Targets(np.full((images, 1, 1), -1, np.float32), None, False)
    target = _by_number(target, manifest)
    if target is None:
        return Targets(np.zeros((images, 1, classes), np.float32), np.full((images, 1), -1), False)
    if isinstance(target, list | tuple) and any(t is None for t in target):
        return _some_top(target, images, manifest)
    try:
        given = np.asarray(target)
    except ValueError:
        raise InputError(
            "target: every image needs the same number of classes: pass one, one per image, or (images, targets)"
        ) from None
    if given.dtype.kind == "f":
        if given.ndim == 1:
            given = np.repeat(given[None], images, axis=0)
        seeds = given[:, None] if given.ndim == 2 else given
        seeds = seeds.astype(np.float32)  # before the check: a seed that underflows to 0 would mean the top class
        if seeds.ndim != 3 or len(seeds) != images or seeds.shape[2] != classes or not seeds.size:
            raise InputError(
                f"seed array of shape {given.shape}: pass ({images}, {classes}) or ({images}, targets, {classes})"
            )
        if not np.isfinite(seeds).all() or not np.abs(seeds).max(axis=2, initial=0).all():
            raise InputError("seed array: every row needs finite entries, not all of them zero")
        return Targets(seeds, None, given.ndim == 3)
    if given.dtype.kind not in "iu":
        raise InputError(f"target {target!r}: pass None, class numbers, or a float seed array")
    if given.ndim == 0:
        given = np.full(images, int(given))
    if given.ndim not in (1, 2) or len(given) != images or given.size == 0:
        raise InputError(
            f"target of shape {given.shape}: pass one class, one per image ({images}), or ({images}, targets)"
        )
    wrong = given[(given < 0) | (given >= classes)]
    if wrong.size:
        raise InputError(f"class {wrong.flat[0]} is out of range: the network has classes 0..{classes - 1}")
    grid = given.reshape(images, -1).astype(np.int64)
    seeds = np.zeros((*grid.shape, classes), np.float32)
    seeds.reshape(-1, classes)[np.arange(grid.size), grid.ravel()] = 1
    return Targets(seeds, grid, given.ndim == 2)


def _some_top(target: Sequence[Any], images: int, manifest: Manifest) -> Targets:
    """Of one class per image, some of which are None: the top class."""
    top = np.array([t is None for t in target])
    found = read_targets([0 if t is None else t for t in target], images, manifest)
    if found.classes is None or found.several:
        raise InputError(f"target {target!r}: None stands for an image's top class among one class per image")
    found.seeds[top], found.classes[top] = 0, -1
    return found


def class_index(name: str, manifest: Manifest) -> int:
    """The number of the class with this name, or with a name of which it is one of the parts between commas; without
    regard to case. InputError if there is none, or several.
    """
    names = manifest.classes or ()
    wanted = name.strip().lower()
    matches = [i for i, full in enumerate(names) if wanted == full.strip().lower()]
    matches = matches or [i for i, full in enumerate(names) if wanted in (p.strip().lower() for p in full.split(","))]
    if len(matches) == 1:
        return matches[0]
    if not names:
        raise InputError(f"class {name!r}: this bundle has no class names: pass a number 0..{manifest.num_classes - 1}")
    if matches:
        numbers = ", ".join(map(str, matches))
        raise InputError(f"class {name!r} is ambiguous, it names {numbers}: pass one of these numbers")
    parts = [part.strip() for full in names for part in full.split(",")]
    raise InputError(f"no class {name!r} of this bundle{near(name, parts)}")


def _by_number(target: Any, manifest: Manifest) -> Any:
    """Class names, alone or in nested sequences, as numbers; the rest as it is."""
    if isinstance(target, str):
        return class_index(target, manifest)
    if isinstance(target, Sequence) and not isinstance(target, bytes):
        return [_by_number(t, manifest) for t in target]
    return target
