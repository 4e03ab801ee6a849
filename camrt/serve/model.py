"""A bundle that is served."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..questions import Question, answers, question
from ..runtime.errors import CamrtError, InputError, first_line
from ..runtime.explainer import Explainer, load
from ..runtime.explanation import Explanation
from ..runtime.images.image_batch import ImageBatch
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
        """Reads a picture, or takes a float32 array (C, H, W), and checks what is asked. CamrtError, Refused."""
        explainer = self.explainer
        if isinstance(item, bytes):
            _check_pixels(item, settings.pixels)
            image = ImageBatch(item, explainer.manifest).on_host()[0]
        else:
            image = item
            ImageBatch(item, explainer.manifest)  # checks it; a batch copies it later
        return question(explainer, image, method, options, layers, target)

    def explain(self, questions: Sequence[Question]) -> list[Explanation | Exception]:
        """Answers questions of one key."""
        return answers(self.explainer, questions)

    def with_photo(self, explanation: Explanation, source: bytes | None) -> Explanation:
        """The explanation with its photo, for overlays."""
        if source is None:
            return explanation
        return replace(explanation, images=ImageBatch(source, self.explainer.manifest))


def _check_pixels(picture: bytes, most: int) -> None:
    """Refused (413) by the picture's header alone."""
    try:
        with Image.open(io.BytesIO(picture)) as opened:
            width, height = opened.size
    except Image.DecompressionBombError:
        raise Refused(413, f"the picture has more than {most} pixels") from None
    except Exception:
        return  # ImageBatch says what is wrong
    if width * height > most:
        raise Refused(413, f"the picture has {width} x {height} pixels, at most {most} are allowed")


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
