"""The contract between export and runtime: what a bundle's manifest.json says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import BundleError

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"
PRECISIONS = {"fp32": "float32", "fp16": "float16"}  # what users say -> what programs record


@dataclass(frozen=True)
class Tap:
    """A tensor (batch, channels, *grid) whose activation and gradient the programs expose.

    roles: "conv" (a convolution's output) and/or "last" (the last spatial block). batch_norm: "after" where the network
    normalises this output next, "none" where no batch norm follows in the graph: it has none, or it came folded into
    the convolution, and then the tap is the folded convolution's output. layout: how the network holds it (NCHW, NHWC, or
    tokens: (batch, prefix + height * width, channels)); it leaves every program as NCHW, without the prefix.
    """

    name: str
    roles: tuple[str, ...]
    channels: int
    grid: tuple[int, int]
    batch_norm: str = "none"
    layout: str = "NCHW"
    prefix: int = 0


@dataclass(frozen=True)
class Program:
    """One ONNX file: what it computes (`kind`), for which taps, and its interface, which is float32 in any precision.

    precision: float32, or float16, where convolutions and matrix products are in float16 and the rest where that is safe.
    """

    kind: str
    file: str
    sha256: str
    taps: tuple[str, ...]
    inputs: dict[str, list[Any]]
    outputs: dict[str, list[Any]]
    precision: str = "float32"


@dataclass(frozen=True)
class Preprocess:
    """From an image file to the network's input: RGB -> resize -> centre crop -> /255 -> (x - mean) / std.

    resize: (h, w), or one number for the shorter side; crop: (h, w) or None; mean, std: one number per channel.
    """

    resize: tuple[int, int] | int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: tuple[int, int] | None = None
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime must know to run a bundle and to say what it is. Sizes are in elements, shapes without batch."""

    name: str
    source: dict[str, Any]
    tools: dict[str, str]
    input_shape: tuple[int, int, int]
    num_classes: int
    taps: tuple[Tap, ...]
    programs: tuple[Program, ...]
    weights: dict[str, Any]
    batch: str | int = "dynamic"
    seeds_share_image: bool = True
    final_activation: str | None = None
    classes: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    format: int = field(default=FORMAT)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def tap(self, name: str) -> Tap:
        return next(t for t in self.taps if t.name == name)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def parse(text: str, where: str) -> Manifest:
    """Reads manifest.json. BundleError on anything that is not a manifest of this format."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise BundleError(f"{where}: not readable as JSON ({error}): export the bundle again") from None
    if not isinstance(raw, dict) or "format" not in raw:
        raise BundleError(f"{where}: not a camrt manifest: export the bundle again")
    if raw["format"] != FORMAT:
        raise BundleError(
            f"{where}: bundle format {raw['format']}, this camrt reads format {FORMAT}: export the bundle again"
        )
    try:
        taps = tuple(Tap(**{k: _tuples(v) for k, v in t.items()}) for t in raw.pop("taps"))
        programs = tuple(Program(**{**p, "taps": tuple(p["taps"])}) for p in raw.pop("programs"))
        preprocess = raw.pop("preprocess")
        if preprocess is not None:
            preprocess = Preprocess(**{k: _tuples(v) for k, v in preprocess.items()})
        manifest = Manifest(
            taps=taps,
            programs=programs,
            preprocess=preprocess,
            input_shape=_tuples(raw.pop("input_shape")),
            classes=_tuples(raw.pop("classes")),
            **raw,
        )
        _check(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleError(f"{where}: a field is missing or wrong ({error}): export the bundle again") from None
    return manifest


def _check(m: Manifest) -> None:
    """ValueError if parts of the manifest contradict each other."""
    names = [t.name for t in m.taps]
    if len(m.input_shape) != 3 or not all(isinstance(n, int) and n > 0 for n in m.input_shape):
        raise ValueError(f"input_shape {m.input_shape}")
    if len(set(names)) != len(names):
        raise ValueError("a tap is listed twice")
    if any(t not in names for p in m.programs for t in p.taps):
        raise ValueError("a program names a tap that is not listed")
    if any(Path(f).name != f for f in [p.file for p in m.programs] + [m.weights["file"]]):
        raise ValueError("a file lies outside the bundle")
    if m.classes is not None and len(m.classes) != m.num_classes:
        raise ValueError(f"{len(m.classes)} class names for {m.num_classes} classes")
