"""camrt recipe, and the options of a recipe that camrt export takes as well."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..runtime.errors import InputError

if TYPE_CHECKING:
    from ..runtime.bundle.manifest import Preprocess

_FIELDS = ("resize", "crop", "mean", "std", "interpolation", "fit", "fill", "channels")


def recipe(options: argparse.Namespace) -> int:
    """Shows a bundle's recipe, or changes it and shows what it is then."""
    from dataclasses import replace

    from ..runtime.bundle.manifest import check_activation
    from ..runtime.bundle.reading import read_bundle, write_manifest

    bundle = read_bundle(options.bundle)
    manifest = bundle.manifest
    changed = replace(
        manifest,
        preprocess=preprocess_of(options, manifest.preprocess, manifest.input_shape),
        activation=options.activation or manifest.activation,
    )
    check_activation(changed.activation, changed.num_classes)
    if changed != manifest:
        write_manifest(bundle.path, changed)
    print(f"probabilities  {said_of_scores(changed)}")
    if changed.preprocess is None:
        print("preprocessing  none: float32 arrays (batch, channels, height, width) only")
    else:
        for name in _FIELDS:
            print(f"{name:14} {getattr(changed.preprocess, name)}")
    return 0


def said_of_scores(manifest: Any) -> str:
    """What makes probabilities of the logits, and who says so."""
    if manifest.activation is not None:
        return f"{manifest.probability}, as was given"
    if manifest.final_activation is not None:
        return f"{manifest.probability}, the network's own {manifest.final_activation}"
    return f"{manifest.probability}, assumed: --activation says otherwise"


def preprocess_of(
    options: argparse.Namespace, known: Preprocess | None, shape: Sequence[int] | None
) -> Preprocess | None:
    """The recipe that the options give, completed by what is known; None if neither says anything. InputError."""
    from ..runtime.bundle.manifest import Preprocess

    if all(getattr(options, name) is None for name in _FIELDS):
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
