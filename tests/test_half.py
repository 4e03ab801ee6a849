"""float16 on the network with real weights: DESIGN's limits for maps, and the top class, on every photo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import DATA, mobilenet, needs_data

import camrt
from camrt.kernels import minmax
from camrt.runtime.bundle.reading import read_bundle
from camrt.runtime.explainer import Explainer
from camrt.verification.distances import cosine_distance
from camrt.verification.interpreted import InterpretedBackend

PREPROCESS = camrt.Preprocess(resize=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
METHODS = {
    "winsor_cam": [{"percentile": p, "layer_aggregation": a} for p in (0, 50, 90, 100) for a in ("mean", "max")],
    "integrative_cam": [{}],
    "grad_cam": [{}],
    "layer_cam": [{}],
    "full_grad": [{}],
}

pytestmark = needs_data


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "mobilenet.camrt"
    return camrt.export_model(mobilenet(), path, (3, 224, 224), precision=["fp32", "fp16"], preprocess=PREPROCESS)


@pytest.fixture(scope="module")
def photos() -> list[str]:
    return [str(p) for p in sorted((DATA / "photos").iterdir())]


def explainers(bundle: Path) -> tuple[Explainer, list[Explainer]]:
    """In float32; and in float16, by ONNX Runtime and rounding after every operator."""
    half = [
        camrt.load(bundle, precision="fp16"),
        Explainer(read_bundle(bundle), InterpretedBackend(rounding=True), precision="fp16"),
    ]
    return camrt.load(bundle, precision="fp32"), half


def test_maps_in_float16(bundle: Path, photos: list[str]) -> None:
    single, halves = explainers(bundle)
    for method, options in METHODS.items():
        for option in options:
            want = single.explain(photos, method, **option)
            for half in halves:
                got = half.explain(photos, method, **option)
                np.testing.assert_array_equal(got.target, want.target)
                assert cosine_distance(minmax(got.maps), minmax(want.maps)) < 1e-3, (method, option)


def test_maps_of_masked_images_in_float16(bundle: Path, photos: list[str]) -> None:
    single, (half, _) = explainers(bundle)
    some = photos[2], photos[-1]
    for method in ("score_cam_pp", "score_cam", "recipro_cam"):
        want, got = single.explain(some, method), half.explain(some, method)
        np.testing.assert_array_equal(got.target, want.target)
        assert cosine_distance(got.maps, want.maps) < 1e-3, method


def test_the_top_class_in_float16(bundle: Path, photos: list[str]) -> None:
    """Unchanged; where it is another one, the two were tied within what float16 can tell."""
    single, halves = explainers(bundle)
    want = single.classify(photos)
    for half in halves:
        got = half.classify(photos).argmax(axis=1)
        short = want.max(axis=1) - want[np.arange(len(want)), got]
        assert (short == 0).sum() >= len(photos) - 1
        assert (short < 0.01 * np.ptp(want, axis=1)).all()
