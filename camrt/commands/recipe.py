"""camrt recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import class_names, preprocess_options

HELP = "show or set a bundle's preprocessing and class names, without a new export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    class_names.add_argument(parser)
    preprocess_options.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Changes a bundle's recipe as the options say, then shows it."""
    from dataclasses import replace

    from ..runtime.bundle.manifest import check_activation
    from ..runtime.bundle.reading import read_bundle, write_manifest
    from ..runtime.errors import InputError

    bundle = read_bundle(options.bundle)
    manifest = bundle.manifest
    changed = replace(
        manifest,
        preprocess=preprocess_options.preprocess_of(options, manifest.preprocess, manifest.input_shape),
        activation=options.activation or manifest.activation,
        classes=manifest.classes if options.classes is None else tuple(class_names.read_class_names(options.classes)),
    )
    if changed.classes is not None and len(changed.classes) != changed.num_classes:
        raise InputError(
            f"{options.classes}: {len(changed.classes)} names, the network has {changed.num_classes} classes"
        )
    check_activation(changed.activation, changed.num_classes)
    if changed != manifest:
        write_manifest(bundle.path, changed)
    print(f"probabilities  {said_of_scores(changed)}")
    names = changed.classes or ()
    print(f"classes        {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}{'' if names else 'numbers only'}")
    if changed.preprocess is None:
        print("preprocessing  none: float32 arrays (batch, channels, height, width) only")
    else:
        for name in preprocess_options.FIELDS:
            print(f"{name:14} {getattr(changed.preprocess, name)}")
    return 0


def said_of_scores(manifest: Any) -> str:
    """The function from logits to probabilities, and who chose it: the user, the network, or nobody (assumed)."""
    if manifest.activation is not None:
        return f"{manifest.probability}, set by --activation"
    if manifest.final_activation is not None:
        return f"{manifest.probability}, the network's own {manifest.final_activation}"
    return f"{manifest.probability}, assumed: --activation sets another"
