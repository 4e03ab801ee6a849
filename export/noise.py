"""How exactly the programs know the importance of layers: measured on images that differ in their last bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..runtime.backends.one_file import Run, open_file
from ..runtime.bundle.kinds import Kind
from ..runtime.bundle.manifest import Manifest, Noise, Tap
from .probes import as_pixels, last_bits, smooth_images

IMAGES = 4
COPIES = 4  # of each image
TYPICAL = 8  # a mean that is never above so many times its typical change is zero by construction
UNRELATED = 0.5  # relative L2 between the alphas of two copies, above which they are rounding noise alone
LEAST = 2.0**-22  # what another order of summation changes, as a fraction
MARGIN = 4  # how much larger other images and engines may make a mean that is zero by construction


def with_noise(folder: Path, manifest: Manifest, whole_numbers: bool) -> Manifest:
    """The manifest with the noise of every tap's alphas, in every precision of its layer_maps programs.

    folder: where the programs are. whole_numbers: whether the network takes pixels as whole numbers.
    """
    widest = [p for p in manifest.programs if p.kind == Kind.LAYER_MAPS and len(p.taps) == len(manifest.taps)]
    images = np.clip(smooth_images(manifest.input_shape, IMAGES), -1, 1)  # clipped: photos have flat areas, too
    if whole_numbers:
        images = as_pixels(images)
    runs = {
        p.precision: _alphas(open_file(folder / p.file), manifest.taps, manifest.num_classes, images) for p in widest
    }
    if not runs:
        return manifest
    exact = runs.get("float32", runs[widest[0].precision])
    measured = {precision: noise_of_layers(exact, alphas) for precision, alphas in runs.items()}
    taps = tuple(
        replace(tap, noise={precision: of_layers[i] for precision, of_layers in measured.items()})
        for i, tap in enumerate(manifest.taps)
    )
    return replace(manifest, taps=taps)


def _alphas(run: Run, taps: Sequence[Tap], classes: int, images: np.ndarray) -> list[np.ndarray]:
    """Per tap its alphas (images, COPIES, K) float64 of each image's top class; the first copy is the image itself."""
    rows = []
    for image in images:
        logits = run({"image": image[None], "seed": np.zeros((1, classes), np.float32)})["logits"]
        seed = np.eye(classes, dtype=np.float32)[logits.argmax(axis=1)]
        rows += [run({"image": copy, "seed": seed})["alphas"][0] for copy in last_bits(image[None], COPIES)]
    together = np.stack(rows).astype(np.float64).reshape(len(images), COPIES, -1)
    return np.split(together, np.cumsum([t.channels for t in taps])[:-1], axis=2)


def noise_of_layers(exact: Sequence[np.ndarray], alphas: Sequence[np.ndarray]) -> list[Noise]:
    """The noise of a program's layers, from alphas (images, COPIES, K) of each layer, and those of the most exact
    program.

    Twice what was measured, since a rectifier that rounding turns on or off is rare and changes much; and no layer less
    than the median layer, since such a rectifier in any layer changes all layers before it.
    """
    measured = [_noise(e, a) for e, a in zip(exact, alphas, strict=True)]
    mean, extreme = (max(LEAST, float(np.median([getattr(n, part) for n in measured]))) for part in ("mean", "extreme"))
    return [Noise(2 * max(n.mean, mean), 2 * max(n.extreme, extreme), n.zero) for n in measured]


def _noise(exact: np.ndarray, alphas: np.ndarray) -> Noise:
    """What was measured of one layer."""
    first = exact[:, :1]
    magnitude = np.abs(first).mean(axis=2)
    known = magnitude[:, 0] > 0
    if not known.any():
        return Noise(0.0, 0.0, 0.0)

    def relative(values: np.ndarray) -> np.ndarray:
        return np.abs(values)[known] / magnitude[known]

    change = relative((alphas - first).mean(axis=2))
    mean, extreme = float(change.max()), float(relative(np.abs(alphas - first).max(axis=2)).max())
    own = relative((exact - first).mean(axis=2))[:, 1:].max(axis=1)
    largest, typical = relative(exact.mean(axis=2)).max(), float(np.median(own))
    norms = np.linalg.norm(first[:, 0], axis=1)[known]
    apart = np.linalg.norm((exact - first)[known, 1:], axis=2).min(axis=1) / norms
    if (apart > UNRELATED).all():
        return Noise(mean, extreme, 1.0)
    if 0 < largest <= TYPICAL * typical:
        return Noise(mean, extreme, float(MARGIN * relative(alphas.mean(axis=2)).max()))
    return Noise(mean, extreme, 0.0)
