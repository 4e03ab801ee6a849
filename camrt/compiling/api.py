"""`camrt.compile`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..export.api import check_packages
from ..method_choice import MethodChoice, parse_method
from ..runtime.bundle.manifest import PRECISIONS
from ..runtime.bundle.reading import read_bundle
from ..runtime.cams import method_named
from ..runtime.errors import InputError
from ..runtime.layer_choice import chosen_layers


def compile(
    bundle: str | Path,
    out: str | Path,
    method: str | MethodChoice = "winsor_cam",
    layers: Sequence[str] | str | None = None,
    precision: str | None = None,
    batch: int | None = None,
) -> Path:
    """Writes one ONNX file that explains images without camrt, and returns its path.

    Inputs: image (batch, C, H, W) float32, preprocessed; target (batch,) int64, -1 for the top class; for winsor_cam
    also percentile (batch,) float32. Outputs, all float32: map (batch, H, W), logits (batch, classes) and layer_weights
    (batch, layers); not the last for a method without layers. method: a name, or NAME:option=value,...; the options are
    fixed in the file. layers: names, or a role ("conv", "last"), by default the method's own. precision: "fp32" or
    "fp16", by default the bundle's first. batch: fixes the number of images; by default it is free, if the bundle's is.
    Weights lie in the file, or past 2 GB beside it, in a file of the same name and .data.

    UnknownMethod for a method or option that one file cannot hold; UnknownLayer; InputError; BundleError; CamrtError
    without the export extra.
    """
    check_packages("onnx", "onnxscript")
    from . import build

    opened, choice = read_bundle(bundle), parse_method(method) if isinstance(method, str) else method
    manifest, compiled = opened.manifest, build.compiled_method(choice)
    if batch is not None and (batch < 1 or (manifest.batch == 1 and batch != 1)):
        raise InputError(f"batch {batch}: {'the bundle takes one image at a time' if batch > 1 else 'use 1 or more'}")
    if precision is not None and precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}: use {', '.join(PRECISIONS)}")
    names = chosen_layers(manifest, method_named(choice.name), layers)
    program = opened.program(compiled.kind, names, opened.chosen_precision(precision))
    model = build.continued(opened, program, compiled, choice, [t for t in manifest.taps if t.name in names])
    build.describe(model, manifest, choice, names, program.precision)
    if batch is not None:
        build.rename_size(model.graph, "batch", batch)
    return build.write(model, Path(out))
