"""The format of a bundle's manifest.json, which export writes and the runtime reads."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, InputError, first_line
from .kinds import KINDS, Kind

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"
LAYOUTS = ("NCHW", "NHWC", "tokens", "LND")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
FITS = ("stretch", "letterbox")
CHANNEL_ORDERS = ("RGB", "BGR")
ACTIVATIONS = ("softmax", "sigmoid")  # functions that turn logits into probabilities
MOST_ELEMENTS = 1 << 31  # the most elements of one tensor
LARGEST_SIDE = 1 << 14  # pixels, of a resized picture or of a crop
PRECISIONS = {"fp32": "float32", "fp16": "float16"}  # the user's name -> the name in the manifest
MASK_PRECISIONS = PRECISIONS | {"int8": "int8"}  # of programs that run masked images
RUN_PRECISIONS = MASK_PRECISIONS | {"bf16": "float32"}  # bf16: an engine's arithmetic, for masked images


@dataclass(frozen=True)
class Noise:
    """How exactly a program's alphas (the means over the grid of a layer's gradient) are known, as export measured it
    on images that differ in their last bits. Fractions of mean_k |alpha_k|.

    mean: the largest change of mean_k alpha_k; extreme: of a single alpha_k. An importance that is no larger is
    undetermined: rounding decides its sign. zero: a mean up to this counts as zero: 0 in ordinary layers; 1, that is
    any mean, where it is zero by construction, but for rounding; 2 where each alpha is, not only their mean.
    """

    mean: float
    extreme: float
    zero: float

    @property
    def alone(self) -> bool:
        """Whether every alpha is rounding noise."""
        return self.zero >= 2


UNMEASURED = Noise(0.0, 0.0, 1e-6)  # of bundles without measurements; float32 leaves about 1e-8 of a mean of zero


@dataclass(frozen=True)
class Tap:
    """A tensor (batch, channels, *grid) whose activation and gradient the programs expose.

    roles: "conv" (a convolution's output) and/or "last" (the last spatial block). batch_norm: "after" if a batch norm
    reads this output; "none" if not: the network has none there, or it was already folded into the convolution, and the
    tap is then the folded convolution's output. layout: the tensor's layout in the network: NCHW, NHWC, tokens (batch,
    prefix + height * width, channels), or LND (tokens first, then batch). Every program returns it as NCHW, without the
    prefix tokens. noise: by the program's precision ("float32", "float16").
    """

    name: str
    roles: tuple[str, ...]
    channels: int
    grid: tuple[int, int]
    batch_norm: str = "none"
    layout: str = "NCHW"
    prefix: int = 0
    noise: dict[str, Noise] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """One ONNX file. kind: what it computes (KINDS); taps: layers it computes it for; inputs, outputs: name -> shape.

    A shape's sizes are numbers or the symbols "batch" and "seeds". Outputs are float32 in every precision, inputs are
    input_dtype. precision: float32; float16, with convolutions and matrix products in float16, and other operators
    where it is safe; or int8, with convolutions and matrix products in int8.
    """

    kind: str
    file: str
    sha256: str
    taps: tuple[str, ...]
    inputs: dict[str, list[Any]]
    outputs: dict[str, list[Any]]
    precision: str = "float32"

    @property
    def input_dtype(self) -> str:
        return KINDS[self.kind].input_dtype

    def part(self, layers: Collection[str]) -> Program:
        """The same program without the outputs of other layers: see Backend.prunes."""
        kept = {n: shape for n, shape in self.outputs.items() if ":" not in n or n.partition(":")[2] in layers}
        return replace(self, taps=tuple(t for t in self.taps if t in layers), outputs=kept)

    def check_outputs(self, feeds: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray]) -> None:
        """BundleError if a run's outputs do not have the declared names, shapes and dtype. feeds: the run's inputs."""
        sizes = {"batch": 1} | {self.inputs[name][0]: len(array) for name, array in feeds.items()}  # a fixed batch is 1
        for name, declared in self.outputs.items():
            array, shape = out.get(name), tuple(sizes.get(d, d) for d in declared)
            if array is None or array.dtype != "float32" or array.shape != shape:
                description = "nothing" if array is None else f"{array.dtype} {array.shape}"
                raise BundleError(
                    f"{self.file}: {name!r} is {description}, not float32 {shape}: export the bundle again"
                )


@dataclass(frozen=True)
class Preprocess:
    """From an image file to the network's input: resize -> centre crop -> /255 -> (x - mean) / std.

    resize: (h, w), or one number for the shorter side; crop: (h, w) or None; mean, std: one number per channel, in the
    network's order. fit: "stretch" resizes to (h, w) whatever the picture's shape; "letterbox" resizes the picture to
    fit into (h, w) and fills the rest with the grey value `fill`. channels: "RGB" or "BGR", the network's order.
    """

    resize: tuple[int, int] | int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    fit: str = "stretch"
    fill: int = 114
    channels: str = "RGB"


@dataclass(frozen=True)
class Normalized:
    """For a network that normalises the image itself: the tensor (batch, *shape) that its first layer reads."""

    tensor: str
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Manifest:
    """Everything that the runtime must know to run and describe a bundle. Sizes are in elements, shapes without batch.

    final_activation: the Softmax, Sigmoid or LogSoftmax at the network's end that export removed. activation: the
    user's choice, "softmax" or "sigmoid", for probabilities. last_layer: the layer with the role "last", even if it is
    not tapped. normalized: the tensor that masks multiply, if it is not the image. seeds_share_image: whether one run
    takes one image with several seeds. references: file and sha256 of what `camrt check` compares with, if it is there.
    """

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
    activation: str | None = None
    last_layer: str | None = None
    normalized: Normalized | None = None
    classes: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    references: dict[str, Any] | None = None
    format: int = field(default=FORMAT)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @property
    def probability(self) -> str:
        """The function from logits to probabilities, "softmax" or "sigmoid".

        It is the user's choice (`activation`) if there is one; else sigmoid if the network ended in a Sigmoid or has
        one class; else softmax.
        """
        if self.activation is not None:
            return self.activation
        return "sigmoid" if self.final_activation == "Sigmoid" or self.num_classes == 1 else "softmax"

    @property
    def assumes_softmax(self) -> bool:
        """Whether neither the network nor its user says that its probabilities are a softmax."""
        return self.activation is None and self.final_activation is None and self.num_classes > 1

    @property
    def scored_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of what masks multiply: the image, or the tensor that the network's first layer reads."""
        return self.input_shape if self.normalized is None else self.normalized.shape

    def tap(self, name: str) -> Tap:
        return next(t for t in self.taps if t.name == name)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def parse(text: str, where: str) -> Manifest:
    """Parses the text of manifest.json. where: its path, for messages. BundleError if it is no valid manifest."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{where}: not readable as JSON ({first_line(error)[:200]}): export the bundle again"
        ) from None
    if not isinstance(raw, dict) or "format" not in raw:
        raise BundleError(f"{where}: not a camrt manifest: export the bundle again")
    if raw["format"] != FORMAT:
        written = str(raw["format"])[:20]
        raise BundleError(
            f"{where}: bundle format {written}, this camrt reads format {FORMAT}: export the bundle again"
        )
    try:
        taps = tuple(_tap(t) for t in raw.pop("taps"))
        programs = tuple(Program(**{**p, "taps": tuple(p["taps"])}) for p in raw.pop("programs"))
        preprocess = raw.pop("preprocess")
        if preprocess is not None:
            preprocess = Preprocess(**{k: _tuples(v) for k, v in preprocess.items()})
        normalized = raw.pop("normalized", None)
        if normalized is not None:
            normalized = Normalized(**{k: _tuples(v) for k, v in normalized.items()})
        manifest = Manifest(
            normalized=normalized,
            taps=taps,
            programs=programs,
            preprocess=preprocess,
            input_shape=_tuples(raw.pop("input_shape")),
            classes=_tuples(raw.pop("classes")),
            **raw,
        )
        _check(manifest)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, OverflowError) as error:
        message = first_line(error)[:200]
        raise BundleError(f"{where}: a field is missing or wrong ({message}): export the bundle again") from None
    return manifest


def _tap(raw: dict[str, Any]) -> Tap:
    fields = {name: _tuples(value) for name, value in raw.items()}
    noise = {precision: Noise(**values) for precision, values in fields.pop("noise", {}).items()}
    return Tap(**fields, noise=noise)


def _check(m: Manifest) -> None:
    """ValueError if a field has the wrong type or value, or parts of the manifest contradict each other."""
    _texts("name", m.name)
    _texts("tools", *_mapping("tools", m.tools).values())
    _mapping("source", m.source)
    if len(m.input_shape) != 3:
        raise ValueError(f"input_shape {m.input_shape}")
    _sizes("input_shape", *m.input_shape)
    _sizes("num_classes", m.num_classes)
    if m.batch not in ("dynamic", 1) or not isinstance(m.seeds_share_image, bool):
        raise ValueError("batch or seeds_share_image")
    if m.final_activation not in (None, "Softmax", "Sigmoid", "LogSoftmax"):
        raise ValueError(f"final_activation {m.final_activation!r:.100}")
    if m.activation not in (None, *ACTIVATIONS):
        raise ValueError(f"activation {m.activation!r:.100}")
    if m.last_layer is not None:
        _texts("last_layer", m.last_layer)
    if m.normalized is not None:
        _texts("normalized", m.normalized.tensor)
        if len(m.normalized.shape) != 3 or m.normalized.shape[1:] != m.input_shape[1:]:
            raise ValueError(f"normalized {m.normalized.shape}")
        _sizes("normalized", *m.normalized.shape)
    names = [t.name for t in m.taps]
    for tap in m.taps:
        _texts("taps", tap.name, *tap.roles)
        _sizes("taps", tap.channels, *tap.grid)
        _sizes("taps", tap.channels * math.prod(tap.grid))
        if len(tap.grid) != 2 or tap.layout not in LAYOUTS or not isinstance(tap.prefix, int) or tap.prefix < 0:
            raise ValueError(f"tap {tap.name!r:.100}")
        for precision, noise in tap.noise.items():
            numbers = (noise.mean, noise.extreme, noise.zero)
            known = precision in PRECISIONS.values() and all(isinstance(n, int | float) for n in numbers)
            if not known or not all(0 <= n < math.inf for n in numbers):
                raise ValueError(f"the noise of tap {tap.name!r:.100}")
    if len(set(names)) != len(names):
        raise ValueError("a tap is listed twice")
    for program in m.programs:
        _program(program, m)
    if not any(p.kind == Kind.CLASSIFY for p in m.programs):
        raise ValueError("no program 'classify'")
    _texts("weights", *(_mapping("weights", m.weights)[key] for key in ("file", "sha256")))
    files = [*(p.file for p in m.programs), m.weights["file"]]
    if m.references is not None:
        _texts("references", *(_mapping("references", m.references)[key] for key in ("file", "sha256")))
        files.append(m.references["file"])
    for file in files:
        if Path(file).name != file or file == ".." or not file.isprintable() or len(file) > 200:
            raise ValueError("a file lies outside the bundle, or its name is not a valid file name")
    if m.classes is not None:
        _texts("classes", *m.classes)
        if len(m.classes) != m.num_classes:
            raise ValueError(f"{len(m.classes)} class names for {m.num_classes} classes")
    if m.preprocess is not None:
        _recipe(m.preprocess, m.input_shape[0])


def _program(program: Program, m: Manifest) -> None:
    _texts("programs", program.kind, program.file, program.sha256, *program.taps)
    taps = [t for t in m.taps if t.name in program.taps]
    if [t.name for t in taps] != list(program.taps):
        raise ValueError("a program names a tap that is not listed, or not in the order of the list")
    if program.precision not in (MASK_PRECISIONS if program.kind == Kind.MASKED else PRECISIONS).values():
        raise ValueError(f"precision {program.precision!r:.100}")
    for tensors in (program.inputs, program.outputs):
        for name, shape in _mapping("programs", tensors).items():
            _texts("programs", name)
            well_formed = isinstance(shape, list) and all(d in ("batch", "seeds") or _is_size(d) for d in shape)
            if not well_formed or not shape or (name.startswith("grid:") and len(shape) != 3):
                raise ValueError(f"the shape of {name!r:.100}")
    inputs, outputs = (
        {n: tuple(s[1:]) for n, s in tensors.items() if not n.startswith(("context:", "grid:"))}
        for tensors in (program.inputs, program.outputs)
    )
    if not KINDS[program.kind].allows((inputs, outputs), m, taps):
        raise ValueError(f"{program.file!r:.100}: inputs or outputs are not those of kind {program.kind!r:.100}")


def _recipe(recipe: Preprocess, channels: int) -> None:
    resize, crop = recipe.resize, recipe.crop
    for part in (resize if isinstance(resize, tuple) else (resize, resize), crop or (1, 1)):
        if len(part) != 2 or not all(_is_size(n) and n <= LARGEST_SIDE for n in part):
            raise ValueError(f"preprocess: resize {resize}, crop {crop}")
    for numbers in (recipe.mean, recipe.std):
        if len(numbers) != channels or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise ValueError("preprocess: mean and std are one number per channel")
    if not all(recipe.std):
        raise ValueError("preprocess: std 0")
    problem = _odd_choice(recipe)
    if problem is not None:
        raise ValueError(problem)


def _odd_choice(recipe: Preprocess) -> str | None:
    """What is wrong with a recipe's interpolation, fit, channels or fill; None if nothing."""
    for part, choices in (("interpolation", INTERPOLATIONS), ("fit", FITS), ("channels", CHANNEL_ORDERS)):
        if getattr(recipe, part) not in choices:
            return f"preprocess {part} {getattr(recipe, part)!r:.100}: use {', '.join(choices)}"
    if not isinstance(recipe.fill, int) or not 0 <= recipe.fill <= 255:
        return f"preprocess fill {recipe.fill!r:.100}: use a grey value, 0 to 255"
    if recipe.fit == "letterbox" and (isinstance(recipe.resize, int) or recipe.crop is not None):
        return "preprocess fit 'letterbox' takes a resize of (height, width) and no crop"
    return None


def check_activation(activation: str | None, classes: int | None = None) -> None:
    """InputError if the activation is unknown, or is softmax for a network with one class."""
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(f"activation {activation!r}: use {' or '.join(ACTIVATIONS)}")
    if activation == "softmax" and classes == 1:
        raise InputError("the network gives one score, whose softmax is 1 for every image: use the activation sigmoid")


def check_recipe(preprocess: Preprocess | None, shape: Sequence[int]) -> None:
    """InputError if the recipe cannot produce the network's input; shape: (C, H, W)."""
    if preprocess is None:
        return
    for part in ("mean", "std"):
        if len(getattr(preprocess, part)) != shape[0]:
            raise InputError(f"preprocess {part} has {len(getattr(preprocess, part))} numbers for {shape[0]} channels")
    if any(s == 0 for s in preprocess.std):
        raise InputError("preprocess std holds a zero")
    resize = preprocess.resize if isinstance(preprocess.resize, tuple) else (preprocess.resize,) * 2
    if any(not isinstance(n, int) or n < 1 for n in resize):
        raise InputError(f"preprocess resize {preprocess.resize}: sizes are whole numbers from 1")
    if preprocess.crop is not None and any(c > r for c, r in zip(preprocess.crop, resize, strict=True)):
        raise InputError(f"preprocess crop {preprocess.crop} is larger than resize {preprocess.resize}")
    problem = _odd_choice(preprocess)
    if problem is not None:
        raise InputError(problem)
    size = preprocess.crop if preprocess.crop is not None else preprocess.resize
    if isinstance(size, int) or tuple(size) != tuple(shape[1:]):
        raise InputError(f"preprocess gives {size}, the network takes {shape[1:]}: set crop, or resize without a crop")


def _texts(where: str, *values: Any) -> None:
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: must be text")


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a mapping")
    return value


def _sizes(where: str, *values: Any) -> None:
    if not all(map(_is_size, values)) or math.prod(values) > MOST_ELEMENTS:
        raise ValueError(f"{where}: sizes must be whole numbers from 1, at most 2^31 elements together")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_ELEMENTS
