"""camrt explain."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..image_files import collect, read_list
from ..method_choice import layers_of, parse_method
from ..runtime.errors import InputError
from . import precision

HELP = "write overlays and maps of images"
QUIET = 60.0  # seconds between lines of progress, where there is no terminal
TERMINATED = 143


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", nargs="*", help="files, folders or glob patterns")
    parser.add_argument("--list", type=Path, metavar="FILE", help="a text file with a path in each line")
    parser.add_argument(
        "--out", type=Path, default=Path("explanations"), help="folder to write (default: explanations)"
    )
    parser.add_argument("--resume", action="store_true", help="leave out images whose results are complete")
    parser.add_argument("--method", default="winsor_cam", help="NAME or NAME:option=value,... (see 'camrt methods')")
    parser.add_argument(
        "--target",
        nargs="+",
        help="class numbers or names, or "
        "'not' for what lowers the score of a network with a single class (default: each image's top class)",
    )
    parser.add_argument("--percentile", type=float, help="Winsor-CAM's percentile, 0..100 (default: 90)")
    parser.add_argument("--layers", nargs="+", help="conv, last or names (default: the method's own)")
    parser.add_argument("--batch", type=int, default=8, help="images in one run (default: 8)")
    parser.add_argument("--backend", default="auto", help="see 'camrt info --backends' (default: auto)")
    precision.add_argument(parser)
    parser.add_argument("--jobs", type=int, help="threads that read and write files (default: one per core)")
    parser.add_argument("--shard", metavar="I/N", help="explain only every N-th image from the I-th on; I from 1")
    drawing = parser.add_argument_group("overlays")
    drawing.add_argument("--colormap", default="turbo", help="turbo (default), viridis, inferno or jet")
    drawing.add_argument("--opacity", type=float, default=0.5, help="of the colours, 0 to 1 (default: 0.5)")
    drawing.add_argument("--by-value", action="store_true", help="opacity times the map's value")
    drawing.add_argument(
        "--size",
        choices=("photo", "input"),
        default="photo",
        help="of the overlay: the photo's (default), or the network's input",
    )
    drawing.add_argument("--legend", action="store_true", help="add a strip with class, method and colours")
    drawing.add_argument("--no-overlay", action="store_true", help="write no PNG")
    drawing.add_argument("--no-maps", action="store_true", help="write no .npy")


def run(options: argparse.Namespace) -> int:
    """1 if images could not be explained."""
    from tqdm import tqdm

    from ..explaining import Drawing, explain_files
    from ..runtime.explainer import load

    shard = None if options.shard is None else _shard(options.shard)
    explainer = load(options.bundle, options.backend, max_batch=options.batch, precision=options.precision)
    method = parse_method(options.method)
    arguments: dict[str, Any] = dict(method.options)
    if options.percentile is not None:
        arguments["percentile"] = options.percentile
    layers = layers_of(options.layers)
    drawing = Drawing(options.opacity, options.colormap, options.size, options.by_value, options.legend)
    named = [*options.images, *(read_list(options.list) if options.list is not None else [])]
    if not named:
        raise InputError("name images, folders or patterns, or a --list")
    images = collect(named, skip=[options.out])
    total = len(images.share(shard))
    with _terminated_in_order(), tqdm(total=total, unit="image", disable=None) as bar:
        lines = _ProgressLines(total) if bar.disable else None
        summary = explain_files(
            explainer,
            images,
            options.out,
            method.name,
            _target(options.target),
            layers,
            options.batch,
            options.jobs,
            options.resume,
            not options.no_overlay,
            not options.no_maps,
            drawing,
            shard,
            progress=lines or bar.update,
            problem=lambda line: tqdm.write(f"camrt: {line}", file=sys.stderr),
            **arguments,
        )
    print(f"{summary.explained} of {total} images explained with {options.method}: {options.out}")
    if summary.finished_before:
        print(f"{summary.finished_before} were finished before")
    for heading, counts in (("not explained", summary.problems), ("skipped", summary.skipped)):
        if counts:
            print(f"{heading}: {_counted(counts)}")
    return 1 if summary.failed else 0


def _target(words: list[str] | None) -> Any:
    """As `explain` takes it."""
    if words is None:
        return None
    targets = [int(w) if w.removeprefix("-").isdecimal() else w for w in words]
    return targets[0] if len(targets) == 1 else targets


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InputError(f"--shard {text}: write 2/8 for the second of eight")
    return int(number), int(count)


def _counted(counts: Counter[str]) -> str:
    most = [f"{n} {reason}" for reason, n in counts.most_common(6)]
    rest = sum(n for _, n in counts.most_common()[6:])
    return ", ".join([*most, *([f"{rest} for other reasons"] if rest else [])])


class _ProgressLines:
    """Progress without a terminal: a line a minute."""

    def __init__(self, total: int) -> None:
        self._total, self._count, self._started = total, 0, time.monotonic()
        self._last = self._started

    def __call__(self, more: int) -> None:
        self._count += more
        now = time.monotonic()
        if now - self._last >= QUIET:
            self._last = now
            rate = self._count / (now - self._started)
            print(f"camrt: {self._count} of {self._total} images, {rate:.1f} a second", file=sys.stderr, flush=True)


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """SIGTERM ends the block as an exception does: what is finished is kept."""

    def end(*_: Any) -> None:
        print("camrt: terminated: finished results stay, --resume goes on", file=sys.stderr)
        raise SystemExit(TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
