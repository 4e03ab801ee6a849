"""`camrt.compile`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..export.api import check_packages
from ..method_choice import MethodChoice, parse_method
from ..runtime.bundle.kinds import Kind
from ..runtime.bundle.manifest import LARGEST_SIDE, PRECISIONS
from ..runtime.bundle.reading import read_bundle
from ..runtime.cams import method_named
from ..runtime.errors import InputError, UnknownName, near
from ..runtime.images.colormaps import COLORMAPS
from ..runtime.images.overlay import check_opacity
from ..runtime.layer_choice import chosen_layers


def compile(
    bundle: str | Path,
    out: str | Path,
    method: str | MethodChoice = "winsor_cam",
    layers: Sequence[str] | str | None = None,
    precision: str | None = None,
    batch: int | None = None,
    picture: tuple[int, int] | str | None = None,
    overlay: str | None = None,
    opacity: float = 0.5,
    masks: int | None = None,
    opset: int | None = None,
) -> Path:
    """Writes one ONNX file that explains images without camrt, and returns its path.

    Inputs: image (batch, C, H, W) float32, preprocessed; target (batch,) int64, -1 for the top class; for winsor_cam
    also percentile (batch,) float32. Outputs, float32: map (batch, H, W), logits (batch, classes) and layer_weights
    (batch, layers); not the last for a method without layers. A target that is no class gives a map and weights of
    zeros; percentiles are clamped to 0..100.

    method: a name, or NAME:option=value,...; the options are fixed in the file. layers: names, or a role ("conv",
    "last"), by default the method's own. precision: "fp32" or "fp16", by default the bundle's first. batch: fixes the
    number of images; by default it is free, if the bundle's is. picture: (height, width) or "free": the file takes
    `picture` (batch, height, width, 3) uint8, RGB, in the place of the image, and preprocesses it by the bundle's
    recipe. overlay: the name of a colour map: the file also gives `overlay` (batch, height, width, 3) uint8, the map
    over the picture, or over what the network saw. masks: how many masked images the network takes in one run, for
    score_cam_pp and score_cam; by default 16. opset: 17, or the bundle's own.
    Weights lie in the file, or past 2 GB beside it, in a file of the same name and .data.

    UnknownMethod for a method or option that one file cannot hold; UnknownLayer; UnknownName for a colour map;
    InputError; BundleError; CamrtError without the compile extra.
    """
    check_compiler()
    from . import build

    opened, choice = read_bundle(bundle), parse_method(method) if isinstance(method, str) else method
    manifest, compiled = opened.manifest, build.compiled_method(choice)
    if batch is not None and (batch < 1 or (manifest.batch == 1 and batch != 1)):
        raise InputError(f"batch {batch}: {'the bundle takes one image at a time' if batch > 1 else 'use 1 or more'}")
    if precision is not None and precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}: use {', '.join(PRECISIONS)}")
    if overlay is not None and overlay not in COLORMAPS:
        raise UnknownName(f"no colour map {overlay!r}{near(str(overlay), COLORMAPS)}")
    check_opacity(opacity)
    if overlay is None and opacity != 0.5:
        raise InputError(f"opacity {opacity}: it is that of an overlay, name its colour map")
    check_outside(Path(out), Path(bundle))
    _check_picture(picture)
    _check_runs(masks, choice, compiled.kind, manifest.batch)
    runs = build.masks_of(manifest) if masks is None else masks
    form = build.Form(picture, overlay, opacity, runs, batch, opset)
    names = chosen_layers(manifest, method_named(choice.name), layers)
    chosen = [t for t in manifest.taps if t.name in names]
    chosen_precision = opened.chosen_precision(precision)
    model = build.one_file(opened, compiled, choice, chosen, chosen_precision, form)
    build.describe(model, manifest, choice, chosen, chosen_precision, form)
    return build.write(model, Path(out))


def check_compiler() -> None:
    """CamrtError unless the packages are there with which files are compiled."""
    check_packages("onnx", "onnx_ir", "onnxscript", purpose="compile")


def check_outside(out: Path, bundle: Path) -> None:
    """InputError if a file or folder to write lies in the bundle's folder, whose files nobody may change."""
    if out.resolve().is_relative_to(bundle.resolve()):
        raise InputError(f"{out}: lies in the bundle, whose files must not change: write it elsewhere")


def _check_picture(picture: tuple[int, int] | str | None) -> None:
    if picture is None or picture == "free":
        return
    sides = picture if isinstance(picture, tuple | list) else ()
    if len(sides) != 2 or not all(isinstance(n, int) and 1 <= n <= LARGEST_SIDE for n in sides):
        raise InputError(f"picture {picture!r}: use (height, width), each 1 to {LARGEST_SIDE}, or 'free'")


def _check_runs(masks: int | None, choice: MethodChoice, kind: Kind, batch: str | int) -> None:
    """InputError if the method has no masks, or needs several runs at once of a bundle for one image at a time."""
    if kind == Kind.TRUNK and batch == 1:
        raise InputError(f"{choice.name} runs several activations at once, and the bundle takes one image at a time")
    if masks is None:
        return
    if kind != Kind.ACTIVATIONS:
        raise InputError(f"{choice.name} has no masks: leave masks out")
    if masks < 1 or (batch == 1 and masks != 1):
        raise InputError(f"masks {masks}: {'use 1 or more' if masks < 1 else 'the bundle takes one image at a time'}")
