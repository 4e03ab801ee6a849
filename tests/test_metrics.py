"""Metrics on cases worked by hand, and beside public implementations."""

from __future__ import annotations

import importlib
import math
import warnings

import numpy as np
import pytest
import torch
from support import import_torchvision

from camrt.export.probes import smooth_images
from camrt.runtime import metrics

RNG = np.random.default_rng(0)


# ---- faithfulness


def test_average_drop_and_increase() -> None:
    """0.8 -> 0.6 drops by a quarter; 0.5 -> 0.5 neither; 0.2 -> 0.3 rises and has no drop; 0.4 -> 0 loses all."""
    before, after = np.array([0.8, 0.5, 0.2, 0.4]), np.array([0.6, 0.5, 0.3, 0.0])
    np.testing.assert_allclose(metrics.average_drop(before, after), [25, 0, 0, 100])
    np.testing.assert_array_equal(metrics.increase_in_confidence(before, after), [0, 0, 100, 0])


def test_win_percentage_shares_ties() -> None:
    drops = np.array([[10.0, 5, 5], [0, 1, 2], [3, 3, 3]])
    np.testing.assert_allclose(metrics.win_percentage(drops), [[0, 50, 50], [100, 0, 0], [100 / 3] * 3])


def test_area_under_is_the_trapezoid_rule() -> None:
    assert metrics.area_under(np.array([1.0, 0.5, 0.0])) == pytest.approx(0.5)
    assert metrics.area_under(np.array([0.0, 1, 1, 1])) == pytest.approx(5 / 6)


def test_exchanged_takes_the_most_relevant_first() -> None:
    image = np.arange(1.0, 5).reshape(1, 2, 2)
    scaled = np.array([[0.1, 0.9], [0.5, 0.5]])
    steps = metrics.exchanged(image, np.zeros_like(image), scaled, 4)
    assert steps.dtype == np.float32 and steps.shape == (5, 1, 2, 2)
    np.testing.assert_array_equal(
        steps.reshape(5, 4), [[1, 2, 3, 4], [1, 0, 3, 4], [1, 0, 0, 4], [1, 0, 0, 0], [0, 0, 0, 0]]
    )


def test_deletion_and_insertion_of_a_known_score() -> None:
    """The score is the top-left pixel's value: the map that points there loses it at once, and gains it at once."""
    image = np.zeros((1, 8, 8), np.float32)
    image[0, 0, 0] = 1
    right, wrong = np.zeros((8, 8)), np.ones((8, 8))
    right[0, 0], wrong[0, 0] = 1, 0

    def score(batch: np.ndarray) -> np.ndarray:
        return batch[:, 0, 0, 0]

    assert metrics.deletion(image, right, score, 64) == pytest.approx(0.5 / 64)
    assert metrics.deletion(image, wrong, score, 64) == pytest.approx(1 - 0.5 / 64)
    start = float(metrics.blurred(image)[0, 0, 0])
    assert 0 < start < 0.35
    assert metrics.insertion(image, right, score, 64) == pytest.approx(1 - (1 - start) * 0.5 / 64)


def test_blur_is_a_gaussian_of_eleven_pixels() -> None:
    impulse = np.zeros((1, 31, 31), np.float32)
    impulse[0, 15, 15] = 1
    line = np.exp(-(np.arange(-5, 6) ** 2) / 50)
    want = np.outer(line, line) / line.sum() ** 2
    np.testing.assert_allclose(metrics.blurred(impulse)[0, 10:21, 10:21], want, rtol=1e-5)
    assert np.count_nonzero(metrics.blurred(impulse)) == 121


def test_imputation_by_hand() -> None:
    """One removed pixel in the middle: 1/6 of each neighbour beside it, 1/12 of each at a corner; at a border, scaled
    up.
    """
    image = np.arange(9.0).reshape(1, 3, 3).astype(np.float32)
    removed = np.zeros((3, 3), bool)
    removed[1, 1] = True
    got = metrics.impute(image, removed, 0, np.random.default_rng(0))
    assert got[0, 1, 1] == pytest.approx((1 + 3 + 5 + 7) / 6 + (0 + 2 + 6 + 8) / 12)
    removed[:] = False
    removed[0, 0] = True
    got = metrics.impute(image, removed, 0, np.random.default_rng(0))
    assert got[0, 0, 0] == pytest.approx(((1 + 3) / 6 + 4 / 12) / (2 / 6 + 1 / 12))
    np.testing.assert_array_equal(np.delete(got.ravel(), 0), np.arange(1.0, 9))


def test_road_prefers_the_map_that_points_at_the_score() -> None:
    image = smooth_images((1, 24, 24), 1)[0]
    right = np.zeros((24, 24))
    right[4:9, 4:9] = 1
    image[0, 4:9, 4:9] += 5

    def score(batch: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-batch[:, 0, 4:9, 4:9].mean((1, 2))))

    assert metrics.road(image, right, score) > 0.1
    assert metrics.road(image, 1 - right, score) < -0.1


# ---- agreement with a mask


def region() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A map that is 1 on columns 0 and 1 of a 4 x 4 grid, an object on columns 1 and 2, every pixel valid."""
    scaled, object = np.zeros((4, 4)), np.zeros((4, 4), bool)
    scaled[:, :2], object[:, 1:3] = 1, True
    return scaled, object, np.ones((4, 4), bool)


def test_iou_by_hand() -> None:
    scaled, object, valid = region()
    assert metrics.iou(scaled, object, valid) == pytest.approx(4 / 12)
    assert metrics.iou(scaled, object, valid, 0.5) == pytest.approx(4 / 12)
    valid[:, 0] = False  # void: the wrong column does not count
    assert metrics.iou(scaled, object, valid, 0.5) == pytest.approx(4 / 8)
    assert metrics.iou(np.zeros((4, 4)), object, valid, 0.5) == 0


def test_energy_pointing_and_centre_by_hand() -> None:
    scaled, object, valid = region()
    assert metrics.energy(scaled, object, valid) == pytest.approx(0.5)
    assert metrics.energy(np.zeros((4, 4)), object, valid) == 0
    assert metrics.pointing(scaled, object, valid) == 0  # the first maximum is at (0, 0)
    assert metrics.pointing(scaled[:, ::-1], object, valid) == 1
    assert metrics.pointing(np.ones((4, 4)), object, valid) == 0
    assert metrics.centre_distance(scaled, object, valid) == pytest.approx(1 / math.hypot(4, 4))
    assert metrics.centre_distance(np.zeros((4, 4)), object, valid) == pytest.approx(0)  # both in the middle column


def test_otsu_parts_two_levels() -> None:
    assert 0.2 < metrics.otsu(np.array([0.2] * 5 + [0.8] * 3)) < 0.8
    assert metrics.otsu(np.zeros(9)) < 0.01


# ---- beside pytorch-grad-cam and OpenCV


@pytest.fixture(scope="module")
def peer():
    """pytorch_grad_cam.metrics.road, which also brings OpenCV."""
    import_torchvision()
    try:
        return importlib.import_module("pytorch_grad_cam.metrics.road")
    except ImportError as error:
        pytest.skip(f"pytorch-grad-cam cannot be imported here: {error}")


def test_imputation_is_the_peers(peer) -> None:
    image = smooth_images((3, 20, 17), 1)[0]
    removed = RNG.random((20, 17)) < 0.6
    want = peer.NoisyLinearImputer(noise=0)(torch.from_numpy(image), torch.from_numpy(~removed * 1.0)).numpy()
    got = metrics.impute(image, removed, 0, np.random.default_rng(0))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_drop_and_increase_are_the_peers(peer) -> None:
    """The peer's drop is the difference of scores, not relative to the first: 100 drop Y is our percentage of Y."""
    module = importlib.import_module("pytorch_grad_cam.metrics.cam_mult_image")
    images = torch.from_numpy(smooth_images((3, 8, 8), 6))
    maps = RNG.random((6, 8, 8)).astype(np.float32)
    weights = torch.from_numpy(RNG.standard_normal((192, 3))).float()

    def model(x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1) @ weights / 5).softmax(1)

    targets = [lambda p: p[0]] * 6
    before = model(images)[:, 0].numpy()
    seen = np.stack([metrics.masked(i, m) for i, m in zip(images.numpy(), maps, strict=True)])
    after = model(torch.from_numpy(seen))[:, 0].numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drops = module.DropInConfidence()(images, maps, targets, model)
        rises = module.IncreaseInConfidence()(images, maps, targets, model)
    np.testing.assert_allclose(metrics.average_drop(before, after) * before / 100, drops, atol=1e-6)
    np.testing.assert_array_equal(metrics.increase_in_confidence(before, after), 100 * rises)
    assert 0 < rises.sum() < 6


def test_otsu_is_opencvs(peer) -> None:
    cv2 = importlib.import_module("cv2")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = np.concatenate([rng.normal(0.3, 0.1, 500), rng.normal(0.7, 0.15, 300)]).clip(0, 1)
        levels = np.round(values * 255).astype(np.uint8)
        threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        np.testing.assert_array_equal(values > metrics.otsu(values), levels > threshold)


def test_road_of_nothing_and_of_everything() -> None:
    image = smooth_images((3, 8, 8), 1)[0]
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(metrics.impute(image, np.zeros((8, 8), bool), 0.0, rng), image)
    with pytest.raises(ValueError, match="every pixel was removed"):
        metrics.impute(image, np.ones((8, 8), bool), 0.0, rng)


# ---- how much of the image a map keeps, and checks of maps


def test_drops_that_differ_by_rounding_tie() -> None:
    drops = np.array([[10.004, 10.0, 12.0], [0.0, 0.02, 0.009]])
    np.testing.assert_allclose(metrics.win_percentage(drops), [[50, 50, 0], [50, 0, 50]])
    np.testing.assert_allclose(metrics.win_percentage(drops, tie=0), [[0, 100, 0], [100, 0, 0]])


def test_equalised_maps_have_one_area() -> None:
    scaled = np.array([[0.0, 0.9], [0.1, 0.9]], np.float32)
    np.testing.assert_allclose(metrics.equalised(scaled), [[0, 2.5 / 3], [1 / 3, 2.5 / 3]], rtol=1e-6)
    assert metrics.area(scaled) == pytest.approx(1.9 / 4)
    rng = np.random.default_rng(0)
    for m in (rng.random((7, 9)), rng.random((7, 9)) ** 9, np.zeros((7, 9)), np.round(rng.random((7, 9)))):
        assert metrics.area(metrics.equalised(m.astype(np.float32))) == pytest.approx(0.5)


def test_correlation_is_numpys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((5, 6)), rng.random((5, 6))
    assert metrics.correlation(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert metrics.correlation(a, 3 * a + 2) == pytest.approx(1) and metrics.correlation(a, -a) == pytest.approx(-1)
    assert metrics.correlation(a, np.ones((5, 6))) == 0


def test_sensitivity_is_the_largest_change() -> None:
    """A map that is the input itself changes as much as the noise; one that ignores it does not change."""
    batch = np.random.default_rng(0).standard_normal((1, 1, 40, 40)).astype(np.float32)
    change = metrics.max_sensitivity(batch[0, 0], batch, lambda noisy: noisy[0, 0], draws=5, radius=0.1)
    assert change == pytest.approx(0.1 / np.sqrt(3), rel=0.1)
    assert metrics.max_sensitivity(np.ones((40, 40)), batch, lambda _: np.ones((40, 40))) == 0
