"""camrt export."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..image_files import find_images
from ..method_choice import layers_of
from ..runtime.errors import CamrtError, InputError, first_line, warn
from . import class_names, preprocess_options
from .progress import Progress

if TYPE_CHECKING:
    import numpy as np

    from ..runtime.bundle.manifest import Manifest, Preprocess

HELP = "turn a trained model into a bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="package.module:callable, torchvision:NAME[:WEIGHTS], timm:NAME, hf:FOLDER, FILE.pt2 or FILE.onnx",
    )
    parser.add_argument("bundle", type=Path, help="folder to write, e.g. resnet50.camrt")
    parser.add_argument(
        "--input-shape", type=int, nargs=3, metavar=("C", "H", "W"), help="needed if the source does not record it"
    )
    parser.add_argument("--layers", nargs="+", default=["default"], help="conv, last, default (both) or names")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "fp16", "int8"),
        default=["fp32"],
        help="precision of the programs, one or several (default: fp32); int8 is for the masked images of score_cam_pp "
        "and score_cam alone, and all else is then float32",
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        metavar="PICTURES",
        help="for int8: files, folders or patterns, ten or more pictures of the kind to explain",
    )
    class_names.add_argument(parser)
    preprocess_options.add_arguments(parser)
    parser.add_argument("--output", help="the output, attribute or key that holds the logits, if there are several")
    parser.add_argument(
        "--shuffle-weights",
        type=int,
        metavar="SEED",
        help="export a copy whose weights are in random order, for 'camrt evaluate --other-weights'",
    )
    parser.add_argument("--name", help="the model's name in the manifest")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="store no references for 'camrt check'; computing them takes about as long as the export",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")


def run(options: argparse.Namespace) -> int:
    layers: Any = layers_of(options.layers)
    pictures = find_images(options.calibration or [])
    common: dict[str, Any] = {
        "layers": layers,
        "precision": options.precision,
        "calibration": _calibration(pictures) if pictures else None,
        "activation": options.activation,
        "name": options.name,
        "classes": None if options.classes is None else class_names.read_class_names(options.classes),
        "shuffle_weights": options.shuffle_weights,
        "overwrite": options.force,
        "complete": None if options.no_check else _with_references,
    }
    if options.source.lower().endswith(".onnx"):
        from ..export.api import export_onnx

        preprocess = preprocess_options.preprocess_of(options, None, options.input_shape)
        _check_pictures(pictures, preprocess)
        with Progress() as progress:
            path = export_onnx(
                options.source,
                options.bundle,
                input_shape=options.input_shape,
                output=options.output,
                preprocess=preprocess,
                progress=progress,
                **common,
            )
    else:
        path = _export_torch(options, common, pictures)
    _print_written(path)
    return 0


def _calibration(pictures: Sequence[Path]) -> Callable[[Manifest], np.ndarray]:
    """Makes the network's inputs of pictures, by the manifest's recipe."""
    from ..runtime.images.image_batch import ImageBatch

    return lambda manifest: ImageBatch(list(pictures), manifest).on_host()


def _check_pictures(pictures: Sequence[Path], preprocess: Preprocess | None) -> None:
    """InputError, before the export, for calibration pictures that it could not use after all else is done."""
    from ..runtime.images.opening import open_image

    if pictures and preprocess is None:
        raise InputError(
            "--calibration: pictures need preprocessing, e.g. --resize 224 224 --mean 0.485 0.456 0.406 --std 0.229 "
            "0.224 0.225"
        )
    for picture in pictures:
        open_image(picture, 3, str(picture))


def _export_torch(options: argparse.Namespace, common: dict[str, Any], pictures: Sequence[Path]) -> Path:
    from ..export.api import check_packages, export_model

    check_packages("torch", "onnx", "onnxscript")
    from ..export.pytorch.sources import open_source

    with Progress() as progress:
        progress(f"opening {options.source}")
        source = open_source(options.source)
        shape = options.input_shape or source.input_shape
        if shape is None:
            raise InputError(f"{options.source} does not record its input's size: pass e.g. --input-shape 3 224 224")
        same = source.input_shape is None or tuple(shape) == tuple(source.input_shape)
        common["name"] = common["name"] or source.name
        common["classes"] = common["classes"] or source.classes
        preprocess = preprocess_options.preprocess_of(options, source.preprocess if same else None, shape)
        _check_pictures(pictures, preprocess)
        return export_model(
            source.model,
            options.bundle,
            shape,
            preprocess=preprocess,
            output=options.output or source.output,
            source=source.spec,
            progress=progress,
            **common,
        )


def _with_references(folder: Path, manifest: Manifest, progress: Callable[[str], None]) -> Manifest:
    """Warns where they cannot be computed: the bundle is complete without them."""
    from ..verification.device.measure import store_references

    try:
        return store_references(folder, manifest, progress)
    except (CamrtError, ValueError, RuntimeError, MemoryError) as error:  # PyTorch's errors are RuntimeErrors
        warn(f"the bundle has no references for 'camrt check': {first_line(error)}")
        return manifest


def _print_written(path: Path) -> None:
    from ..runtime.bundle.reading import read_bundle

    manifest = read_bundle(path).manifest
    size = sum(f.stat().st_size for f in path.iterdir()) / 1e6
    print(f"{path}: {len(manifest.taps)} layers, {len(manifest.programs)} programs, {size:.1f} MB")
    if manifest.preprocess is None:
        print(f"It records no preprocessing, so it takes float32 arrays only: see camrt recipe {path} --help.")
    if manifest.assumes_softmax:
        print(f"Its probabilities are assumed to be a softmax. If not: camrt recipe {path} --activation sigmoid")
    check = "" if manifest.references is None else f"camrt check {path} on the device, "
    print(f"Next: camrt verify {path}, {check}camrt explain {path} IMAGE ...")
