"""camrt bench."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

from ..image_files import find_images
from ..method_choice import parse_method
from ..runtime.errors import InputError
from . import precision
from .plotting import check_plot

HELP = "measure latency, throughput, memory and stages of explanations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", nargs="*", help="files, folders or patterns (default: a random picture)")
    parser.add_argument(
        "--methods", nargs="+", default=["winsor_cam"], help="NAME or NAME:option=value,... (default: winsor_cam)"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="batch sizes (default: 1 4 16)")
    parser.add_argument("--runs", type=int, default=50, help="calls of each method, at most (default: 50)")
    parser.add_argument("--seconds", type=float, default=60, help="seconds for each batch size, roughly (default: 60)")
    parser.add_argument("--backend", default="auto", help="see 'camrt info --backends' (default: auto)")
    precision.add_argument(parser)
    parser.add_argument("--threads", type=int, help="of a run on the CPU (default: one per core)")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--plot", type=Path, help="a picture to write (.png, .svg, .pdf); needs matplotlib")


def run(options: argparse.Namespace) -> int:
    """Prints and writes tables. If interrupted, they hold what was measured until then (exit code 130)."""
    from tqdm import tqdm

    from .. import bench as benchmark
    from ..runtime.explainer import load

    _check(options)
    explainer = load(
        options.bundle,
        options.backend,
        max_batch=max(options.batches),
        precision=options.precision,
        threads=options.threads,
    )
    contenders = [parse_method(text) for text in dict.fromkeys(options.methods)]
    images = [str(p) for p in find_images(options.images)] or [benchmark.example(explainer)]
    batches = sorted(set(options.batches))
    measured, interrupted = benchmark.Measurements(), False
    steps = benchmark.measure(explainer, contenders, images, batches, options.runs, measured, options.seconds)
    total = 1 + 2 * len(contenders) + options.runs * len(batches)
    with tqdm(total=total, leave=False, disable=None) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a map of zeros takes the same time
        try:
            for step in steps:
                bar.set_description(step)
                bar.update()
        except KeyboardInterrupt:
            interrupted = True
    rows, machine = measured.rows(), benchmark.machine(explainer)
    print(f"{machine['model']}, {machine['precision']}, {machine['backend']}, {machine['processor']}")
    if measured.checked:
        print(measured.checked)
    if rows:
        print(
            "p50, quartiles, p99, images per second: from the network's input to the map. Stages: other calls, from a "
            "decoded picture to its map."
        )
        if measured.photo:
            print(
                f"bytes to PNG: from a photo's file ({measured.photo}) to its overlay's, of the same size, in memory."
            )
        print()
        print(benchmark.as_markdown(rows))
        print(
            ", ".join(
                f"{k.removesuffix('_mb').replace('_', ' ')} memory {v:.0f} MB" for k, v in measured.memory.items()
            )
        )
    report = {
        "machine": machine,
        "photo": measured.photo,
        "checked": measured.checked,
        "memory": measured.memory,
        "rows": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report | {"interrupted": interrupted}, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None and rows:
        benchmark.plot(rows, f"{machine['model']}, {machine['backend']}, {machine['processor']}", options.plot)
    if interrupted:
        print("camrt: interrupted", file=sys.stderr)
    return 130 if interrupted else 0


def _check(options: argparse.Namespace) -> None:
    """Checks options whose errors would otherwise appear only after minutes. InputError."""
    if min(options.batches) < 1 or options.runs < 1:
        raise InputError("--batches and --runs must be 1 or more")
    check_plot(options.plot)
    if options.out is not None and not options.out.resolve().parent.is_dir():
        raise InputError(f"{options.out}: no such folder")
