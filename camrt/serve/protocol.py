"""uvicorn's protocol, with headers that must be small and must arrive."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS = 64_000  # bytes of a request's line and headers
SECONDS = 15.0  # that they may take to arrive


class BoundedHeaders(HttpToolsProtocol):
    """Ends a connection whose headers are larger (431) or later (408) than that."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._timer is not None:
            self._size += len(data)
            if self._size > HEADERS:
                self._end(431, f"the headers have more than {HEADERS} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:  # a further request of the connection
            self._wait()

    def on_headers_complete(self) -> None:
        self._stop()
        super().on_headers_complete()

    def _wait(self) -> None:
        self._size = 0
        late = f"the headers did not arrive within {SECONDS:g} seconds"
        self._timer = self.loop.call_later(SECONDS, self._end, 408, late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, status: int, message: str) -> None:
        self._stop()
        if self.transport.is_closing():
            return
        body = json.dumps({"error": message}).encode()
        lines = [f"HTTP/1.1 {status} ", "connection: close", "content-type: application/json"]
        head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
        self.transport.write(head.encode() + body)
        self.transport.close()
