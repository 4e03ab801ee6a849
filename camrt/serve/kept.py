"""Explanations that can be asked for again, by an id, for a bounded time."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic

from ..runtime.explanation import Explanation
from .errors import Refused
from .settings import Settings

BYTES = 256_000_000  # of the pictures of all that is kept


@dataclass(frozen=True)
class Kept:
    model: str
    explanation: Explanation
    source: bytes | None
    since: float


class Keeper:
    """The oldest goes first, when there are too many or its time is over."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def keep(self, model: str, explanation: Explanation, source: bytes | None) -> str:
        """The id, which nobody can guess."""
        key = secrets.token_urlsafe(16)
        self._kept[key] = Kept(model, explanation, source, monotonic())
        self._forget()
        asyncio.get_running_loop().call_later(self._settings.keep + 0.1, self._forget)
        return key

    def get(self, key: str) -> Kept:
        """Refused (404) if it is not known, or not any more."""
        self._forget()
        if key not in self._kept:
            raise Refused(404, f"no explanation with this id: it is kept for {self._settings.keep:.0f} seconds at most")
        return self._kept[key]

    def _forget(self) -> None:
        """What is too old, or too much."""
        latest = monotonic() - self._settings.keep
        size = sum(len(kept.source or b"") for kept in self._kept.values())
        while self._kept:
            oldest = next(iter(self._kept.values()))
            if oldest.since >= latest and len(self._kept) <= self._settings.kept and size <= BYTES:
                return
            size -= len(oldest.source or b"")
            self._kept.popitem(last=False)
