"""What rounding decides: export measures how exactly each layer's importance is known, and explanations say so."""

from __future__ import annotations

import json
import pickle
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
    with pytest.warns(UserWarning, match="zero counts instead of first, second: .* rounding alone would draw"):
        result = explainer.explain(IMAGES, percentile=0)
    assert result.layer_weights.astype(bool).tolist() == [[False, False, w > 0] for w in result.layer_weights[:, 2]]
    assert result.details["undetermined"].tolist() == [[], [], []] and measured[2].mean < 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the largest of a gradient is no mean
        assert explainer.explain(IMAGES, gradient_aggregation="max").layer_weights.all()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        maps = explainer.explain(IMAGES, "grad_cam", layers=["first"]).maps
    assert not maps.any()
    messages = [str(w.message) for w in caught]
    assert any("grad_cam: zero counts instead of first" in m for m in messages)
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
    assert first.zero == second.zero == 1 and third.zero == 0
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


def balanced(difference: float, folder: Path, noise: float | None = None) -> camrt.Explainer:
    """noise: what the manifest says instead of what was measured."""
    torch.manual_seed(0)
    path = camrt.export_model(Balanced(difference).eval(), folder / "m.camrt", (3, 32, 32), "conv")
    if noise is not None:
        raw = json.loads((path / MANIFEST).read_text())
        raw["taps"][0]["noise"]["float32"]["mean"] = noise
        (path / MANIFEST).write_text(json.dumps(raw))
    return camrt.load(path)


@pytest.mark.parametrize(("noise", "within"), [(None, False), (1e-3, True)])
def test_an_importance_within_its_noise_is_named(noise: float | None, within: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = balanced(1e-4, tmp_path, noise).explain(IMAGES, "winsor_cam", 0)
    assert result.details["undetermined"].tolist() == ([["conv"]] * 3 if within else [[]] * 3)
    said = [w for w in caught if "rounding may decide whether conv counts" in str(w.message)]
    assert len(said) == within and all(w.filename == __file__ for w in said)
    assert result.to_dict(0)["images"][0]["details"] == {"undetermined": ["conv"] * within}
    retuned = result.retune(layer_aggregation="max")
    assert retuned.details["undetermined"].tolist() == [[]] * 3  # the largest alpha is far from zero
    assert result.retune(percentile=10).details["undetermined"].tolist() == result.details["undetermined"].tolist()
    assert pickle.loads(pickle.dumps(result)).details["undetermined"].tolist() == [["conv"] * within] * 3


def flips(explainer: camrt.Explainer, images: np.ndarray) -> list[tuple[int, str]]:
    """(image, layer) of the weights that other last bits of the image lose or find, and that are not named."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        named = explainer.explain(images, "winsor_cam", 1, percentile=0).details["undetermined"]
        runs = [explainer.explain(x, "winsor_cam", 1, percentile=0).layer_weights for x in last_bits(images, 6)]
    changed = np.ptp(np.array(runs), axis=0) > 0
    places = zip(*np.nonzero(changed), strict=True)
    return [(i, explainer.layers[j]) for i, j in places if explainer.layers[j] not in named[i]]


def test_layers_that_rounding_flips_are_named(tmp_path: Path) -> None:
    path = camrt.export_model(small_net(), tmp_path / "m.camrt", (3, 32, 32), "conv")
    explainer, images = camrt.load(path), smooth_images((3, 32, 32), 200, seed=3)
    assert flips(explainer, images) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        named = explainer.explain(images, "winsor_cam", 1).details["undetermined"]
    assert sum(map(bool, named)) < 40


@pytest.mark.parametrize("seed", [0, 1])
def test_two_channels_in_front_of_a_layer_norm(seed: int, tmp_path: Path) -> None:
    """Two numbers often cancel to exactly zero: that too is rounding, and flips are named."""
    torch.manual_seed(seed)
    blocks = [nn.Sequential(nn.Conv2d(2, 2, 3, 1, 1), nn.GroupNorm(1, 2), nn.ReLU()) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 2, 3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5))
    path = camrt.export_model(model.eval(), tmp_path / "m.camrt", (3, 32, 32), "conv")
    explainer = camrt.load(path)
    assert [t.noise["float32"].zero for t in explainer.manifest.taps] == [0, 1, 1, 1, 1]
    assert flips(explainer, smooth_images((3, 32, 32), 48, seed=5)) == []


class Chaotic(nn.Module):
    """Rounding changes every gradient of its first layers, though none of them is zero by construction."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3)) for _ in range(50))
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).relu()
        return self.fc(x.mean((2, 3)))


def test_a_chaotic_network_is_not_zero_by_construction(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = camrt.export_model(warmed_up(Chaotic(), (3, 32, 32)), tmp_path / "m.camrt", (3, 32, 32), "conv")
    measured = [t.noise["float32"] for t in read_bundle(path).manifest.taps]
    assert all(n.zero == 0 for n in measured) and max(n.mean for n in measured) > 0.1


def test_no_layer_has_less_noise_than_the_median() -> None:
    rng = np.random.default_rng(0)
    exact = [rng.standard_normal((4, 4, 8)) + 3 for _ in range(3)]
    for alphas, size in zip(exact, (0.0, 1e-5, 1e-3), strict=True):
        alphas[:] = alphas[:, :1] * (1 + size * rng.standard_normal(alphas.shape))
        alphas[:, 0] = alphas[:, :1].mean(axis=1)
    quiet, middle, loud = noise_of_layers(exact, exact, [None] * 3)
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
