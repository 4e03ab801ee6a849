"""camrt verify."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..image_files import find_images
from .progress import Progress

HELP = "compare a bundle with PyTorch in float64; exit code 1 if it differs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("source", nargs="?", help="as for export (default: what the bundle records)")
    parser.add_argument("--images", nargs="+", help="files, folders or patterns (default: two random images)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--compiled", type=Path, metavar="FILE", help="compare this file of camrt compile instead")
    parser.add_argument("--all", action="store_true", help="print every row, not the worst of each kind")


def run(options: argparse.Namespace) -> int:
    from ..export.api import check_packages

    check_packages("torch", "onnx", "onnxscript")
    from ..runtime.bundle.reading import read_bundle
    from ..runtime.errors import InputError
    from ..runtime.images.image_batch import ImageBatch
    from ..verification.compiled import verify_compiled
    from ..verification.verify import verify

    images = None
    if options.compiled is not None and (options.images is not None or options.backend != "auto"):
        raise InputError("--compiled: ONNX Runtime runs the file on its own images: leave --images, --backend out")
    if options.images is not None:
        manifest = read_bundle(options.bundle).manifest
        images = ImageBatch(find_images(options.images), manifest).on_host()
    with Progress() as progress:
        if options.compiled is not None:
            report = verify_compiled(options.bundle, options.compiled, options.source, progress)
        else:
            report = verify(options.bundle, options.source, images, options.backend, progress)
    rows = report.rows if options.all else _worst(report.rows)
    print(f"reference: {report.oracle}, in float64")
    print(f"{'':5}{'program':24}{'compared':40}{'distance':>10}{'PyTorch':>10}{'limit':>10}")
    for row in rows:
        mark = "ok" if row.passed else "FAIL"
        figures = row.problem or f"{row.distance:10.1e}{row.torch_float32:10.1e}{row.limit:10.1e}"
        print(f"{mark:5}{row.program:24}{row.subject:40}{figures}")
    for name in report.own_backward:
        print(
            f"{name} has its own backward pass: before it, PyTorch's gradients follow that backward pass, but camrt's "
            "are the derivative of its forward pass"
        )
    failed = sum(not r.passed for r in report.rows)
    print(f"{len(report.rows) - failed} of {len(report.rows)} comparisons passed")
    return 0 if report.passed else 1


def _worst(rows: Sequence[Any]) -> list[Any]:
    """The failed rows, and for each program and kind of comparison the passed row that is nearest to its limit."""
    worst: dict[tuple[str, str], Any] = {}
    for row in rows:
        key = (row.program, row.subject.split()[0])
        if row.passed and (key not in worst or row.distance / row.limit > worst[key].distance / worst[key].limit):
            worst[key] = row
    return [*(r for r in rows if not r.passed), *worst.values()]
