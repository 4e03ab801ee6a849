"""camrt serve."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path

from . import precision

HELP = "explain pictures over HTTP"
TOKEN = "CAMRT_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundles", nargs="+", help="BUNDLE or NAME=BUNDLE; the name is that of the folder")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8080, help="default: 8080; 0 takes a free one")
    parser.add_argument("--backend", default="auto", help="see 'camrt info --backends' (default: auto)")
    precision.add_argument(parser)
    parser.add_argument("--threads", type=int, help="CPU threads of a run of the network (default: one per core)")
    parser.add_argument("--page", type=Path, help="folder of camrt page, to be served at /")
    parser.add_argument("--batch", type=int, help="the most images in one run of the network (default: 8)")
    parser.add_argument("--wait", type=float, help="seconds that a run waits for more images (default: 0.002)")
    parser.add_argument("--queue", type=int, help="the most images that wait; more are refused with 429 (default: 256)")
    parser.add_argument("--body", type=int, help="the most bytes of a request (default: 32000000)")
    parser.add_argument("--pixels", type=int, help="the most pixels of a picture (default: 50000000)")
    parser.add_argument("--images", type=int, help="the most images of a request (default: 64)")
    parser.add_argument("--timeout", type=float, help="seconds that a request may take (default: 60)")
    parser.add_argument("--keep", type=float, help="seconds that an explanation can be retuned (default: 300)")
    parser.add_argument("--kept", type=int, help="how many explanations can be retuned (default: 256)")
    parser.add_argument("--origins", nargs="+", help="web pages of other hosts that may ask (CORS; default: none)")
    parser.epilog = f"The environment variable {TOKEN} sets a token that every request must bear."


def run(options: argparse.Namespace) -> int:
    from ..runtime.errors import InputError
    from ..serve.settings import Settings

    given = {f.name: getattr(options, f.name) for f in fields(Settings) if getattr(options, f.name, None) is not None}
    for name, value in given.items():
        if not isinstance(value, list) and value <= 0 and name != "wait":
            raise InputError(f"--{name} {value}: use a number above 0")
    if "origins" in given:
        given["origins"] = tuple(given["origins"])
    settings = Settings(token=os.environ.get(TOKEN) or None, **given)
    from ..serve.running import serve

    serve(
        options.bundles,
        settings,
        options.host,
        options.port,
        options.backend,
        options.precision,
        options.threads,
        options.page,
    )
    return 0
