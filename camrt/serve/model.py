"""A bundle that is served."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..runtime.errors import CamrtError, InputError
from ..runtime.explainer import Explainer, load
from ..runtime.explanation import Explanation
from ..runtime.images.image_batch import ImageBatch
from .errors import Refused
from .settings import Settings


@dataclass(frozen=True)
class Question:
    """What is asked of one image. image (C, H, W) float32: the network's input; options: of the method; tuned: those
    that change nothing but the last step.
    """

    image: np.ndarray
    method: str
    options: dict[str, Any]
    layers: tuple[str, ...] | str | None
    target: int | None
    tuned: dict[str, Any]

    @property
    def key(self) -> Hashable:
        """Questions with the same key can share a run of the network."""
        return self.method, repr(sorted(self.options.items())), self.layers


TUNED = {"winsor_cam": ("percentile",)}  # options that may differ within a run of the network


class Model:
    """Opens in a thread of its own, since it takes seconds; until then `explainer` refuses with 503."""

    def __init__(
        self, name: str, path: Path, backend: str, precision: str | None, threads: int | None, batch: int
    ) -> None:
        self.name, self.path = name, path
        self.problem: str | None = None
        self._opened: Explainer | None = None
        arguments = (path, backend, batch, precision, threads)
        self._thread = threading.Thread(target=self._open, args=arguments, name=f"camrt-open-{name}", daemon=True)
        self._thread.start()

    def _open(self, *arguments: Any) -> None:
        try:
            explainer = load(*arguments)
            shape = explainer.manifest.input_shape
            explainer.classify(np.zeros((1, *shape), np.float32))
            self._opened = explainer
        except CamrtError as error:
            self.problem = str(error)

    @property
    def is_ready(self) -> bool:
        return self._opened is not None

    def wait(self) -> None:
        """Until it is opened, or has failed."""
        self._thread.join()

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
        image = ImageBatch(item if isinstance(item, bytes) else item[None], explainer.manifest).on_host()[0]
        chosen = layers if layers is None or isinstance(layers, str) else tuple(layers)
        number = self._class(target)
        explainer.check_arguments(method, number, chosen, options)
        tuned = {name: options[name] for name in TUNED.get(method, ()) if name in options}
        fixed = {name: value for name, value in options.items() if name not in tuned}
        return Question(image, method, fixed, chosen, number, tuned)

    def _class(self, target: str | int | None) -> int | None:
        if target is None or target == "" or target == -1 or target == "-1":
            return None
        from ..runtime.targets import class_index

        if isinstance(target, str):
            return int(target) if target.isdecimal() else class_index(target, self.explainer.manifest)
        return target

    def explain(self, questions: Sequence[Question]) -> list[Explanation | Exception]:
        """Answers questions of one key with one run of the network; if that fails, one by one, so that one bad image
        spoils no other.
        """
        try:
            return list(self._explained(questions))
        except CamrtError as error:
            if len(questions) == 1:
                return [error]
        return [answer for question in questions for answer in self.explain([question])]

    def _explained(self, questions: Sequence[Question]) -> list[Explanation]:
        first = questions[0]
        images = np.stack([q.image for q in questions])
        options = first.options | first.tuned
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `details` and constant maps are in the answer
            together = self.explainer.explain(
                images, first.method, [q.target for q in questions], first.layers, **options
            )
            alone = [together.for_image(i) for i in range(len(questions))]
            return [e.retune(**q.tuned) if q.tuned != first.tuned else e for e, q in zip(alone, questions, strict=True)]

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
