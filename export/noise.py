"""How exactly the programs know the importance of layers: measured on images that differ in their last bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..runtime.backends.one_file import Run, open_file
from ..runtime.bundle.kinds import Kind
from ..runtime.bundle.manifest import Manifest, Noise, Program, Tap
from .probes import as_pixels, last_bits, smooth_images

IMAGES = 8
COPIES = 3  # of each image
CANCELLED = 1e-4  # a sum that is no more than this beside the sum of its magnitudes is rounding of zero
LEAST = 2.0**-22  # what another order of summation changes, as a fraction


def with_noise(folder: Path, manifest: Manifest, whole_numbers: bool) -> Manifest:
    """The manifest with the noise of every tap's alphas, in every precision of its layer_maps programs.

    folder: where the programs are. whole_numbers: whether the network takes pixels as whole numbers.
    """
    widest = [p for p in manifest.programs if p.kind == Kind.LAYER_MAPS and len(p.taps) == len(manifest.taps)]
    if not widest:
        return manifest
    images = np.clip(smooth_images(manifest.input_shape, IMAGES), -1, 1)  # clipped: photos have flat areas, too
    if whole_numbers:
        images = as_pixels(images)
    classes = manifest.num_classes
    runs = {p.precision: _alphas(open_file(folder / p.file), manifest.taps, classes, images) for p in widest}
    exact = runs.get("float32", runs[widest[0].precision])
    gradients = [p for p in manifest.programs if p.kind == Kind.GRADIENTS and len(p.taps) == len(manifest.taps)]
    zero = _zero_by_construction(folder, gradients, manifest, images[:2])
    measured = {precision: noise_of_layers(exact, alphas, zero) for precision, alphas in runs.items()}
    taps = tuple(
        replace(tap, noise={precision: of_layers[i] for precision, of_layers in measured.items()})
        for i, tap in enumerate(manifest.taps)
    )
    return replace(manifest, taps=taps)


def _alphas(run: Run, taps: Sequence[Tap], classes: int, images: np.ndarray) -> list[np.ndarray]:
    """Per tap its alphas (images, COPIES, K) float64 of each image's top class; the first copy is the image itself."""
    rows = []
    for image in images:
        first, *others = last_bits(image[None], COPIES)
        out = run({"image": first, "seed": np.zeros((1, classes), np.float32)})  # zeros: of the top class
        seed = np.eye(classes, dtype=np.float32)[out["logits"].argmax(axis=1)]
        rows += [out["alphas"][0], *(run({"image": copy, "seed": seed})["alphas"][0] for copy in others)]
    together = np.stack(rows).astype(np.float64).reshape(len(images), COPIES, -1)
    return np.split(together, np.cumsum([t.channels for t in taps])[:-1], axis=2)


def _zero_by_construction(
    folder: Path, programs: Sequence[Program], manifest: Manifest, images: np.ndarray
) -> list[str | None]:
    """Per tap "alphas" if its gradient sums to zero over the grid, as in front of an instance norm; "mean" if it does
    over grid and channels, as in front of a layer norm; else None. A gradient that is zero everywhere says nothing.
    """
    if not programs:
        return [None] * len(manifest.taps)
    program = min(programs, key=lambda p: p.precision != "float32")
    run, seed = open_file(folder / program.file), np.zeros((1, manifest.num_classes), np.float32)
    over_grid, over_all = (np.zeros(len(manifest.taps)) for _ in range(2))
    for image in images:
        out = run({"image": image[None], "seed": seed})
        for i, tap in enumerate(manifest.taps):
            gradient = out[f"gradient:{tap.name}"].astype(np.float64)
            magnitude = np.abs(gradient).mean()
            if magnitude == 0:
                over_grid[i] = over_all[i] = np.inf
                continue
            over_grid[i] = max(over_grid[i], np.abs(gradient.mean(axis=(2, 3))).max() / magnitude)
            over_all[i] = max(over_all[i], np.abs(gradient.mean()) / magnitude)
    return [
        "alphas" if grid <= CANCELLED else "mean" if every <= CANCELLED / 10 else None
        for grid, every in zip(over_grid, over_all, strict=True)
    ]


def noise_of_layers(
    exact: Sequence[np.ndarray], alphas: Sequence[np.ndarray], zero: Sequence[str | None]
) -> list[Noise]:
    """The noise of a program's layers, from alphas (images, COPIES, K) of each layer, and those of the most exact
    program. zero: per layer what of its alphas is zero by construction: "alphas", "mean" or None.

    Twice what was measured, since a rectifier that rounding turns on or off is rare and changes much; and no layer less
    than the median layer, since such a rectifier in any layer changes all layers before it.
    """
    measured = [_noise(e, a, z) for e, a, z in zip(exact, alphas, zero, strict=True)]
    parts = [(n.mean, n.extreme) for n in measured if not n.alone] or [(0.0, 0.0)]
    mean, extreme = (max(LEAST, float(np.median(values))) for values in zip(*parts, strict=True))
    return [Noise(2 * max(n.mean, mean), 2 * max(n.extreme, extreme), n.zero) for n in measured]


def _noise(exact: np.ndarray, alphas: np.ndarray, zero: str | None) -> Noise:
    """What was measured of one layer."""
    first = exact[:, :1]
    magnitude = np.abs(first).mean(axis=2)
    known = magnitude[:, 0] > 0
    if not known.any():
        return Noise(0.0, 0.0, 0.0)

    def relative(values: np.ndarray) -> float:
        return float((np.abs(values)[known] / magnitude[known]).max())

    changes = relative((alphas - first).mean(axis=2)), relative(np.abs(alphas - first).max(axis=2))
    return Noise(*changes, {"alphas": 2.0, "mean": 1.0, None: 0.0}[zero])
