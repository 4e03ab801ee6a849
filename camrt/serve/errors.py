"""What a request is answered when it is not explained."""

from __future__ import annotations


class Refused(Exception):
    """status: of HTTP. retry: seconds after which it may work."""

    def __init__(self, status: int, message: str, retry: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry = status, retry
