"""Serves a page on this machine."""

from __future__ import annotations

import http.server
import socket
from functools import partial
from pathlib import Path
from typing import Any

from ..runtime.errors import InputError

TYPES = {".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json"}
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",  # with the next line, browsers allow several threads
    "Cross-Origin-Embedder-Policy": "require-corp",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | TYPES

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _ServerOnIPv6(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


def server(folder: Path, host: str = "127.0.0.1", port: int = 8000) -> http.server.ThreadingHTTPServer:
    """A server of the folder's files, not yet running; port 0 takes a free one. InputError if the port is taken."""
    kind = _ServerOnIPv6 if ":" in host else http.server.ThreadingHTTPServer
    try:
        return kind((host, port), partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{host}:{port} cannot be served ({reason}): choose another with --serve HOST:PORT") from None
