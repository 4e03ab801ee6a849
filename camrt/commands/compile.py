"""camrt compile."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..method_choice import layers_of

HELP = "write one ONNX file that gives finished maps, for engines where camrt is not installed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path, help="the file to write, NAME.onnx")
    parser.add_argument("--method", default="winsor_cam", help="NAME or NAME:option=value,... (default: winsor_cam)")
    parser.add_argument("--layers", nargs="+", help="conv, last or names (default: the method's own)")
    parser.add_argument("--precision", choices=("fp32", "fp16"), help="default: the first that the bundle has")
    parser.add_argument("--batch", help="a number of images, or free (default)", default="free")
    parser.add_argument(
        "--uint8",
        metavar="HxW",
        help="take uint8 pictures (batch, H, W, 3) of this size, or of any (free), and preprocess them in the file",
    )
    parser.add_argument(
        "--overlay",
        nargs="?",
        const="turbo",
        metavar="COLORMAP",
        help="also give the map drawn over the picture, uint8 (default: turbo)",
    )
    parser.add_argument("--opacity", type=float, default=0.5, help="of the overlay's colours (default: 0.5)")
    parser.add_argument("--masks", type=int, help="of score_cam_pp, score_cam: in one run of the network (default: 16)")
    parser.add_argument("--opset", type=int, help="17, or the bundle's own (default)")


def run(options: argparse.Namespace) -> int:
    from ..compiling.api import compile
    from ..runtime.errors import InputError

    if options.batch != "free" and not options.batch.isdecimal():
        raise InputError(f"--batch {options.batch}: use a number, or free")
    size = None if options.uint8 is None else re.fullmatch(r"(\d+)x(\d+)|free", options.uint8)
    if options.uint8 is not None and size is None:
        raise InputError(f"--uint8 {options.uint8}: use HEIGHTxWIDTH, for example 480x640, or free")
    path = compile(
        options.bundle,
        options.out,
        options.method,
        layers=layers_of(options.layers),
        precision=options.precision,
        batch=None if options.batch == "free" else int(options.batch),
        picture=None if size is None else "free" if size[1] is None else (int(size[1]), int(size[2])),
        overlay=options.overlay,
        opacity=options.opacity,
        masks=options.masks,
        opset=options.opset,
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0
