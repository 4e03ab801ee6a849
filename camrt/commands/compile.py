"""camrt compile."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write one ONNX file that gives finished maps, for engines where camrt is not installed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path, help="the file to write, NAME.onnx")
    parser.add_argument("--method", default="winsor_cam", help="NAME or NAME:option=value,... (default: winsor_cam)")
    parser.add_argument("--layers", nargs="+", help="conv, last or names (default: the method's own)")
    parser.add_argument("--precision", choices=("fp32", "fp16"), help="default: the first that the bundle has")
    parser.add_argument("--batch", help="a number of images, or free (default)", default="free")


def run(options: argparse.Namespace) -> int:
    from ..compiling.api import compile
    from ..runtime.errors import InputError

    if options.batch != "free" and not options.batch.isdigit():
        raise InputError(f"--batch {options.batch}: use a number, or free")
    layers = options.layers[0] if options.layers in (["conv"], ["last"]) else options.layers
    batch = None if options.batch == "free" else int(options.batch)
    path = compile(options.bundle, options.out, options.method, layers, options.precision, batch)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0
