"""The preprocessing options that `camrt export` and `camrt recipe` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..runtime.errors import InputError

if TYPE_CHECKING:
    from ..runtime.bundle.manifest import Preprocess

FIELDS = ("resize", "crop", "mean", "std", "interpolation", "fit", "fill", "channels")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options for preprocessing and for the probabilities."""
    parser.add_argument("--resize", type=int, nargs="+", metavar="N", help="shorter side, or height and width")
    parser.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="centre crop after resizing")
    parser.add_argument("--mean", type=float, nargs="+", help="per channel, of pixels in 0..1")
    parser.add_argument("--std", type=float, nargs="+", help="per channel, of pixels in 0..1")
    parser.add_argument("--interpolation", help="for resizing: bilinear (default), bicubic, nearest, lanczos")
    parser.add_argument(
        "--fit", help="stretch to height and width (default), or letterbox: fit inside and fill the rest"
    )
    parser.add_argument("--fill", type=int, help="grey value around a letterboxed picture, 0..255 (default: 114)")
    parser.add_argument("--channels", help="the network's channel order: RGB (default) or BGR")
    parser.add_argument(
        "--activation", help="the function that turns logits into probabilities: softmax, or sigmoid of each class"
    )


def preprocess_of(
    options: argparse.Namespace, known: Preprocess | None, shape: Sequence[int] | None
) -> Preprocess | None:
    """The recipe of the options; options that are not given come from `known`. None if there is neither.

    shape: the network's (C, H, W), the default size. InputError if mean, std or a size is missing.
    """
    from ..runtime.bundle.manifest import Preprocess

    if all(getattr(options, name) is None for name in FIELDS):
        return known
    if (options.mean is None or options.std is None) and known is None:
        raise InputError(
            "preprocessing needs both --mean and --std, e.g. --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
        )
    if options.resize is not None and len(options.resize) > 2:
        raise InputError(f"--resize {options.resize}: one number for the shorter side, or height and width")
    fit = options.fit or (known.fit if known else "stretch")
    resize: Any = options.resize
    if resize is None:
        whole = tuple(shape[1:]) if shape is not None else None
        resize = known.resize if known is not None and fit == known.fit else whole
    elif len(resize) == 1:
        resize = resize[0]
    if resize is None:
        raise InputError("preprocessing needs --resize HEIGHT WIDTH")
    crop = options.crop or (known.crop if known and options.resize is None and fit == known.fit else None)
    return Preprocess(
        resize=resize if isinstance(resize, int) else tuple(resize),
        mean=tuple(options.mean or known.mean),  # type: ignore[union-attr]
        std=tuple(options.std or known.std),  # type: ignore[union-attr]
        crop=None if crop is None else (crop[0], crop[1]),
        interpolation=options.interpolation or (known.interpolation if known else "bilinear"),
        fit=fit,
        fill=options.fill if options.fill is not None else (known.fill if known else 114),
        channels=options.channels or (known.channels if known else "RGB"),
    )
