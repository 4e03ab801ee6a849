"""camrt map."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..method_choice import layers_of, parse_method
from . import precision

HELP = "explain images by the million into Parquet files, on this machine or on a Ray cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "source", nargs="+", help="pictures, folders, patterns, .parquet or .tar files; local, s3://, gs:// or abfs://"
    )
    parser.add_argument("--out", required=True, help="folder to write, local or as the sources")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    parser.add_argument("--method", default="winsor_cam", help="NAME or NAME:option=value,... (default: winsor_cam)")
    parser.add_argument("--target", help="a class number or name (default: each image's top class)")
    parser.add_argument("--layers", nargs="+", help="conv, last or names (default: the method's own)")
    parser.add_argument("--map", choices=("float16", "float32", "png", "none"), default="float16", help="(float16)")
    parser.add_argument("--overlay", action="store_true", help="also keep the map over the photo, as PNG")
    parser.add_argument("--part", type=int, default=256, help="images of one file (default: 256)")
    precision.add_argument(parser)
    parser.add_argument("--backend", default="auto", help="see 'camrt info --backends' (default: auto)")
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS"),
        help="of a Ray cluster, or local: Ray on this machine (default: RAY_ADDRESS; else processes, without Ray)",
    )
    parser.add_argument(
        "--actors", type=int, help="explainers (default: one for each GPU; else for each core but one in four)"
    )
    parser.add_argument("--batch", type=int, default=16, help="images in one run (default: 16)")
    parser.add_argument("--threads", type=int, default=1, help="of one run on the CPU (default: 1)")
    parser.add_argument("--readers", type=int, default=2, help="threads of an actor that read pictures (default: 2)")
    parser.add_argument("--allow-failures", action="store_true", help="exit with 0 although images were not explained")
    parser.add_argument("--price", type=float, help="of one machine for an hour, for the cost of a million images")


def run(options: argparse.Namespace) -> int:
    """1 if images could not be explained."""
    from tqdm import tqdm

    from ..mapping.rows import Wanted
    from ..mapping.run import Means, Summary, map_images
    from ..questions import class_number
    from ..runtime.bundle.reading import read_bundle
    from ..runtime.cams.sampled_error import LARGE_ERROR
    from ..runtime.errors import InputError

    if options.price is not None and not 0 <= options.price < 1e9:
        raise InputError(f"price {options.price}: of a machine for an hour, 0 or more")
    choice = parse_method(options.method)
    target = class_number(options.target, read_bundle(options.bundle).manifest)
    layers = layers_of(options.layers)
    wanted = Wanted(choice.name, choice.options, layers, target, options.map, options.overlay)
    means = Means(
        options.backend, options.actors, options.batch, options.threads, options.readers, options.address or None
    )
    bar: Any = None

    def progress(summary: Summary, parts: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=parts, initial=summary.parts_before, unit="part")
        bar.update(summary.parts_before + summary.parts - bar.n)
        bar.set_postfix_str(f"{summary.images} images, {summary.images_per_second:.1f} a second")

    try:
        summary = map_images(
            options.bundle,
            options.source,
            options.out,
            wanted,
            means,
            options.precision,
            options.part,
            options.resume,
            progress,
        )
    finally:
        if bar is not None:
            bar.close()
    if summary.parts_before:
        print(f"{summary.parts_before} parts with {summary.before} images were there before")
    if summary.parts:
        said = f"{summary.workers} explainer{'s' if summary.workers > 1 else ''} on {summary.machines} machine"
        done, rate = summary.images - summary.before, summary.images_per_second
        print(f"{done} images in {summary.seconds:.1f} s, {rate:.1f} a second, {said}{'s' * (summary.machines > 1)}")
        if options.price is not None:
            print(f"{summary.cost_per_million(options.price):.2f} for a million images, at {options.price} an hour")
    if summary.inexact:
        said = f"{summary.inexact} maps are more than {LARGE_ERROR} off in {options.precision}"
        print(f"{said} (1 - cosine, estimated): see map_error")
    for reason, count in summary.problems.most_common():
        print(f"{count} not explained: {reason}")
    return 1 if summary.failed and not options.allow_failures else 0
