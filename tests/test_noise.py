"""What rounding decides: export measures how exactly each layer's importance is known, and explanations say so."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support import small_net, warmed_up
from torch import nn

import camrt
from camrt.export.noise import noise_of_layers
from camrt.export.probes import last_bits, smooth_images
from camrt.runtime.bundle.manifest import MANIFEST, PRECISIONS, UNMEASURED, Noise
from camrt.runtime.bundle.reading import read_bundle
from camrt.runtime.errors import BundleError
from camrt.verification.verify import verify

IMAGES = smooth_images((3, 32, 32), 3)


class Normed(nn.Module):
    """A convolution and a norm, twice."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm1 = norm()
        self.second = nn.Conv2d(8, 8, 3, 1, 1)
        self.norm2 = norm()
        self.third = nn.Conv2d(8, 8, 3, 1, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.first(x)).relu()
        x = self.norm2(self.second(x)).relu()
        return self.fc(self.third(x).relu().mean((2, 3)))


def exported(norm: Callable[[], nn.Module], folder: Path, precision: str = "fp32") -> camrt.Explainer:
    torch.manual_seed(0)
    model = warmed_up(Normed(norm), (3, 32, 32))
    for module in model.modules():
        if isinstance(module, nn.InstanceNorm2d | nn.GroupNorm):
            with torch.no_grad():
                module.weight.add_(torch.rand(8))
                module.bias.add_(torch.randn(8))
    path = camrt.export_model(model, folder / "model.camrt", (3, 32, 32), "conv", precision=precision)
    return camrt.load(path)


def noise(explainer: camrt.Explainer, precision: str = "float32") -> list[Noise]:
    return [t.noise[precision] for t in explainer.manifest.taps]


def test_ordinary_layers_are_never_zero_by_construction(tmp_path: Path) -> None:
    for i, norm in enumerate((lambda: nn.BatchNorm2d(8), nn.Identity)):
        explainer = exported(norm, tmp_path / str(i))
        assert all(n.zero == 0 and 0 < n.mean < 0.05 and n.mean <= n.extreme for n in noise(explainer))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_in_front_of_an_instance_norm_alphas_are_noise(precision: str, tmp_path: Path) -> None:
    """The gradient's mean over the grid is zero there: a Grad-CAM map showed rounding at full contrast."""
    explainer = exported(lambda: nn.InstanceNorm2d(8, affine=True), tmp_path, precision)
    measured = noise(explainer, PRECISIONS[precision])
    assert [n.alone for n in measured] == [True, True, False]
    with pytest.warns(UserWarning, match="winsor_cam: first, second counts as zero: .* rounding alone would draw"):
        result = explainer.explain(IMAGES, percentile=0)
    assert result.layer_weights.astype(bool).tolist() == [[False, False, w > 0] for w in result.layer_weights[:, 2]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        maps = explainer.explain(IMAGES, "grad_cam", layers=["first"]).maps
    assert not maps.any()
    messages = [str(w.message) for w in caught]
    assert any("grad_cam: first counts as zero" in m for m in messages)
    assert any("the map of image 0, 1, 2 is constant" in m for m in messages)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # methods that read the gradient at each position see more than its mean
        assert explainer.explain(IMAGES, "hires_cam", layers=["first"]).maps.any()
        assert explainer.explain(IMAGES, "grad_cam", layers=["third"]).maps.any()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_in_front_of_a_layer_norm_the_mean_is_zero(precision: str, tmp_path: Path) -> None:
    """The gradient's sum over grid and channels is zero there: rounding would decide which layers count."""
    explainer = exported(lambda: nn.GroupNorm(1, 8), tmp_path, precision)
    first, second, third = noise(explainer, PRECISIONS[precision])
    assert 0 < first.zero < 0.1 and 0 < second.zero < 0.1 and third.zero == 0
    result = explainer.explain(IMAGES, percentile=0)
    assert not result.layer_weights[:, :2].any()
    assert result.details["undetermined"].tolist() == [[], [], []]
    assert explainer.explain(IMAGES, layer_aggregation="max").layer_weights.all()
    assert explainer.explain(IMAGES, "grad_cam", layers=["first"]).maps.any()


class Balanced(nn.Module):
    """Two channels whose gradients cancel, but for a difference that a test chooses."""

    def __init__(self, difference: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, 2, 1)
        self.fc = nn.Linear(2, 2)
        with torch.no_grad():
            self.conv.bias += 2  # type: ignore[operator]
            self.fc.weight.copy_(torch.tensor([[1.0, -1.0 + difference], [0.0, 0.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(("difference", "within"), [(1e-7, True), (1e-4, False)])
def test_an_importance_within_its_noise_is_named(difference: float, within: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = camrt.export_model(Balanced(difference).eval(), tmp_path / "m.camrt", (3, 32, 32), "conv")
    (tap,) = read_bundle(path).manifest.taps
    assert tap.noise["float32"] == Noise(2.0**-21, 2.0**-21, 0.0)  # nothing here depends on the image
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = camrt.load(path).explain(IMAGES, "winsor_cam", 0)
    assert result.details["undetermined"].tolist() == ([["conv"]] * 3 if within else [[]] * 3)
    said = [str(w.message) for w in caught if "rounding decides whether conv counts" in str(w.message)]
    assert len(said) == within and result.to_dict(0)["images"][0]["details"] == {"undetermined": ["conv"] * within}
    retuned = result.retune(layer_aggregation="max")
    assert retuned.details["undetermined"].tolist() == [[]] * 3  # the largest alpha is far from zero
    assert result.retune(percentile=10).details["undetermined"].tolist() == result.details["undetermined"].tolist()


def test_layers_that_rounding_flips_are_named(tmp_path: Path) -> None:
    """Over many images whose last bits change: every layer whose weight was lost or found is named before."""
    path = camrt.export_model(small_net(), tmp_path / "m.camrt", (3, 32, 32), "conv")
    explainer = camrt.load(path)
    images = smooth_images((3, 32, 32), 200, seed=3)
    flipped = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        named = explainer.explain(images, "winsor_cam", 1, percentile=0).details["undetermined"]
        runs = [explainer.explain(x, "winsor_cam", 1, percentile=0).layer_weights for x in last_bits(images, 6)]
    for i, names in enumerate(named):
        for layer, weights in zip(explainer.layers, np.array(runs)[:, i].T, strict=True):
            if np.ptp(weights):
                flipped += 1
                assert layer in names, (i, layer)
    assert sum(map(bool, named)) < 40


def test_no_layer_has_less_noise_than_the_median() -> None:
    rng = np.random.default_rng(0)
    exact = [rng.standard_normal((4, 4, 8)) + 3 for _ in range(3)]
    for alphas, size in zip(exact, (0.0, 1e-5, 1e-3), strict=True):
        alphas[:] = alphas[:, :1] * (1 + size * rng.standard_normal(alphas.shape))
        alphas[:, 0] = alphas[:, :1].mean(axis=1)
    quiet, middle, loud = noise_of_layers(exact, exact)
    assert quiet == middle and loud.mean > 10 * middle.mean > 0 and quiet.zero == middle.zero == loud.zero == 0


def test_a_bundle_without_measurements_opens(tmp_path: Path) -> None:
    path = camrt.export_model(small_net(), tmp_path / "m.camrt", (3, 32, 32), "conv")
    raw = json.loads((path / MANIFEST).read_text())
    for tap in raw["taps"]:
        del tap["noise"]
    (path / MANIFEST).write_text(json.dumps(raw))
    result = camrt.load(path).explain(IMAGES)
    assert result.maps.any() and result.details["undetermined"].tolist() == [[]] * 3 and UNMEASURED.mean == 0


@pytest.mark.parametrize("wrong", [{"mean": -1}, {"zero": float("nan")}, {"mean": "0"}, {"other": 1}])
def test_a_wrong_measurement_is_refused(wrong: dict[str, object], tmp_path: Path) -> None:
    path = camrt.export_model(small_net(), tmp_path / "m.camrt", (3, 32, 32), "conv")
    raw = json.loads((path / MANIFEST).read_text())
    raw["taps"][0]["noise"]["float32"] |= wrong
    (path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="field is missing or wrong"):
        camrt.load(path)


@pytest.mark.parametrize("norm", [lambda: nn.InstanceNorm2d(8, affine=True), lambda: nn.GroupNorm(1, 8)])
def test_a_bundle_with_layers_of_noise_verifies(norm: Callable[[], nn.Module], tmp_path: Path) -> None:
    explainer = exported(norm, tmp_path)
    report = verify(explainer.bundle.path)
    assert report.passed, [row for row in report.rows if not row.passed]
