"""Runs the server until it is told to stop."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..install import repair
from ..runtime.errors import CamrtError, InputError
from .settings import Settings

PATIENCE = 30  # seconds that accepted requests have to end, after SIGTERM


def serve(
    bundles: Sequence[str],
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 8080,
    backend: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    page: Path | None = None,
) -> None:
    """Returns after SIGTERM or Ctrl-C, when every request that was accepted has its answer. bundles: BUNDLE or
    NAME=BUNDLE. CamrtError without the serve extra; InputError; BundleError for a bundle that is missing.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise CamrtError(repair("serve", (error.name or "fastapi").partition(".")[0], "serve", error)) from None
    from ..runtime.bundle.reading import read_bundle
    from .app import create_app
    from .model import Model, named
    from .protocol import BoundedHeaders

    if page is not None and not (page / "index.html").is_file():
        raise InputError(f"{page}: no page: make it with camrt page")
    paths = named(bundles)
    for path in paths.values():
        read_bundle(path)  # a mistake in a name stops the server before it starts
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("camrt.serve").addHandler(handler)
    logging.getLogger("camrt.serve").setLevel(logging.INFO)
    models = {name: Model(name, path, backend, precision, threads, settings.batch) for name, path in paths.items()}
    app = create_app(models, settings, page)
    config = uvicorn.Config(
        app,
        host,
        port,
        http=BoundedHeaders,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=PATIENCE,
        server_header=False,
    )
    server = uvicorn.Server(config)
    try:
        sockets = [config.bind_socket()]
    except (SystemExit, OverflowError):
        raise InputError(f"{host}:{port} cannot be served: choose another with --host and --port") from None
    sockets[0].listen(config.backlog)  # whoever reads the line below may ask at once
    address = sockets[0].getsockname()
    print(f"camrt serves {', '.join(models)} at http://{host}:{address[1]}/ ; stop with Ctrl-C", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again when all is answered
    server.run(sockets)
