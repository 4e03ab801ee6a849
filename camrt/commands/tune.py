"""camrt tune."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import precision
from .progress import Progress

HELP = "find how many masked images a run should have on this CPU, and keep it for later loads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto", help="see 'camrt info --backends' (default: auto)")
    precision.add_argument(parser)
    parser.add_argument("--threads", type=int, help="of a run on the CPU (default: one per core)")


def run(options: argparse.Namespace) -> int:
    """Prints the time of each size."""
    from ..runtime.explainer import load
    from ..runtime.tuning import tune

    explainer = load(options.bundle, options.backend, precision=options.precision, threads=options.threads)
    with Progress() as progress:
        found = tune(explainer, progress)
    best = min(found, key=lambda size: found[size])
    for size, milliseconds in found.items():
        print(f"{size:3d} masked images in a run: {milliseconds:8.3f} ms each{'  kept' if size == best else ''}")
    return 0
