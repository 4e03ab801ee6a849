"""camrt export, camrt info."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import InputError
from .stages import Stages

if TYPE_CHECKING:
    from ..runtime.manifest import Preprocess


def export(options: argparse.Namespace) -> int:
    layers: Any = options.layers[0] if options.layers in (["conv"], ["last"], ["default"]) else options.layers
    common: dict[str, Any] = {
        "layers": layers,
        "precision": options.precision,
        "name": options.name,
        "classes": None if options.classes is None else _class_names(options.classes),
        "overwrite": options.force,
    }
    if options.source.lower().endswith(".onnx"):
        from ..export.api import export_onnx

        with Stages() as stages:
            path = export_onnx(
                options.source,
                options.bundle,
                input_shape=options.input_shape,
                output=options.output,
                preprocess=_preprocess(options, None, options.input_shape),
                progress=stages,
                **common,
            )
    else:
        path = _export_torch(options, common)
    _print_written(path)
    return 0


def _export_torch(options: argparse.Namespace, common: dict[str, Any]) -> Path:
    from ..export.api import check_packages, export_model

    check_packages("torch", "onnx", "onnxscript")
    from ..export.sources import open_source

    with Stages() as stages:
        stages(f"opening {options.source}")
        source = open_source(options.source)
        shape = options.input_shape or source.input_shape
        if shape is None:
            raise InputError(f"{options.source} does not say its input's size: pass --input-shape 3 224 224")
        same = source.input_shape is None or tuple(shape) == tuple(source.input_shape)
        common["name"] = common["name"] or source.name
        common["classes"] = common["classes"] or source.classes
        return export_model(
            source.model,
            options.bundle,
            shape,
            preprocess=_preprocess(options, source.preprocess if same else None, shape),
            source=source.spec,
            progress=stages,
            **common,
        )


def _print_written(path: Path) -> None:
    from ..runtime.bundle import read_bundle

    manifest = read_bundle(path).manifest
    size = sum(f.stat().st_size for f in path.iterdir()) / 1e6
    print(f"{path}: {len(manifest.taps)} layers, {len(manifest.programs)} programs, {size:.1f} MB")
    if manifest.preprocess is None:
        print("It records no preprocessing, so it takes float32 arrays only: see --resize, --crop, --mean, --std.")
    print(f"Next: camrt verify {path}, camrt explain {path} IMAGE ...")


def _class_names(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no class names ({error})") from None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InputError(f"{path}: expected a JSON list of names, or a text file with one a line")
    return names


def _preprocess(
    options: argparse.Namespace, known: Preprocess | None, shape: Sequence[int] | None
) -> Preprocess | None:
    """The recipe that the options give, completed by what the source knows; None if neither says anything."""
    from ..runtime.manifest import Preprocess

    given = [options.resize, options.crop, options.mean, options.std, options.interpolation]
    if all(g is None for g in given):
        return known
    if (options.mean is None or options.std is None) and known is None:
        raise InputError(
            "preprocessing needs both --mean and --std, e.g. --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
        )
    if options.resize is not None and len(options.resize) > 2:
        raise InputError(f"--resize {options.resize}: one number for the shorter side, or height and width")
    resize: Any = options.resize
    if resize is None:
        resize = known.resize if known is not None else (tuple(shape[1:]) if shape is not None else None)
    elif len(resize) == 1:
        resize = resize[0]
    if resize is None:
        raise InputError("preprocessing needs --resize HEIGHT WIDTH")
    return Preprocess(
        resize=resize if isinstance(resize, int) else tuple(resize),
        mean=tuple(options.mean or known.mean),  # type: ignore[union-attr]
        std=tuple(options.std or known.std),  # type: ignore[union-attr]
        crop=tuple(options.crop) if options.crop else (known.crop if known and options.resize is None else None),
        interpolation=options.interpolation or (known.interpolation if known else "bilinear"),
    )
