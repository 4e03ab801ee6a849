"""camrt verify."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..image_files import find_images
from .comparison_table import print_count, print_rows
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
    print(f"reference: {report.oracle}, in float64")
    print_rows(report.rows, options.all, pytorch=True)
    for name in report.own_backward:
        print(
            f"{name} has its own backward pass: before it, PyTorch's gradients follow that backward pass, but camrt's "
            "are the derivative of its forward pass"
        )
    print_count(report.rows)
    return 0 if report.passed else 1
