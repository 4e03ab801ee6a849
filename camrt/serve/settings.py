"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

from ..tensors import PIXELS


@dataclass(frozen=True)
class Settings:
    """batch: the most images in one run of the network; wait: seconds that a run waits for more of them. queue: the
    most images that wait, of each model. body: bytes of a request; pixels: of one picture; images: of one request.
    timeout: seconds that a request may take. keep: seconds, and kept: the number, of explanations that can be retuned.
    token: what a request must bear, None for nothing. origins: web pages of other hosts that may ask.
    """

    batch: int = 8
    wait: float = 0.002
    queue: int = 256
    body: int = 32_000_000
    pixels: int = PIXELS
    images: int = 64
    timeout: float = 60.0
    keep: float = 300.0
    kept: int = 256
    token: str | None = None
    origins: tuple[str, ...] = ()
