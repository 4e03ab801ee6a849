"""The embedded default: the network in the package and the pictures it explains."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import camrt
from camrt.cli import main
from camrt.demo.run import BUNDLE, FIRST_SEED
from camrt.demo.scenes import CLASSES, SIZE, draw_scene
from camrt.verification.verify import verify


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, int, np.ndarray]]:
    return [draw_scene(FIRST_SEED + 5000 + i) for i in range(160)]


def test_scenes_depend_on_their_seed_alone() -> None:
    first, again, other = draw_scene(7), draw_scene(7), draw_scene(8)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first[0] != other[0]).any()
    picture, label, mask = first
    assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8 and mask.dtype == bool
    assert 0.02 < mask.mean() < 0.4 and 0 <= label < len(CLASSES)


def test_the_network_is_small_and_knows_its_classes(scenes: list) -> None:
    assert sum(f.stat().st_size for f in BUNDLE.iterdir()) <= 1.5e6
    explainer = camrt.load(BUNDLE)
    assert explainer.manifest.classes == CLASSES
    logits = explainer.classify([picture for picture, _, _ in scenes])
    right = np.mean(logits.argmax(axis=1) == [label for _, label, _ in scenes])
    assert right > 0.95


def test_maps_fall_on_the_objects(scenes: list) -> None:
    """Inside an object's mask the mean of its map is several times that outside, for both methods."""
    explainer = camrt.load(BUNDLE)
    pictures = [picture for picture, _, _ in scenes[:64]]
    labels = [label for _, label, _ in scenes[:64]]
    for method in ("winsor_cam", "grad_cam"):
        maps = explainer.explain(pictures, method, labels).normalized()
        ratios = [m[mask].mean() / max(m[~mask].mean(), 1e-6) for m, (_, _, mask) in zip(maps, scenes, strict=False)]
        assert np.median(ratios) > 3, (method, np.median(ratios))


def test_the_shipped_bundle_verifies() -> None:
    report = verify(BUNDLE)
    assert report.passed, [r for r in report.rows if not r.passed]


def test_demo_writes_a_picture_and_says_where(tmp_path, capsys) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--scenes", "3"]) == 0
    printed = capsys.readouterr().out
    assert str(out / "demo.png") in printed and "camrt export" in printed and "camrt explain" in printed
    picture = np.asarray(Image.open(out / "demo.png"))
    assert picture.shape[0] > 3 * SIZE and picture.shape[1] > 6 * SIZE and picture.std() > 30
    assert np.load(out / "scene-2-winsor-cam-p90.npy").shape == (SIZE, SIZE)
    assert main(["demo", "--scenes", "0"]) == 2
