"""camrt evaluate."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from pathlib import Path

from ..image_files import find_images
from ..method_choice import parse_method
from ..runtime.errors import InputError

HELP = "measure methods over a folder of images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path, help="images")
    parser.add_argument("--masks", type=Path, help="folder with object masks named like the images")
    parser.add_argument(
        "--methods", nargs="+", default=["winsor_cam", "grad_cam"], help="NAME or NAME:option=value,..."
    )
    parser.add_argument("--metrics", nargs="+", help="default: all that apply")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder to write (default: evaluation)")
    parser.add_argument("--steps", type=int, default=32, help="steps of insertion and deletion (default: 32)")
    parser.add_argument("--threshold", type=float, default=0.5, help="threshold of the second IoU, 0..1 (default: 0.5)")
    parser.add_argument(
        "--void", type=int, help="mask value to leave out (default: 255 in palette pictures, else none)"
    )
    parser.add_argument("--backend", default="auto")


def run(options: argparse.Namespace) -> int:
    """Prints and writes a table; exit code 1 if an image could not be used."""
    from tqdm import tqdm

    from ..evaluate import as_markdown, tabulate
    from ..evaluate import evaluate as measure
    from ..runtime.explainer import load

    explainer = load(options.bundle, options.backend)
    inside = [folder.resolve() for folder in (options.masks, options.out) if folder is not None]
    paths = find_images([str(options.folder)])
    images = [p for p in paths if not any(p.resolve().is_relative_to(folder) for folder in inside)]
    if not images:
        raise InputError(f"{options.folder}: no images there besides masks and results")
    methods = [parse_method(text) for text in dict.fromkeys(options.methods)]
    problems: list[str] = []
    with tqdm(total=len(images) * len(methods), unit="map", disable=None) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a map of zeros is measured like any map

        def advance() -> None:
            bar.update()

        def problem(line: str) -> None:
            problems.append(line)
            tqdm.write(f"camrt: {line}", file=sys.stderr)

        records = measure(
            explainer,
            images,
            methods,
            options.out,
            options.masks,
            options.metrics,
            options.steps,
            options.threshold,
            options.void,
            progress=advance,
            problem=problem,
        )
    if not records:
        raise InputError(f"{options.folder}: none of its {len(images)} images could be used")
    table = tabulate(records, methods)
    text = as_markdown(table)
    report = {method: {n: dataclasses.asdict(c) for n, c in cells.items()} for method, cells in table.items()}
    try:
        (options.out / "table.md").write_text(text, encoding="utf-8")
        (options.out / "table.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{options.out}: cannot be written ({error.strerror})") from None
    print(text, end="")
    used = len({r["image"] for r in records})
    print(f"{used} of {len(images)} images; means with half of a 95 % bootstrap interval; best in bold: {options.out}")
    return 1 if problems else 0
