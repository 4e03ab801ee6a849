"""`camrt.compile`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..export.api import check_packages
from ..method_choice import MethodChoice


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
    from .build import compile_bundle

    return compile_bundle(bundle, out, method, layers, precision, batch)
