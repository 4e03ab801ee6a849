"""The kinds of program that a bundle holds: one row each, which export, the manifest, the backends and the command
line read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .manifest import Manifest, Tap


class Kind(StrEnum):
    """A program's kind, as manifests record it."""

    CLASSIFY = "classify"
    ACTIVATIONS = "activations"
    GRADIENTS = "gradients"
    LAYER_MAPS = "layer_maps"
    SIGNED_MAPS = "signed_maps"
    FULL_GRAD = "full_grad"
    TRUNK = "trunk"
    HEAD = "head"
    NORMALIZE = "normalize"
    SCORE = "score"
    MASKED = "masked"


Sizes = dict[str, tuple[int, ...]]  # tensor -> its shape without the first size
Interface = tuple[Sizes, Sizes]  # of a program's inputs and outputs
_EXPORT_AGAIN = "export the bundle again"
_NOT_CUT = (
    "bundles hold the network cut in two at the last block and at named layers that are no convolutions, where a cut "
    "is possible: export it with --layers last, or name another layer"
)


@dataclass(frozen=True)
class ProgramKind:
    """interface: (manifest, taps) -> the program's inputs and outputs, without `context:` and `grid:` tensors.
    of_means: the same where the network reads only the layer's means over the grid, None if that makes no difference.

    runs_once: the program runs once per explanation, and everything else depends on its result. It is therefore float32
    in every precision, and on a CPU its threads do not spin after the run. engine: `camrt build` builds it by default,
    because winsor_cam or score_cam_pp needs it. missing: what a user can do if the bundle has no such program. purpose:
    what it computes, in a phrase. input_dtype: of all its inputs; outputs are float32.
    """

    purpose: str
    interface: Callable[[Manifest, Sequence[Tap]], Interface]
    runs_once: bool = False
    engine: bool = False
    missing: str = _EXPORT_AGAIN
    input_dtype: str = "float32"
    of_means: Callable[[Manifest, Sequence[Tap]], Interface] | None = None

    def allows(self, found: Interface, manifest: Manifest, taps: Sequence[Tap]) -> bool:
        """Whether a program of this kind may have these inputs and outputs."""
        allowed = [self.interface] if self.of_means is None else [self.interface, self.of_means]
        return any(found == given(manifest, taps) for given in allowed)


def _image(m: Manifest) -> Sizes:
    return {"image": m.input_shape}


def _seed(m: Manifest) -> Sizes:
    return {"seed": (m.num_classes,)}


def _logits(m: Manifest) -> Sizes:
    return {"logits": (m.num_classes,)}


def _normalized(m: Manifest) -> Sizes:
    return {} if m.normalized is None else {"normalized": m.normalized.shape}


def _each(name: str, taps: Sequence[Tap]) -> Sizes:
    return {f"{name}:{t.name}": (t.channels, *t.grid) for t in taps}


def _single(taps: Sequence[Tap]) -> Sizes:
    return {"activation": (taps[0].channels, *taps[0].grid)} if len(taps) == 1 else {}


def _means(taps: Sequence[Tap]) -> Sizes:
    return {"means": (taps[0].channels,)} if len(taps) == 1 else {}


def _maps(taps: Sequence[Tap]) -> Sizes:
    return {"maps": (sum(math.prod(t.grid) for t in taps),)}


def _layer_maps(taps: Sequence[Tap]) -> Sizes:
    return {"alphas": (sum(t.channels for t in taps),)} | _maps(taps)


KINDS: dict[str, ProgramKind] = {
    Kind.CLASSIFY: ProgramKind(
        "the logits of images",
        lambda m, taps: (_image(m), _logits(m)),
        engine=True,
    ),
    Kind.ACTIVATIONS: ProgramKind(
        "the activations of layers",
        lambda m, taps: (_image(m), _logits(m) | _each("activation", taps)),
        runs_once=True,
        engine=True,
    ),
    Kind.GRADIENTS: ProgramKind(
        "the activations of layers and their gradients",
        lambda m, taps: (
            _image(m) | _seed(m),
            _logits(m) | _each("activation", taps) | _each("gradient", taps),
        ),
    ),
    Kind.LAYER_MAPS: ProgramKind(
        "the mean gradients of layers, and the maps that they weigh (Grad-CAM, Winsor-CAM)",
        lambda m, taps: (_image(m) | _seed(m), _logits(m) | _layer_maps(taps)),
        engine=True,
    ),
    Kind.SIGNED_MAPS: ProgramKind(
        "the maps of layers for Integrative CAM",
        lambda m, taps: (
            _image(m) | _seed(m) | {"ratio": (1,)},
            _logits(m) | _maps(taps) | {"magnitudes": (len(taps),)},
        ),
        missing="it was exported before integrative_cam had this reading: export it again, or use reading='residual'",
    ),
    Kind.FULL_GRAD: ProgramKind(
        "FullGrad's maps, summed by size",
        lambda m, taps: (_image(m) | _seed(m), _logits(m)),
        missing="it needs a gradient rule "
        "for every operator down to the image and every bias on a grid of the image, which this network lacks; or "
        "the bundle is old, then export it again",
    ),
    Kind.TRUNK: ProgramKind(
        "the network up to a layer",
        lambda m, taps: (_image(m), _logits(m) | _single(taps)),
        runs_once=True,
        missing=_NOT_CUT,
        of_means=lambda m, taps: (_image(m), _logits(m) | _single(taps) | _means(taps)),
    ),
    Kind.HEAD: ProgramKind(
        "the network behind a layer, to run on changed activations",
        lambda m, taps: (_single(taps), _logits(m)),
        missing=_NOT_CUT,
        of_means=lambda m, taps: (_means(taps), _logits(m)),
    ),
    Kind.NORMALIZE: ProgramKind(
        "the network's own normalisation of the image",
        lambda m, taps: (_image(m), _normalized(m)),
        runs_once=True,
        engine=True,
    ),
    Kind.SCORE: ProgramKind(
        "the network behind its own normalisation, to run on masked images",
        lambda m, taps: (_normalized(m), _logits(m)),
        engine=True,
    ),
    Kind.MASKED: ProgramKind(
        "the scores of masked images, in float16 or int8",
        lambda m, taps: ({"masked": m.scored_shape}, _logits(m)),
        engine=True,
        missing="export it with --precision fp16 or int8",
        input_dtype="float16",
    ),
}
