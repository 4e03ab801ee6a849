"""What a bundle stores for `camrt check`: small inputs, and what the network gives for them in float64."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels import minmax
from ...runtime.bundle.kinds import Kind
from ...runtime.bundle.manifest import ACTIVATIONS, Manifest, Program, Tap
from ...runtime.bundle.reading import Bundle
from ...runtime.errors import BundleError, CamrtError

FILE = "references.npz"
SUMS = 64  # signed sums of a tensor
POSITIONS = 24  # samples of a map along each side
# of layers, as programs call them
TENSORS = ("activation", "gradient", "alphas", "maps", "signed_maps", "magnitudes")
_STEP, _LOWEST = 1 / 32, -4.0  # a pixel q is the number q / 32 - 4, which float32 holds exactly
_LARGEST = 1 << 28  # bytes of all arrays


@dataclass(frozen=True)
class Case:
    """A call of `Explainer.explain` with the stored images and seeds, and its maps.

    layers: as for `explain`; retune: options of the `retune` that follows, None without one; images: how many of the
    images it takes. limits: by precision, the largest distance that passes. samples (images, n): of each map after
    min-max, on a grid that covers it; sums (images, SUMS): of all of it.
    """

    method: str
    options: dict[str, Any]
    layers: list[str] | None
    retune: dict[str, Any] | None
    images: int
    limits: dict[str, float]
    samples: np.ndarray
    sums: np.ndarray

    @property
    def label(self) -> str:
        options = self.options | (self.retune or {})
        said = [v if isinstance(v, str) else f"{name} {v:.4g}" for name, v in options.items()]
        return " ".join([self.method, *said])


@dataclass(frozen=True)
class References:
    """pixels (B, C, H, W) uint8: the images, see `images`. seeds, logits (B, classes) float32.
    probability: the function from logits to probabilities ("softmax", "sigmoid") that the maps were computed with;
    `camrt recipe` may have changed it since.

    tensors: of each kind in TENSORS the signed sums (layers, B, SUMS) float32 of every layer; limits: the largest
    relative L2 distance that passes, (layers,), and under "logits" (1,); of programs that are not float32, under "FILE
    KIND" and "FILE logits", that of what they give from what the network gives in float64.
    """

    pixels: np.ndarray
    seeds: np.ndarray
    logits: np.ndarray
    probability: str
    tensors: dict[str, np.ndarray]
    limits: dict[str, np.ndarray]
    cases: tuple[Case, ...]

    @property
    def images(self) -> np.ndarray:
        """The network's input (B, C, H, W) float32."""
        return as_images(self.pixels)

    def save(self, path: Path) -> str:
        """Writes a file and returns its SHA-256."""
        arrays: dict[str, Any] = {"pixels": self.pixels, "seeds": self.seeds, "logits": self.logits}
        arrays |= {f"sums {kind}": sums for kind, sums in self.tensors.items()}
        arrays |= {f"limits {kind}": limits for kind, limits in self.limits.items()}
        said = []
        for i, case in enumerate(self.cases):
            facts = asdict(case)
            arrays[f"samples {i}"], arrays[f"sums {i}"] = facts.pop("samples"), facts.pop("sums")
            said.append(facts)
        arrays["cases"], arrays["probability"] = np.array(json.dumps(said)), np.array(self.probability)
        np.savez_compressed(path, **arrays)
        return hashlib.sha256(path.read_bytes()).hexdigest()


def read_references(bundle: Bundle) -> References:
    """CamrtError if the bundle has none; BundleError if the file is damaged, or does not fit the bundle."""
    said = bundle.manifest.references
    if said is None:
        raise CamrtError(
            f"{bundle.path}: has no references to compare with: they come with 'camrt export', where PyTorch is "
            "installed"
        )
    path = bundle.path / said["file"]
    try:
        if path.is_symlink() or not path.is_file():
            raise ValueError("it is not there")
        if hashlib.sha256(path.read_bytes()).hexdigest() != said["sha256"]:
            raise ValueError("its contents are not what was exported")
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _LARGEST:
                raise ValueError("its arrays are too large")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        references = _of_arrays(arrays)
        _check_shapes(references, bundle.manifest)
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path}: damaged ({error}): export the bundle again") from None
    return references


def _of_arrays(arrays: dict[str, np.ndarray]) -> References:
    cases = [
        Case(**facts, samples=arrays[f"samples {i}"], sums=arrays[f"sums {i}"])
        for i, facts in enumerate(json.loads(str(arrays["cases"])))
    ]
    return References(
        arrays["pixels"],
        arrays["seeds"],
        arrays["logits"],
        str(arrays["probability"]),
        {kind: arrays[f"sums {kind}"] for kind in TENSORS},
        {name.removeprefix("limits "): array for name, array in arrays.items() if name.startswith("limits ")},
        tuple(cases),
    )


def _check_shapes(references: References, manifest: Manifest) -> None:
    """ValueError if an array does not fit the bundle."""
    count, layers = len(references.pixels), len(manifest.taps)
    if references.probability not in ACTIVATIONS:
        raise ValueError(f"the probability {references.probability!r:.100}")
    shapes: list[tuple[str, np.ndarray, tuple[int, ...], str]] = [
        ("pixels", references.pixels, (count, *manifest.input_shape), "uint8")
    ]
    for name in ("seeds", "logits"):
        shapes.append((name, getattr(references, name), (count, manifest.num_classes), "float32"))
    shapes.append(("limits of logits", references.limits["logits"], (1,), "float64"))
    for program in manifest.programs:
        if program.precision != "float32":
            for name, length in limits_of(program):
                shapes.append((f"limits of {name}", references.limits[name], (length,), "float64"))
    for kind in TENSORS:
        shapes.append((kind, references.tensors[kind], (layers, count, SUMS), "float32"))
        shapes.append((f"limits of {kind}", references.limits[kind], (layers,), "float64"))
    points = len(positions(manifest.input_shape[1])) * len(positions(manifest.input_shape[2]))
    for case in references.cases:
        known = isinstance(case.method, str) and isinstance(case.images, int) and 1 <= case.images <= count
        arguments = isinstance(case.options, dict) and isinstance(case.retune, dict | None)
        layers = case.layers is None or (isinstance(case.layers, list) and all(isinstance(n, str) for n in case.layers))
        taken = {"images", "method", "target", "layers"} & set(case.options if arguments else ())
        if not known or not arguments or not layers or taken:
            raise ValueError(f"the case {case.method!r:.100}")
        shapes.append((case.label, case.samples, (case.images, points), "float32"))
        shapes.append((case.label, case.sums, (case.images, SUMS), "float32"))
        if not all(isinstance(case.limits[precision], float) for precision in ("fp32", "fp16")):
            raise ValueError(f"the limits of {case.label!r:.100}")
    for name, array, shape, dtype in shapes:
        if array.shape != shape or array.dtype != dtype or not shape[0]:
            raise ValueError(f"{name!r:.100} is {array.dtype}{list(array.shape)}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name!r:.100} holds NaN or infinity")
        if name.startswith("limits of ") and not (array > 0).all():
            raise ValueError(f"{name!r:.100} are not above 0")
    if not references.cases:
        raise ValueError("no method's map is there")


def limits_of(program: Program) -> list[tuple[str, int]]:
    """(name in `limits`, how many numbers) of a program that is not float32."""
    kinds = [kind for kind in ("activation", "gradient") if f"{kind}:{(*program.taps, '')[0]}" in program.outputs]
    if "maps" in program.outputs:
        kinds += ["signed_maps", "magnitudes"] if program.kind == Kind.SIGNED_MAPS else ["alphas", "maps"]
    return [(f"{program.file} logits", 1), *((f"{program.file} {kind}", len(program.taps)) for kind in kinds)]


def of_layers(program: Program, taps: Sequence[Tap], out: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Of every kind in TENSORS that a program gives: its array (S, ...) of each of the program's layers, `taps`."""
    found = {
        kind: [out[f"{kind}:{t.name}"] for t in taps]
        for kind in ("activation", "gradient")
        if taps and f"{kind}:{taps[0].name}" in out
    }
    if "activation" in out:
        found["activation"] = [out["activation"]]
    if "alphas" in out:
        found["alphas"] = _parts(out["alphas"], [t.channels for t in taps])
    if "maps" in out:
        kind = "signed_maps" if program.kind == Kind.SIGNED_MAPS else "maps"
        found[kind] = _parts(out["maps"], [t.grid[0] * t.grid[1] for t in taps])
    if "magnitudes" in out:
        found["magnitudes"] = _parts(out["magnitudes"], [1] * len(taps))
    return found


def _parts(joined: np.ndarray, widths: Sequence[int]) -> list[np.ndarray]:
    return np.split(joined, np.cumsum(widths)[:-1], axis=1)


def as_images(pixels: np.ndarray) -> np.ndarray:
    """The numbers (float32) that pixels (uint8) stand for."""
    return pixels * np.float32(_STEP) + np.float32(_LOWEST)


def as_pixels(images: np.ndarray) -> np.ndarray:
    """The nearest pixels (uint8) to images whose numbers lie between -4 and 3.97."""
    return np.clip(np.round((images - _LOWEST) / _STEP), 0, 255).astype(np.uint8)


def signed_sums(tensor: np.ndarray) -> np.ndarray:
    """(B, ...) -> (B, SUMS) float64: sums of every 64th number, each with a random sign that depends on its place.

    Whatever a tensor is, the expected sum of their squares is its sum of squares (a count sketch; Charikar, Chen and
    Farach-Colton, 2002). So the distance of two tensors is about that of their sums, to within about 12 %.
    """
    rows = tensor.reshape(len(tensor), -1).astype(np.float64)
    count = rows.shape[1]
    padded = np.zeros((len(rows), -(-count // SUMS) * SUMS))
    padded[:, :count] = rows * _signs(count)
    return padded.reshape(len(rows), -1, SUMS).sum(axis=1)


def _signs(count: int) -> np.ndarray:
    """The bits of a generator whose stream is the same everywhere, as -1 and 1."""
    words = np.random.PCG64(0).random_raw(-(-count // 64)).astype("<u8")
    return np.unpackbits(words.view(np.uint8))[:count] * 2.0 - 1


def positions(length: int) -> np.ndarray:
    """Of the samples along a side; the first and the last position are among them."""
    return np.unique(np.linspace(0, length - 1, min(length, POSITIONS)).round().astype(int))


def sampled(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(samples, signed sums) of maps (B, H, W) after min-max, float64."""
    maps = minmax(maps)
    some = maps[:, positions(maps.shape[1])][:, :, positions(maps.shape[2])]
    return some.reshape(len(maps), -1).astype(np.float64), signed_sums(maps)


def map_distance(got: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray], size: Sequence[int]) -> float:
    """The largest difference of samples, or the root mean square difference of the whole maps if that is more."""
    rms = np.linalg.norm(got[1] - want[1], axis=1) / np.sqrt(size[0] * size[1])
    return max(float(np.abs(got[0] - want[0]).max()), float(rms.max()))
