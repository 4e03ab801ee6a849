"""What the routes share: models, their batchers, kept explanations, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from ..questions import Question
from ..runtime.explanation import Explanation
from .batching import Batcher
from .errors import Refused
from .kept import Keeper
from .metrics import Metrics
from .model import Model
from .settings import Settings

Found = TypeVar("Found")
READERS = 2  # threads that decode pictures and draw overlays


class Service:
    def __init__(self, models: Mapping[str, Model], settings: Settings) -> None:
        self.models, self.settings = models, settings
        self.keeper, self.metrics = Keeper(settings), Metrics()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="camrt-read")
        self._batchers: dict[str, Batcher[Question, Explanation]] = {}

    def start(self) -> None:
        """Inside the event loop."""
        for name, model in self.models.items():
            self._batchers[name] = Batcher(model.explain, self.settings, partial(self.metrics.observe, name))
            self.metrics.waiting.labels(name).set_function(partial(len, self._batchers[name]))

    async def close(self) -> None:
        """After the last request."""
        await asyncio.gather(*(batcher.close() for batcher in self._batchers.values()))
        self._readers.shutdown()

    def check_ready(self) -> None:
        """Refused (503) unless every model is open."""
        for model in self.models.values():
            _ = model.explainer

    def model(self, name: str) -> Model:
        if name not in self.models:
            raise Refused(404, f"no model {name!r}: there are {', '.join(self.models)}")
        return self.models[name]

    @contextmanager
    def stage(self, model: str, name: str) -> Any:
        began = perf_counter()
        yield
        self.metrics.observe(model, name, perf_counter() - began)

    async def aside(self, work: Callable[..., Found], *arguments: Any) -> Found:
        """work(*arguments) in a thread for reading and drawing, so that the server answers others meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, partial(work, *arguments))

    async def explain(
        self,
        model: Model,
        items: Sequence[bytes | np.ndarray],
        method: str,
        options: Sequence[dict[str, Any]],
        layers: Sequence[str] | str | None,
        targets: Sequence[str | int | None],
    ) -> list[Explanation]:
        """One explanation for each item, which has its own options and target. CamrtError, Refused."""
        if len(items) > self.settings.images:
            raise Refused(413, f"{len(items)} images in one request, at most {self.settings.images} are allowed")
        with self.stage(model.name, "read"):
            asked = [
                (item, method, own, layers, target, self.settings)
                for item, own, target in zip(items, options, targets, strict=True)
            ]
            if any(isinstance(item, bytes) for item in items):  # pictures are decoded
                questions = [await self.aside(model.question, *one) for one in asked]
            else:
                questions = [model.question(*one) for one in asked]
        batcher = self._batchers[model.name]
        try:
            async with asyncio.timeout(self.settings.timeout):
                answers = await batcher.ask([(q.key, q) for q in questions])
        except TimeoutError:
            raise Refused(504, f"not explained within {self.settings.timeout:g} seconds", retry=5) from None
        self.metrics.images.labels(model.name, method).inc(len(answers))
        return answers
