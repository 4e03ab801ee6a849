"""camrt evaluate."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from ..image_files import collect
from ..method_choice import layers_of, parse_method
from ..runtime.errors import InputError
from . import precision
from .plotting import check_plot

HELP = "measure methods over a folder of images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path, help="images")
    parser.add_argument("--masks", type=Path, help="folder with object masks named like the images")
    parser.add_argument(
        "--targets",
        type=Path,
        metavar="FILE",
        help="labels.csv or .json: each image's class (default: the top one)",
    )
    parser.add_argument(
        "--methods", nargs="+", default=["winsor_cam", "grad_cam"], help="NAME or NAME:option=value,..."
    )
    parser.add_argument("--metrics", nargs="+", help="default: all that apply, but for the checks")
    parser.add_argument("--layers", nargs="+", help="conv, last or names, for all methods (default: each method's own)")
    parser.add_argument("--max-images", type=int, help="use only so many images, spread over the folder")
    parser.add_argument("--other-weights", type=Path, metavar="BUNDLE", help="the same network with random weights")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder to write (default: evaluation)")
    parser.add_argument("--plot", type=Path, help="a picture to write (.png, .svg, .pdf); needs matplotlib")
    parser.add_argument("--steps", type=int, default=32, help="steps of insertion and deletion (default: 32)")
    parser.add_argument("--threshold", type=float, default=0.5, help="threshold of the second IoU, 0..1 (default: 0.5)")
    parser.add_argument(
        "--void", type=int, help="mask value to leave out (default: 255 in palette pictures, else none)"
    )
    parser.add_argument("--backend", default="auto")
    precision.add_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Prints and writes a table; exit code 1 if an image could not be used."""
    from tqdm import tqdm

    from ..evaluation import Settings, evaluate
    from ..runtime.cams.sampled_error import LARGE_ERROR
    from ..runtime.explainer import load

    check_plot(options.plot)
    explainer = load(options.bundle, options.backend, precision=options.precision)
    skipped = [folder for folder in (options.masks, options.out) if folder is not None]
    images = {file: name.as_posix() for file, name in collect([str(options.folder)], skipped).names.items()}
    if not images:
        raise InputError(f"{options.folder}: no images there besides masks and results")
    images = _spread(images, options.max_images)
    methods = [parse_method(text) for text in dict.fromkeys(options.methods)]
    settings = Settings(
        options.masks,
        options.metrics,
        options.targets,
        layers_of(options.layers),
        options.steps,
        options.threshold,
        options.void,
        None if options.other_weights is None else load(options.other_weights, options.backend),
    )
    problems: list[str] = []
    with tqdm(total=len(images) * len(methods), unit="map", disable=None) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a map of zeros is measured like any map

        def advance() -> None:
            bar.update()

        def problem(line: str) -> None:
            problems.append(line)
            tqdm.write(f"camrt: {line}", file=sys.stderr)

        records = evaluate(explainer, images, methods, options.out, settings, advance, problem)
    if not records:
        raise InputError(f"{options.folder}: none of its {len(images)} images could be used")
    _write_tables(options, records, [m.text for m in methods])
    used = len({r["image"] for r in records})
    print(f"{used} of {len(images)} images; means with half of a 95 % bootstrap interval; best in bold: {options.out}")
    errors = [r["map_error"] for r in records if "map_error" in r]
    if inexact := sum(error > LARGE_ERROR for error in errors):
        said = f"{inexact} of {len(errors)} maps of the Score family are more than {LARGE_ERROR} off"
        print(f"{said} in {options.precision} (1 - cosine, estimated; at most {max(errors):.1g})")
    return 1 if problems else 0


def _spread(images: dict[Path, str], most: int | None) -> dict[Path, str]:
    """At most so many of them, at equal distances."""
    if most is None or most >= len(images):
        return images
    if most < 1:
        raise InputError(f"--max-images {most}: use 1 or more")
    items = list(images.items())
    return dict(items[i * len(items) // most] for i in range(most))


def _write_tables(options: argparse.Namespace, records: list[dict[str, Any]], methods: list[str]) -> None:
    from ..evaluation import as_csv, as_markdown, differences, differences_as_markdown, tabulate
    from ..evaluation.tables import draw

    table, paired = tabulate(records, methods), differences(records, methods)
    text = as_markdown(table)
    if paired:
        first = {pair: cells for pair, cells in paired.items() if pair[0] == methods[0]}
        text += "\nDifferences from the first method on the same images; bold where the interval leaves out 0:\n\n"
        text += differences_as_markdown(first)
    report = {method: {n: dataclasses.asdict(c) for n, c in cells.items()} for method, cells in table.items()}
    pairs = [
        {"method": one, "other": other, **{n: dataclasses.asdict(c) for n, c in cells.items()}}
        for (one, other), cells in paired.items()
    ]
    try:
        (options.out / "table.md").write_text(text, encoding="utf-8")
        (options.out / "table.csv").write_text(as_csv(table), encoding="utf-8")
        (options.out / "table.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (options.out / "differences.json").write_text(json.dumps(pairs, indent=1) + "\n", encoding="utf-8")
        if options.plot is not None:
            draw(table, options.plot)
    except OSError as error:
        raise InputError(f"{options.out}: cannot be written ({error.strerror})") from None
    print(text, end="")
