"""The option --precision of commands that explain."""

from __future__ import annotations

import argparse


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8", "bf16"),
        help="default: the first that the bundle has; int8 and bf16 are for the masked images of score_cam_pp and "
        "score_cam alone, all else is then float32",
    )
