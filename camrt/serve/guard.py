"""Around every request: who may ask, how large and how late it may be; its line in the log, its metrics."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import logging
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from .errors import Refused
from .service import Service

log = logging.getLogger("camrt.serve")
GRACE = 5.0  # seconds beside the timeout, for a request to arrive and its answer to be written
OPEN = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")  # routes that need no token


class Guard:
    """Around everything: the token, the size of bodies, a line of the log for each request, its metrics."""

    def __init__(self, app: Any, service: Service) -> None:
        self._app, self._service, self._numbers = app, service, itertools.count(1)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, read = perf_counter(), 0, 0
        request, settings = Request(scope), self._service.settings

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > settings.body:
                raise Refused(413, f"the body has more than {settings.body} bytes")
            return message

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refused = self._refusal(request)
        try:
            async with asyncio.timeout(settings.timeout + GRACE):
                await (self._app if refused is None else answer_of(refused))(scope, counted, noted)
        except ClientDisconnect:
            status = 499
        except TimeoutError:
            if status == 0:
                late = Refused(408, f"the request did not arrive within {settings.timeout + GRACE:g} seconds")
                await answer_of(late)(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            model = str(scope.get("path_params", {}).get("name", ""))
            known = model if model in self._service.models else ""
            self._service.metrics.requests.labels(known, route, str(status)).inc()
            took = round((perf_counter() - began) * 1e3, 1)
            said = {"id": next(self._numbers), "method": request.method, "path": request.url.path, "status": status}
            log.info(json.dumps(said | {"ms": took, "bytes": read}))

    def _refusal(self, request: Request) -> Refused | None:
        settings = self._service.settings
        origin = request.headers.get("origin")
        if origin is not None and origin not in settings.origins and not _is_own(origin, request):
            return Refused(403, "a page of another host may not ask: the server's --origins does not name it")
        if settings.token is not None and request.url.path not in OPEN:
            scheme, _, given = dict(request.scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, settings.token.encode()):
                return Refused(401, "this server needs a token: Authorization: Bearer TOKEN")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > settings.body:
            return Refused(413, f"the body has {length} bytes, at most {settings.body} are allowed")
        return None


def _is_own(origin: str, request: Request) -> bool:
    """Whether a page of this server asks."""
    try:
        return urlsplit(origin).netloc == request.headers.get("host")
    except ValueError:
        return False


def answer_of(refused: Refused) -> JSONResponse:
    """{"error": one line}."""
    line = " ".join(str(refused).encode("utf-8", "backslashreplace").decode().split())
    headers = {} if refused.retry is None else {"Retry-After": str(refused.retry)}
    headers |= {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {}
    return JSONResponse({"error": line}, refused.status, headers)
