"""camrt check."""

from __future__ import annotations

import argparse
from pathlib import Path

from .comparison_table import print_device_report
from .progress import Progress

HELP = "compare what this machine computes with what the bundle recorded at export; exit code 1 if it differs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "fp16", "int8"), help="default: all that the bundle has"
    )
    parser.add_argument("--max-batch", type=int, default=16, help="as for build (default: 16)")
    parser.add_argument("--mask-batch", type=int, help="as for build")
    parser.add_argument(
        "--programs", nargs="+", metavar="FILE", help="check these programs and what needs no others (default: all)"
    )
    parser.add_argument("--all", action="store_true", help="print every row, not the worst of each kind")


def run(options: argparse.Namespace) -> int:
    from ..verification.device.check import check

    with Progress() as progress:
        report = check(
            options.bundle,
            options.backend,
            options.precision,
            options.programs,
            options.max_batch,
            options.mask_batch,
            progress,
        )
    return print_device_report(report, options.all)
