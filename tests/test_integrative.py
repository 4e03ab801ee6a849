"""Integrative CAM's signed reading: what must not change its maps, and what its bias terms sum to, in float64."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support import warmed_up
from torch import nn

import camrt
from camrt.export import programs
from camrt.export.interpreter import Interpreter
from camrt.export.probes import smooth_images
from camrt.export.pytorch.autograd import record
from camrt.export.pytorch.from_torch import trace_module
from camrt.kernels import minmax
from camrt.runtime.cams import SignedMaps
from camrt.runtime.cams.data.signed_maps import LARGEST_RATIO
from camrt.runtime.cams.integrative import integrative_cam
from camrt.verification.distances import cosine_distance
from camrt.verification.methods import integrative_cam as integrative_reference

IMAGES = smooth_images((3, 32, 32), 3)
SEEDS = np.eye(5, dtype=np.float32)[[1, 4, 0]]
LAYERS = ["first", "second", "third"]


class Net(nn.Module):
    """Convolutions with a norm and a clip, with a bias and a norm, and with a bias alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.clip = nn.ReLU6()
        self.second = nn.Conv2d(8, 8, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(8)
        self.third = nn.Conv2d(8, 12, 3, 2, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.clip(self.norm1(self.first(x)))
        x = x + self.norm2(self.second(x)).relu()
        return self.fc(self.third(x).relu().mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    model = warmed_up(Net(), (3, 32, 32))
    assert isinstance(model, Net)
    with torch.no_grad():
        for norm in (model.norm1, model.norm2):  # numbers of few bits: then the rewrites below round nothing
            norm.running_mean.copy_((norm.running_mean * 16).round() / 16)  # type: ignore[union-attr,operator]
            norm.weight.copy_(torch.rand(8).mul(16).round().div(4) + 0.25)
            norm.bias.copy_(torch.randn(8).mul(16).round() / 16)
        model.second.bias.copy_((model.second.bias * 16).round() / 16)  # type: ignore[union-attr]
    return model


def maps(model: nn.Module, ratio: float) -> SignedMaps:
    """The program's maps, in float64."""
    graph = trace_module(model, (3, 32, 32), "conv")
    program = Interpreter(programs.signed_maps(graph))
    feeds = {"image": IMAGES, "seed": SEEDS, "ratio": np.full((3, 1), ratio)}
    with torch.no_grad():
        out = program.run({n: torch.from_numpy(a).double() for n, a in feeds.items()}, ["logits", "maps", "magnitudes"])
    taps = tuple(tap for tap, _ in graph.taps)
    assert [t.name for t in taps] == LAYERS
    return SignedMaps(taps, out["logits"].numpy(), SEEDS, out["maps"].numpy(), out["magnitudes"].numpy(), (32, 32))


def scale_layer(model: Net) -> None:
    """Everything behind the third layer's ReLU is linear."""
    model.third.weight *= 4
    model.third.bias *= 4  # type: ignore[operator]
    model.fc.weight /= 4


def before_norm(model: Net, factors: torch.Tensor) -> None:
    for conv, norm in ((model.first, model.norm1), (model.second, model.norm2)):
        conv.weight *= factors[:, None, None, None]
        if conv.bias is not None:
            conv.bias *= factors
        norm.running_mean *= factors  # type: ignore[operator]
        norm.weight.div_(factors)


def scale_channels(model: Net) -> None:
    before_norm(model, torch.tensor([1.0, 2, 4, 8, 0.5, 0.25, 1, 2]))


def flip_channels(model: Net) -> None:
    before_norm(model, torch.tensor([-1.0, 1, -1, -1, 1, 1, -1, 1]))


def move_offset(model: Net) -> None:
    offset = torch.tensor([1.0, -2, 4, 0.5, 3, -1, 8, 0.25])
    model.second.bias += offset  # type: ignore[operator]
    model.norm2.running_mean += offset  # type: ignore[operator]


@pytest.mark.parametrize("ratio", [0.0, 1.0, LARGEST_RATIO])
@pytest.mark.parametrize("rewrite", [scale_layer, scale_channels, flip_channels, move_offset])
def test_the_map_is_of_the_function_not_of_how_it_is_written(rewrite: Callable[[Net], None], ratio: float) -> None:
    model = net()
    other = copy.deepcopy(model)
    with torch.no_grad():
        rewrite(other)
    one, two = maps(model, ratio), maps(other, ratio)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    np.testing.assert_allclose(two.logits, one.logits, rtol=1e-6, atol=1e-7)
    scale = np.abs(one.maps).max()
    np.testing.assert_allclose(two.maps / scale, one.maps / scale, atol=1e-6)  # a program's constants are float32
    first, second = integrative_cam(one), integrative_cam(two)
    np.testing.assert_allclose(second.layer_weights, first.layer_weights, atol=1e-6)
    np.testing.assert_allclose(second.maps, first.maps, atol=1e-5)
    assert np.ptp(first.maps, axis=(1, 2)).min() > 0.1 and (first.layer_weights > 0).all()
    np.testing.assert_allclose(first.layer_weights.sum(axis=1), 1, rtol=1e-6)


def test_flipped_signs_change_the_residual_reading(tmp_path: object) -> None:
    """Why it is no longer the default."""
    results = []
    for rewrite in (None, flip_channels):
        model = net()
        if rewrite is not None:
            with torch.no_grad():
                rewrite(model)
        path = camrt.export_model(model, f"{tmp_path}/{len(results)}.camrt", (3, 32, 32), "conv")
        explainer = camrt.load(path)
        found = [explainer.explain(IMAGES, "integrative_cam", reading=r).maps for r in ("residual", "signed")]
        results.append(found)
    residual, signed = (np.abs(a - b).max() for a, b in zip(*results, strict=True))
    assert signed < 1e-4 < 0.05 < residual


def test_bias_terms_sum_to_the_score() -> None:
    """Over all layers: the bias terms, the input's, the clip's and the classifier's. The program's maps hold the bias
    terms: they are what is left when the weighted activations, without the bias of their own, are taken away.
    """
    model, signed = net(), maps(net(), 0.0)
    precise = copy.deepcopy(model).double()
    seed = torch.from_numpy(SEEDS).double()
    image = torch.from_numpy(IMAGES).double().requires_grad_()
    recorded = record(precise, image.detach(), seed, [*LAYERS, "norm1", "clip"])
    logits = precise(image)
    (of_image,) = torch.autograd.grad(logits, image, seed)
    clipped = recorded.activations["norm1"] > 6
    assert clipped.any()
    total = (image * of_image).sum((1, 2, 3)).detach()
    total = total + (6 * recorded.gradients["clip"] * clipped).sum((1, 2, 3)) + seed @ precise.fc.bias.detach()
    for name, layer in zip(LAYERS, signed.map_of_layers(), strict=True):
        bias = getattr(precise, name).bias
        own = torch.zeros(()) if bias is None else bias.detach()[:, None, None]
        weighted = (recorded.gradients[name] * (recorded.activations[name] - own)).sum((1, 2, 3)) / 2
        total = total + 2 * (torch.from_numpy(layer).sum((1, 2)) - weighted)
    score = (recorded.logits * seed).sum(1)
    np.testing.assert_allclose(total.numpy(), score.numpy(), rtol=1e-5, atol=1e-5)


def test_the_infinite_ratio_is_a_limit() -> None:
    """At a probability of 1/2 f'' is zero. The map there is that of probabilities nearby."""
    at, near = integrative_cam(maps(net(), LARGEST_RATIO)), integrative_cam(maps(net(), 1e12))
    np.testing.assert_allclose(at.maps, near.maps, atol=1e-4)
    np.testing.assert_allclose(at.layer_weights, near.layer_weights, atol=1e-4)


class WrittenOut(nn.Module):
    """A layer norm over the channels, of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(1, keepdim=True)
        return centred / ((centred**2).mean(1, keepdim=True) + 1e-5).sqrt() * self.scale + self.shift


class ByReciprocal(WrittenOut):
    """The same from variance and reciprocal root."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        return (x - mean) * (variance + 1e-5).rsqrt() * self.scale + self.shift


class RootMeanSquare(WrittenOut):
    """Divides by the root mean square over the channels, and has no mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * ((x * x).mean(1, keepdim=True) + 1e-6).rsqrt() * self.scale


class Moments(WrittenOut):
    """An instance norm from the first two moments."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, square = x.mean((2, 3), keepdim=True), (x * x).mean((2, 3), keepdim=True)
        return (x - mean) / (square - mean * mean + 1e-5).sqrt() * self.scale + self.shift


class Frozen(WrittenOut):
    """A batch norm as a product and a sum, as detection networks freeze it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.shift


class ChannelsLast(nn.Module):
    """A layer norm over the channels, between permutations."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def random_affine(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter += torch.randn_like(parameter) / 4
    return norm


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(8),
    "group": lambda: random_affine(nn.GroupNorm(2, 8)),
    "instance": lambda: random_affine(nn.InstanceNorm2d(8, affine=True)),
    "layer": lambda: random_affine(nn.GroupNorm(1, 8)),
    "channels last": lambda: random_affine(ChannelsLast()),
    "written out": WrittenOut,
    "by reciprocal": ByReciprocal,
    "root mean square": RootMeanSquare,
    "moments": Moments,
    "frozen": Frozen,
}


class Normed(nn.Module):
    """A convolution, a norm, and a head in which the place matters."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = norm
        self.second = nn.Conv2d(8, 6, 3, 2, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.second(nn.functional.gelu(self.norm(self.first(x)))).relu().mean((2, 3)))


@pytest.mark.parametrize("kind", list(NORMS))
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_layers_are_seen_behind_their_norm(kind: str, precision: str, tmp_path: object) -> None:
    """In front of a layer norm over the channels sum_k G_k y_k is zero at each position: rounding drew the map."""
    torch.manual_seed(0)
    model = warmed_up(Normed(NORMS[kind]()), (3, 32, 32))
    path = camrt.export_model(model, f"{tmp_path}/model.camrt", (3, 32, 32), "conv", precision=precision)
    explainer = camrt.load(path)
    got = explainer.explain(IMAGES, "integrative_cam", [1, 4, 0], layers=["first"])
    recorded = record(model.double(), torch.from_numpy(IMAGES).double(), torch.from_numpy(SEEDS), ["norm"])
    want, _ = integrative_reference(recorded, torch.from_numpy(SEEDS), (32, 32))
    assert np.ptp(want.numpy(), axis=(1, 2)).min() == 1
    assert cosine_distance(got.maps, want.numpy().astype(np.float32)) < 1e-3
    if precision == "fp32":
        np.testing.assert_allclose(got.maps, want, atol=1e-4)


class Scaled(nn.Module):
    """A convolution whose output is multiplied by what depends on it: a gate, which is no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.second = nn.Conv2d(8, 6, 3, 2, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.fc(self.second(x.relu()).relu().mean((2, 3)))


def test_a_gate_is_no_norm(tmp_path: object) -> None:
    torch.manual_seed(0)
    model = Scaled().eval()
    explainer = camrt.load(
        camrt.export_model(model, f"{tmp_path}/model.camrt", (3, 32, 32), layers=["first", "second"])
    )
    got = explainer.explain(IMAGES, "integrative_cam", [1, 4, 0], layers=["first"])
    recorded = record(model.double(), torch.from_numpy(IMAGES).double(), torch.from_numpy(SEEDS), ["first"])
    want, _ = integrative_reference(recorded, torch.from_numpy(SEEDS), (32, 32))
    np.testing.assert_allclose(got.maps, want, atol=1e-4)


def test_a_class_without_evidence_has_a_map_of_zeros() -> None:
    """Where no position speaks for the class, the weights are zero, not NaN."""
    signed = maps(net(), 0.0)
    result = integrative_cam(dataclasses.replace(signed, maps=-np.abs(signed.maps)))
    assert not result.maps.any() and not result.layer_weights.any()


class BeforeNorms(nn.Module):
    """A convolution that a residual connection and a layer norm over the channels read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.branch = nn.Conv2d(8, 8, 1)
        self.norm = random_affine(ChannelsLast())
        self.second = nn.Conv2d(8, 6, 3, 2, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.norm(x + 1e-6 * self.branch(x))
        return self.fc(self.second(nn.functional.gelu(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_layer_that_cancels_has_no_weight(precision: str, tmp_path: object) -> None:
    torch.manual_seed(0)
    path = f"{tmp_path}/model.camrt"
    camrt.export_model(BeforeNorms().eval(), path, (3, 32, 32), "conv", precision=precision)
    result = camrt.load(path).explain(IMAGES, "integrative_cam")
    assert result.layers == ("first", "branch", "second")
    assert (result.layer_weights[:, 0] == 0).all() and (result.layer_weights[:, 1:] > 0).all()


class Excited(nn.Module):
    """Convolutions on the pooled grid of 1 x 1, as in squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, 2, 1)
        self.squeeze, self.excite, self.fc = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.fc(self.second(x).relu().mean((2, 3)))


@pytest.mark.parametrize("reading", ["signed", "residual"])
def test_a_layer_without_a_grid_draws_no_rounding(reading: str, tmp_path: Path) -> None:
    """Its map is constant before and after resizing, so it adds nothing, whatever its weight."""
    torch.manual_seed(0)
    explainer = camrt.load(camrt.export_model(Excited().eval(), tmp_path / "m.camrt", (3, 70, 70), "conv"))
    images = smooth_images((3, 70, 70), 4)
    every = explainer.explain(images, "integrative_cam", reading=reading)
    with_grid = explainer.explain(images, "integrative_cam", layers=["first", "second"], reading=reading)
    assert every.layers == ("first", "squeeze", "excite", "second") and every.layer_weights[:, 1:3].any()
    np.testing.assert_allclose(minmax(every.maps), minmax(with_grid.maps), atol=1e-5)
