"""camrt page."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

HELP = "make a static page that explains pictures in the reader's own browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a bundle; or with --serve a page that was made before")
    parser.add_argument("--out", type=Path, default=Path("site"), help="folder to write (default: site)")
    parser.add_argument("--methods", nargs="+", help="NAME or NAME:option=value,... (default: those of gradients)")
    parser.add_argument("--examples", nargs="+", default=[], help="pictures that the page offers")
    parser.add_argument("--precision", choices=("fp32", "fp16"), help="default: the first that the bundle has")
    parser.add_argument("--runtime", type=Path, help="folder of onnxruntime-web's package (default: npm fetches it)")
    parser.add_argument(
        "--serve",
        nargs="?",
        const="127.0.0.1:8000",
        metavar="HOST:PORT",
        help="then serve the page (default: 127.0.0.1:8000, this machine alone)",
    )


def run(options: argparse.Namespace) -> int:
    from ..page.site import is_page, make_page
    from .progress import Progress

    address = None if options.serve is None else _address(options.serve)
    if address is not None and is_page(options.bundle):
        _serve(options.bundle, address)
        return 0
    with Progress() as progress:
        page = make_page(
            options.bundle,
            options.out,
            options.methods,
            options.examples,
            options.precision,
            options.runtime,
            progress,
        )
    size = sum(f.stat().st_size for f in page.rglob("*") if f.is_file())
    print(f"{page}: {size / 1e6:.0f} MB, any web server can serve it (browsers do not run it from a file:// address)")
    if address is None:
        print(f"On this machine: camrt page {shlex.quote(str(page))} --serve")
    else:
        _serve(page, address)
    return 0


def _serve(page: Path, address: tuple[str, int]) -> None:
    """Until it is interrupted."""
    from ..page.serving import server

    with server(page, *address) as running:
        host, port = str(running.server_address[0]), running.server_address[1]
        print(f"Open http://{f'[{host}]' if ':' in host else host}:{port}/ ; stop with Ctrl-C", flush=True)
        running.serve_forever()


def _address(text: str) -> tuple[str, int]:
    from ..runtime.errors import InputError

    host, _, port = text.rpartition(":")
    if not port.isdecimal():
        raise InputError(f"--serve {text}: use HOST:PORT, or PORT")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)
