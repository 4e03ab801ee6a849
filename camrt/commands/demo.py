"""camrt demo."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "explain drawn pictures with the network in the package"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("camrt-demo"), help="folder to write (default: camrt-demo)")
    parser.add_argument("--scenes", type=int, default=6, help="how many pictures (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="draws other pictures (default: 0)")


def run(options: argparse.Namespace) -> int:
    from ..demo.run import run

    run(options.out, options.scenes, options.seed)
    return 0
