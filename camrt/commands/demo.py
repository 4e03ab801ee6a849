"""camrt demo."""

from __future__ import annotations

import argparse


def demo(options: argparse.Namespace) -> int:
    from ..demo.run import run

    run(options.out, options.scenes, options.seed)
    return 0
