"""A bundle that is served."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..questions import Question, answers
from ..runtime.errors import CamrtError, InputError, first_line
from ..runtime.explainer import Explainer, load
from ..runtime.explanation import Explanation
from ..runtime.images.image_batch import ImageBatch
from ..tensors import PictureTooLarge, read_question
from .errors import Refused
from .settings import Settings


class Model:
    """Opens in a thread of its own, since it takes seconds; until then `explainer` refuses with 503."""

    def __init__(
        self, name: str, path: Path, backend: str, precision: str | None, threads: int | None, batch: int
    ) -> None:
        self.name = name
        self.problem: str | None = None
        self._opened: Explainer | None = None
        arguments = (path, backend, batch, precision, threads)
        threading.Thread(target=self._open, args=arguments, name=f"camrt-open-{name}", daemon=True).start()

    def _open(self, *arguments: Any) -> None:
        try:
            explainer = load(*arguments)
            shape = explainer.manifest.input_shape
            explainer.classify(np.zeros((1, *shape), np.float32))
            self._opened = explainer
        except Exception as error:  # whatever it is, nobody must wait for this model
            self.problem = str(error) if isinstance(error, CamrtError) else first_line(error)

    @property
    def is_ready(self) -> bool:
        return self._opened is not None

    @property
    def explainer(self) -> Explainer:
        if self.problem is not None:
            raise Refused(503, f"the model {self.name} cannot be opened: {self.problem}")
        if self._opened is None:
            raise Refused(503, f"the model {self.name} is being opened: ask again later", retry=2)
        return self._opened

    def question(
        self,
        item: bytes | np.ndarray,
        method: str,
        options: dict[str, Any],
        layers: Sequence[str] | str | None,
        target: str | int | None,
        settings: Settings,
    ) -> Question:
        """What is asked of a picture, or of a float32 array (C, H, W), read and checked. CamrtError, Refused."""
        try:
            return read_question(self.explainer, item, method, options, layers, target, settings.pixels)
        except PictureTooLarge as error:
            raise Refused(413, str(error)) from None

    def explain(self, questions: Sequence[Question]) -> list[Explanation | Exception]:
        """Answers questions of one key."""
        return answers(self.explainer, questions)

    def with_photo(self, explanation: Explanation, source: bytes | None) -> Explanation:
        """The explanation with its photo, for overlays."""
        if source is None:
            return explanation
        return replace(explanation, images=ImageBatch(source, self.explainer.manifest))


def named(paths: Sequence[str]) -> dict[str, Path]:
    """NAME=BUNDLE or BUNDLE -> {name: path}; a bundle's own name is that of its folder. InputError for a name twice."""
    found: dict[str, Path] = {}
    for text in paths:
        name, equals, path = text.partition("=")
        place = Path(path if equals else text)
        name = name if equals else place.resolve().name.removesuffix(".camrt")
        if not name or not all(c.isalnum() or c in "-_." for c in name):
            raise InputError(f"{text}: the name {name!r} cannot stand in an address: write NAME=BUNDLE")
        if name in found:
            raise InputError(f"two bundles are called {name!r}: write NAME=BUNDLE")
        found[name] = place
    return found
