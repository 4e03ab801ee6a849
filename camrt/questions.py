"""Questions about single images, from whoever asks, and their answers by one run of the network."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .runtime.bundle.manifest import Manifest
from .runtime.cams.winsor import check_options
from .runtime.errors import CamrtError
from .runtime.explainer import Explainer
from .runtime.explanation import Explanation
from .runtime.targets import class_index

DIGITS = 12  # of a class number: more are out of range as well
TUNED = {"winsor_cam": ("percentile",)}  # options that may differ within a run of the network


@dataclass(frozen=True)
class Question:
    """What is asked of one image. image (C, H, W) float32: the network's input; options: of the method; tuned: those
    that change nothing but the last step, all of them; target: None for the top class.
    """

    image: np.ndarray
    method: str
    options: Mapping[str, Any]
    layers: tuple[str, ...] | str | None
    target: int | None
    tuned: Mapping[str, Any]

    @property
    def key(self) -> Hashable:
        """Questions with the same key can share a run of the network."""
        return self.method, repr(sorted(self.options.items())), self.layers


def question(
    explainer: Explainer,
    image: np.ndarray,
    method: str,
    options: Mapping[str, Any],
    layers: Sequence[str] | str | None,
    target: str | int | None,
) -> Question:
    """A checked question: what it asks for can be explained. target: a class by number or name; -1 or None for the top
    class. InputError, UnknownMethod, UnknownLayer.
    """
    number = class_number(target, explainer.manifest)
    chosen = layers if layers is None or isinstance(layers, str) else tuple(layers)
    complete = explainer.check_arguments(method, number, chosen, dict(options))
    tuned = {name: complete[name] for name in TUNED.get(method, ())}
    if "percentile" in tuned:
        check_percentile(tuned["percentile"])
    fixed = {name: value for name, value in options.items() if name not in tuned}
    return Question(image, method, fixed, chosen, number, tuned)


def check_percentile(percentile: Any) -> None:
    """InputError unless it is one. Where it is asked for: in the run it would be refused for all that share it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a percentile below 1
        check_options(percentile, "mean", "bilinear", 0.1, 1.0)


def class_number(target: str | int | None, manifest: Manifest) -> int | None:
    """A class by number or name; None for None, "" and -1, the top class. InputError for a name that no class has."""
    if target is None or target in ("", "-1", -1):
        return None
    if isinstance(target, str):
        return int(target[:DIGITS]) if target.isdecimal() else class_index(target, manifest)
    return target


def answers(explainer: Explainer, questions: Sequence[Question]) -> list[Explanation | Exception]:
    """Of questions with the same key, by one run of the network; if that fails, one by one, so that one bad image
    spoils no other.
    """
    try:
        return list(_together(explainer, questions))
    except CamrtError as error:
        if len(questions) == 1:
            return [error]
    return [answer for one in questions for answer in answers(explainer, [one])]


def _together(explainer: Explainer, questions: Sequence[Question]) -> list[Explanation]:
    first = questions[0]
    images, targets = np.stack([q.image for q in questions]), [q.target for q in questions]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `details` and constant maps are in the answer
        together = explainer.explain(images, first.method, targets, first.layers, **first.options, **first.tuned)
        alone = [together.for_image(i) for i in range(len(questions))]
        return [e if q.tuned == first.tuned else e.retune(**q.tuned) for e, q in zip(alone, questions, strict=True)]
