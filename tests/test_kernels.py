"""The NumPy kernels against PyTorch and against their own statements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from camrt import kernels
from camrt.verification.methods import winsor_weights

SIZES = [
    ((1, 1), (5, 7)),
    ((7, 7), (224, 224)),
    ((14, 9), (33, 32)),
    ((32, 32), (31, 33)),
    ((8, 8), (8, 8)),
    ((9, 5), (3, 2)),
]


@pytest.mark.parametrize(("grid", "size"), SIZES)
@pytest.mark.parametrize("mode", ["bilinear", "align_corners", "nearest"])
def test_upsample_is_torch_interpolate(grid: tuple[int, int], size: tuple[int, int], mode: str) -> None:
    maps = np.random.default_rng(0).standard_normal((2, *grid)).astype(np.float32)
    corners = None if mode == "nearest" else mode == "align_corners"
    kind = "nearest" if mode == "nearest" else "bilinear"
    want = F.interpolate(torch.from_numpy(maps).double()[:, None], size=size, mode=kind, align_corners=corners)[
        :, 0
    ].numpy()
    got = kernels.upsample(maps, size, mode)
    assert got.shape == want.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_upsample_refuses_an_empty_size_and_an_unknown_interpolation() -> None:
    maps = np.zeros((1, 4, 4), np.float32)
    with pytest.raises(ValueError, match="cannot resize from 4 to 0"):
        kernels.upsample(maps, (0, 4))
    with pytest.raises(ValueError, match="use 'bilinear', 'align_corners' or 'nearest'"):
        kernels.upsample(maps, (8, 8), "bicubic")


@pytest.mark.parametrize("percentile", [0, 1, 10, 37.5, 50, 90, 99, 100])
@pytest.mark.parametrize("length", [1, 2, 3, 53, 111])
def test_winsorize_is_the_reference(percentile: float, length: int) -> None:
    rng = np.random.default_rng(length)
    rows = rng.standard_normal((20, length)).astype(np.float32)
    rows[rng.random(rows.shape) < 0.2] = 0
    rows[0] = 0
    rows[1] = 0.25
    rows[2] = -1
    got = kernels.winsorize(rows, percentile)
    want = torch.stack([winsor_weights(row.double(), percentile) for row in torch.from_numpy(rows)]).numpy()
    assert got.shape == rows.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_winsorize_keeps_its_promises() -> None:
    row = np.array([[-1.0, 0.0, 1.0, 2.0, 3.0, 100.0]])
    got = kernels.winsorize(row, 50)
    assert (got[row <= 0] == 0).all()
    np.testing.assert_allclose(got[0, 2:], [0.1, 0.7, 1.0, 1.0], atol=1e-6)  # the median of 1, 2, 3, 100 is 2.5
    np.testing.assert_array_equal(kernels.winsorize(row, 0)[0], [0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(kernels.winsorize(np.full((1, 4), 3.0), 90), np.ones((1, 4)))


@pytest.mark.parametrize("percentile", [-1, 100.5])
def test_winsorize_refuses_a_percentile_out_of_range(percentile: float) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.100"):
        kernels.winsorize(np.ones((1, 3)), percentile)


def test_winsorize_refuses_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        kernels.winsorize(np.array([[1.0, np.nan]]), 50)


def test_minmax_maps_a_constant_to_zeros() -> None:
    maps = np.stack([np.full((3, 4), 2.5), np.arange(12.0).reshape(3, 4)]).astype(np.float32)
    got = kernels.minmax(maps)
    assert (got[0] == 0).all() and got[1].min() == 0 and got[1].max() == 1


def test_minmax_in_place_is_the_same() -> None:
    """Constant, ordinary, and with a range that overflows float32."""
    ramp = np.arange(12, dtype=np.float32).reshape(3, 4)
    maps = np.stack([np.full((3, 4), 2.5, np.float32), ramp, (ramp - 6) * np.float32(5e37)])
    for some in (maps[:2], maps):
        want, place = kernels.minmax(some), some.copy()
        assert kernels.minmax(place, out=place) is place
        assert np.array_equal(place, want) and place[-1].max() == 1 and place[-1].min() == 0


@pytest.mark.parametrize(
    ("maps", "dtype"), [(1e5 * np.eye(3, dtype=np.float32)[None], np.float16), (1e300 * np.eye(3)[None], np.float32)]
)
def test_gate_minmax_into_a_narrower_dtype(maps: np.ndarray, dtype: type) -> None:
    assert np.array_equal(kernels.gate(maps, "minmax", out=np.empty(maps.shape, dtype))[0], np.eye(3))


@pytest.mark.parametrize("kind", ["tanh", "minmax"])
def test_an_image_that_lies_in_the_masked_images(kind: str) -> None:
    rng = np.random.default_rng(0)
    image, maps = rng.random((2, 8, 8), np.float32), rng.standard_normal((3, 4, 4)).astype(np.float32)
    place = np.stack([image] * 3)
    assert np.array_equal(kernels.mask_batch(place[0], maps, kind, out=place), kernels.mask_batch(image, maps, kind))


def test_fuse_layers_takes_grids_as_lists() -> None:
    several: Any = np.array([[2, 2], [2, 2]])
    wrong: Any = [[0, 2], [3, 0]]
    maps, weights = np.arange(8, dtype=np.float32)[None], np.ones((1, 2), np.float32)
    want = kernels.fuse_layers(maps, [(2, 2), (2, 2)], weights, (4, 4))
    assert np.array_equal(kernels.fuse_layers(maps, several, weights, (4, 4)), want)
    with pytest.raises(ValueError, match="grid is 0 x 2"):
        kernels.fuse_layers(maps, wrong, weights, (4, 4))


@pytest.mark.parametrize("normalize", [False, True])
def test_fuse_layers_of_no_images(normalize: bool) -> None:
    maps, weights = np.zeros((0, 25), np.float32), np.zeros((0, 3), np.float32)
    fused = kernels.fuse_layers(maps, [(3, 4), (3, 4), (1, 1)], weights, (8, 9), normalize=normalize)
    assert fused.shape == (0, 8, 9)


@pytest.mark.parametrize("repeats", [1, 5], ids=["few changes of the grid", "many"])
def test_fuse_layers_is_the_sum_of_resized_layers(repeats: int) -> None:
    """By linearity the kernel sums before it resizes; the definition resizes first."""
    rng = np.random.default_rng(0)
    grids = [(12, 10), (6, 5), (6, 5), (3, 3), (1, 1)] * repeats
    maps = rng.standard_normal((2, sum(h * w for h, w in grids))).astype(np.float32)
    weights = rng.random((2, len(grids))).astype(np.float32)
    normalized = kernels.normalize_layers(maps, grids)
    want, start = np.zeros((2, 40, 37)), 0
    for i, (h, w) in enumerate(grids):
        layer = torch.from_numpy(maps[:, start : start + h * w].reshape(2, h, w)).double().relu()
        low, high = layer.amin((1, 2), keepdim=True), layer.amax((1, 2), keepdim=True)
        layer = torch.where(high > low, (layer - low) / (high - low).clamp(min=1e-30), 0)
        for size in ((12, 10), (40, 37)):
            layer = F.interpolate(layer[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
        want += weights[:, i, None, None] * layer.numpy()
        start += h * w
    got = kernels.fuse_layers(normalized, grids, weights, (40, 37))
    assert got.shape == (2, 40, 37) and got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-5)


# ---- masks


GATED = {
    "tanh": torch.tanh,
    "sigmoid_relu": lambda x: torch.sigmoid((x / 2).relu()),
    "identity": lambda x: x,
    "minmax": lambda x: (
        (x - x.amin((1, 2), keepdim=True))
        / (x.amax((1, 2), keepdim=True) - x.amin((1, 2), keepdim=True)).clamp(min=1e-30)
    ),
}


@pytest.mark.parametrize("kind", kernels.GATES)
@pytest.mark.parametrize(("grid", "size"), [((7, 7), (32, 32)), ((3, 5), (17, 41)), ((1, 1), (9, 4))])
def test_masks_and_their_sums(kind: str, grid: tuple[int, int], size: tuple[int, int]) -> None:
    """Against PyTorch in float64: masked images, gates, and their weighted sum, with and without the kept gates."""
    rng = np.random.default_rng(0)
    activations = (10 * rng.standard_normal((6, *grid))).astype(np.float32)
    activations[2] = 0
    image = rng.standard_normal((3, *size)).astype(np.float32)
    raised = F.interpolate(torch.from_numpy(activations).double()[None], size, mode="bilinear")[0]
    opened = GATED[kind](raised).numpy()
    out, gates = np.full((6, 3, *size), np.nan, np.float32), np.full((6, *size), np.nan, np.float32)
    masked = kernels.mask_batch(image, activations, kind, out=out, gates=gates)
    assert masked is out
    np.testing.assert_allclose(gates, opened, atol=1e-5)
    np.testing.assert_allclose(masked, image * opened[:, None], atol=5e-5)
    np.testing.assert_array_equal(masked, kernels.mask_batch(image, activations, kind))
    scores = rng.standard_normal((2, 6)).astype(np.float32)
    want = 1 + np.einsum("sk,khw->shw", scores.astype(np.float64), opened)
    for kept in (None, gates):
        total = np.ones((2, *size), np.float32)
        kernels.accumulate_maps(total, scores, activations, kind, gates=kept)
        np.testing.assert_allclose(total, want, atol=2e-4)


def test_an_unknown_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="gate 'relu': use tanh, sigmoid_relu, minmax, identity"):
        kernels.mask_batch(np.zeros((3, 4, 4), np.float32), np.zeros((1, 2, 2), np.float32), "relu")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: kernels.check_finite(np.array([1, np.nan], np.float32)), "NaN or infinity"),
        (
            lambda: kernels.layer_importance(np.zeros((2, 3), np.float32), [], "mean"),
            "needed at least one layer, each with a channel",
        ),
        (
            lambda: kernels.class_scores(np.zeros((2, 0), np.float32), np.zeros((1, 0), np.float32), "softmax"),
            "no classes",
        ),
        (
            lambda: kernels.resize_picture(
                np.zeros((4, 4, 3), np.uint8), (4, 4), (1, 0, 4, 4), [0] * 3, [1] * 3, "bilinear"
            ),
            r"crop \(1, 0, 4, 4\) lies outside \(4, 4\)",
        ),
        (
            lambda: kernels.resize_picture(
                np.zeros((4, 4, 3), np.uint8), (4, 4), (0, 0, 4, 4), [0] * 3, [1], "bilinear"
            ),
            "3 means and 1 deviations",
        ),
    ],
    ids=["nan", "no layers", "no classes", "crop", "deviations"],
)
def test_what_no_kernel_takes(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_a_picture_is_resized_into_a_given_array() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    arguments = (picture, (6, 5), (0, 0, 6, 5), [0.5] * 3, [0.25] * 3, "bicubic")
    out = np.empty((3, 6, 5), np.float32)
    assert kernels.resize_picture(*arguments, out=out) is out
    np.testing.assert_array_equal(out, kernels.resize_picture(*arguments))
