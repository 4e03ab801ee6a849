"""Every CAM method, as the runtime computes it from an exported network, against its reference in PyTorch in
float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import small_net
from torch import nn

import camrt
from camrt.export.probes import smooth_images
from camrt.export.pytorch.autograd import record
from camrt.kernels import gate, upsample
from camrt.runtime.cams import METHODS, Lane, MaskedRuns, Result
from camrt.runtime.cams.gradient import eigen_cam
from camrt.runtime.cams.integrative import residual_map
from camrt.runtime.cams.masking import error_bounds
from camrt.runtime.cams.smooth import SMOOTH, terms
from camrt.runtime.session.batches import batches
from camrt.runtime.session.explaining import read
from camrt.verification import method_runs, methods
from camrt.verification.distances import largest_difference

IMAGES = smooth_images((3, 32, 32), 3)
TARGETS = [1, 4, 0]
CONVOLUTIONS = ["stem", "block.0", "head.0"]
BEHIND_NORMS = ["norm", "block.1", "head.0"]
LIMIT = 1e-4  # the network is shallow: float32 leaves 1e-6


@dataclass(frozen=True)
class Case:
    """A method under some options, and its map (H, W) of one image (1, C, H, W) for a class, by PyTorch."""

    method: str
    reference: Callable[[nn.Module, torch.Tensor, int, Any], torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{k}={_said(v)}" for k, v in self.options.items())])


def _said(option: Any) -> str:
    return "square" if option is square else str(option)


def layer_case(name: str) -> Case:
    def compute(model: nn.Module, image: torch.Tensor, target: int, tap: Any) -> torch.Tensor:
        return methods.LAYER_METHODS[name](record(model, image, target, [tap.name]), image.shape[2:])[0]

    return Case(name, compute)


def run_case(name: str, **options: Any) -> Case:
    compute = getattr(method_runs, name)
    return Case(name, lambda m, x, t, tap: compute(m, x, t, tap, **options), options)


def winsor(model: nn.Module, image: torch.Tensor, target: int, tap: Any) -> torch.Tensor:
    recorded = record(model, image, target, CONVOLUTIONS)
    return methods.winsor_cam(recorded, image.shape[2:], 50, "max")[0][0]


def full_grad(model: nn.Module, image: torch.Tensor, target: int, tap: Any) -> torch.Tensor:
    seed = nn.functional.one_hot(torch.tensor([target]), 5).to(image.dtype)
    return method_runs.full_grad(image, *method_runs.biases_of_module(model, image, seed))[0]


def finer(model: nn.Module, image: torch.Tensor, target: int, tap: Any, alpha: float, comparisons: int) -> torch.Tensor:
    with torch.no_grad():
        seed = methods.finer_seed(model(image), target, alpha, comparisons)
    return methods.grad_cam(record(model, image, seed, [tap.name]), image.shape[2:])[0]


def integrative(smooth: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], reading: str) -> Callable[..., Any]:
    """smooth: (the target's score (1,), the logsumexp of the others) -> (1,)."""

    def compute(model: nn.Module, image: torch.Tensor, target: int, tap: Any) -> torch.Tensor:
        reference, layers = {
            "signed": (methods.integrative_cam, BEHIND_NORMS),
            "residual": (methods.integrative_residual, CONVOLUTIONS),
        }[reading]
        recorded = record(model, image, target, layers)
        seed = nn.functional.one_hot(torch.tensor([target]), 5).to(image.dtype)
        others = torch.cat([recorded.logits[0, :target], recorded.logits[0, target + 1 :]]).logsumexp(0)
        return reference(recorded, seed, image.shape[2:], lambda s: smooth(s, others))[0][0]

    return compute


square = camrt.Smooth(lambda s: s**2 + s**3, lambda s: 2 * s + 3 * s**2, lambda s: 2 + 6 * s, lambda s: 6 + 0 * s)

SMOOTH_IN_PYTORCH: dict[Any, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "identity": lambda s, others: s,
    "exp": lambda s, others: s.exp(),
    "softplus": lambda s, others: nn.functional.softplus(s),
    "softmax": lambda s, others: torch.sigmoid(s - others),
    square: lambda s, others: s**2 + s**3,
}

CASES = [
    Case("winsor_cam", winsor, {"percentile": 50, "layer_aggregation": "max"}),
    *(layer_case(name) for name in methods.LAYER_METHODS),
    Case("integrative_cam", integrative(lambda s, others: s, "signed")),
    *(
        Case("integrative_cam", integrative(function, reading), {"smooth": name, "reading": reading})
        for reading in ("signed", "residual")
        for name, function in SMOOTH_IN_PYTORCH.items()
    ),
    Case("full_grad", full_grad),
    Case("finer_cam", functools.partial(finer, alpha=1.0, comparisons=3)),
    Case("finer_cam", functools.partial(finer, alpha=0.6, comparisons=2), {"alpha": 0.6, "comparisons": 2}),
    *(
        run_case("score_cam_pp", variant=variant, baseline=baseline)
        for variant in ("tanh", "tanh_mask_only", "sigmoid_relu")
        for baseline in ("none", "zero")
    ),
    run_case("score_cam", variant="original"),
    run_case("score_cam", variant="pytorch_grad_cam"),
    run_case("ablation_cam"),
    run_case("recipro_cam"),
    run_case("recipro_cam", gaussian=True),
    run_case("recipro_cam", variant="openvino_xai"),
]


@functools.cache
def in_float64() -> nn.Module:
    return methods.in_float64(small_net())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_method_agrees_with_the_reference(case: Case, explainer: camrt.Explainer) -> None:
    """A batch of images with a class each, and one image with several classes."""
    tap = next(t for t in explainer.manifest.taps if "last" in t.roles)
    images = torch.from_numpy(IMAGES).double()
    want = np.stack([case.reference(in_float64(), images[i : i + 1], t, tap).numpy() for i, t in enumerate(TARGETS)])
    assert (np.ptp(want, axis=(1, 2)) > 0.05).sum() >= 2, "a map that says nothing tests nothing"
    got = explainer.explain(IMAGES, case.method, TARGETS, **case.options)
    assert got.maps.dtype == np.float32
    assert largest_difference(got.maps, want.astype(np.float32)) < LIMIT
    several = explainer.explain(IMAGES[:1], case.method, [TARGETS], **case.options)
    assert several.maps.shape == (1, 3, 32, 32)
    assert largest_difference(several.maps[0, :1], want[:1].astype(np.float32)) < LIMIT
    alone = explainer.explain(IMAGES[:1], case.method, TARGETS[2], **case.options)
    assert largest_difference(several.maps[0, 2], alone.maps[0]) < 1e-5


def test_every_method_has_a_row() -> None:
    ours = {name for name, method in METHODS.items() if method.function.__module__.startswith("camrt.runtime.")}
    missing = ours - {case.method for case in CASES}
    assert not missing, (
        f"{missing}: add a row to LAYER_METHODS in camrt/verification/methods.py, or a Case in tests/test_methods.py"
    )


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_every_method_is_documented(method: Any) -> None:
    assert method.function.__doc__ and method.source
    for option in method.options:
        assert option in method.function.__doc__, f"{option} is not explained"


@pytest.mark.parametrize("method", methods.LAYER_METHODS)
def test_several_layers_are_averaged(method: str, explainer: camrt.Explainer) -> None:
    layers = ["block.0", "head"]
    recorded = record(in_float64(), torch.from_numpy(IMAGES[:1]).double(), 1, layers)
    want = methods.LAYER_METHODS[method](recorded, (32, 32)).numpy().astype(np.float32)
    result = explainer.explain(IMAGES[:1], method, 1, layers)
    assert largest_difference(result.maps, want) < LIMIT
    assert result.layers == ("block.0", "head") and (result.layer_weights == 0.5).all()


@pytest.mark.parametrize("method", ["score_cam_pp", "score_cam"])
def test_several_layers_of_masks_are_averaged(method: str, explainer: camrt.Explainer) -> None:
    result = explainer.explain(IMAGES[:2], method, 1, ["block.0", "head"])
    singles = [explainer.explain(IMAGES[:2], method, 1, layer) for layer in ("block.0", "head")]
    mean = np.mean([s.maps for s in singles], axis=0)
    low = mean.min((1, 2), keepdims=True)
    assert np.abs(result.maps - (mean - low) / (mean - low).max((1, 2), keepdims=True)).max() < 1e-5
    runs = [r.details["masked_runs"] for r in (result, *singles)]
    assert (runs[0] == runs[1] + runs[2]).all()


# ---- ScoreCAM++


class Dying(nn.Module):
    """Half of the channels of its last block are zero everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x).mean((2, 3)))


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> camrt.Explainer:
    torch.manual_seed(0)
    model = Dying().eval()
    with torch.no_grad():
        model.body[0].bias[::2] = -100.0  # type: ignore[index]
        model.fc.weight *= 3
    return camrt.load(camrt.export_model(model, tmp_path_factory.mktemp("m") / "dying.camrt", (3, 32, 32)))


@pytest.mark.parametrize("method", ["score_cam_pp", "score_cam"])
def test_dead_channels_never_run_and_change_nothing(
    method: str, dying: camrt.Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every channel run one by one: the same map, and half of the masks saved."""
    image = smooth_images((3, 32, 32), 1)
    result = dying.explain(image, method, 1)
    assert result.details["channels"][0] == 16 and result.details["masked_runs"][0] == 8
    backend = dying.backend
    program = backend.open(dying.bundle, dying.bundle.program("activations", ["body"])).run({"image": image})
    activation = program["activation:body"][0]
    assert (activation.max((1, 2)) == 0).sum() == 8
    raised = torch.nn.functional.interpolate(torch.from_numpy(activation)[None], (32, 32), mode="bilinear")[0].numpy()
    span = np.ptp(raised, axis=(1, 2), keepdims=True)
    gates = np.tanh(raised) if method == "score_cam_pp" else raised / np.where(span > 0, span, 1)
    logits = dying.classify((image * gates[:, None]).astype(np.float32)).astype(np.float64)
    scores = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[:, 1]
    total = (scores[:, None, None] * (gates if method == "score_cam_pp" else raised)).sum(0)
    want = (total - total.min()) / np.ptp(total)
    assert np.abs(result.maps[0] - want).max() < 1e-5


def test_sigmoid_relu_runs_one_mask_for_all_dead_channels(dying: camrt.Explainer) -> None:
    result = dying.explain(smooth_images((3, 32, 32), 1), "score_cam_pp", 1, variant="sigmoid_relu")
    assert result.details["masked_runs"][0] == 9


@pytest.mark.parametrize("variant", ["tanh", "tanh_mask_only", "sigmoid_relu"])
@pytest.mark.parametrize("baseline", ["none", "zero"])
def test_max_error_drops_channels_within_its_bound(variant: str, baseline: str, explainer: camrt.Explainer) -> None:
    """The unnormalised map, which the bound is on, moves by at most the bound that is reported."""
    options = {"variant": variant, "baseline": baseline}
    whole = explainer.explain(IMAGES[:1], "score_cam_pp", 1, **options)
    assert whole.details["error_bound"][0] == 0 and whole.details["masked_runs"][0] >= 11
    dropped = explainer.explain(IMAGES[:1], "score_cam_pp", 1, max_error=1.8, **options)
    bound, runs = dropped.details["error_bound"][0], dropped.details["masked_runs"][0]
    assert 0 < bound <= 1.8 and runs < whole.details["masked_runs"][0]
    unscaled = [unnormalised(explainer, IMAGES[:1], e, options) for e in (0.0, 1.8)]
    moved = np.abs(unscaled[0] - unscaled[1]).max()
    assert 0 < moved <= bound
    everything = explainer.explain(IMAGES[:1], "score_cam_pp", 1, max_error=1e6, **options)
    assert everything.details["masked_runs"][0] == 0 and not everything.maps.any()


@pytest.mark.parametrize("kind", ["tanh", "sigmoid_relu", "identity"])
@pytest.mark.parametrize("grid", [(7, 7), (1, 5), (1, 1), (9, 3)])
def test_no_pixel_moves_by_more_than_the_bound(kind: str, grid: tuple[int, int]) -> None:
    """Which is smaller than the sum of the channels' largest values, as these lie at different places."""
    rng = np.random.default_rng(0)
    activations = (rng.normal(size=(30, *grid)) * rng.uniform(0, 3, (30, 1, 1))).astype(np.float32)
    order, bounds = error_bounds(activations, kind)
    gates = gate(upsample(activations, (33, 40)), kind)[order].astype(np.float64)
    single = np.cumsum(gate(np.abs(activations).max(axis=(1, 2)), kind)[order])
    assert (np.diff(bounds) >= 0).all() and (bounds <= single * (1 + 1e-6)).all()
    assert grid == (1, 1) or bounds[-1] < 0.99 * single[-1]
    for signs in (np.sign(gates[:, 5, 7]), np.sign(gates[:, 20, 33]), rng.uniform(-1, 1, 30)):
        moved = np.abs(np.cumsum(signs[:, None, None] * gates, axis=0)).max(axis=(1, 2))
        assert (moved <= bounds * (1 + 1e-6)).all()


def unnormalised(explainer: camrt.Explainer, image: np.ndarray, max_error: float, options: dict) -> np.ndarray:
    """sum_k s_k H_k before ReLU and min-max."""
    from camrt.runtime.cams import masking

    seen: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "_finished", lambda runs, totals: seen.append(totals[0]) or totals[0])
        explainer.explain(image, "score_cam_pp", 1, max_error=max_error, **options)
    return seen[-1]


def test_masks_do_not_outlive_their_batch(explainer: camrt.Explainer) -> None:
    """The buffers of a lane hold one batch of masks, whatever the number of channels."""
    held: list[int] = []
    small = camrt.Explainer(explainer.bundle, explainer.backend, max_batch=2)
    share = MaskedRuns.share

    def spy(runs: MaskedRuns, count: int, work: Any) -> Any:
        def noted(lane: Lane) -> Any:
            assert lane.gates is not None
            held.extend([lane.masked.nbytes + lane.gates.nbytes] * len(lane.batches))
            return work(lane)

        return share(runs, count, noted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedRuns, "share", spy)
        result = small.explain(IMAGES[:1], "score_cam_pp", 1)
    assert len(held) == 6 and set(held) == {2 * 4 * 32 * 32 * 4}
    assert largest_difference(result.maps, explainer.explain(IMAGES[:1], "score_cam_pp", 1).maps) < 1e-5


def test_scores_are_the_same_bits_each_time(exported: Path) -> None:
    runs = [camrt.load(exported, threads=2, max_batch=3).explain(IMAGES, "score_cam_pp", 1).maps for _ in range(4)]
    assert all((r == runs[0]).all() for r in runs)


# ---- Integrative CAM


@pytest.mark.parametrize("smooth", [*SMOOTH, square], ids=_said)
def test_a_layer_sums_to_the_smooth_score(smooth: Any, explainer: camrt.Explainer) -> None:
    """The bias makes sum_ij (sum_k w_k A_k + b / (h w)) equal to Y, here both divided by f'(S)."""
    seeds = np.eye(5, dtype=np.float32)[TARGETS][:, None]
    (batch,) = batches(IMAGES, seeds, False, 16)
    data = read(explainer.session, METHODS["integrative_cam"], batch, CONVOLUTIONS, {"reading": "residual"})
    of_score = terms(smooth, data.logits, data.seeds)
    for activation, gradient in data.pairs():
        np.testing.assert_allclose(residual_map(activation, gradient, of_score).sum((1, 2)), of_score.value, rtol=1e-5)


class Rescaled(nn.Module):
    """The small network with its second tap times c, and what follows it times 1 / c: the same function."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.net = small_net()
        with torch.no_grad():
            self.net.head[0].weight *= factor  # type: ignore[index]
            self.net.head[0].bias *= factor  # type: ignore[index]
            self.net.fc.weight /= factor  # type: ignore[operator]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_layer_weights_do_not_change_when_a_layer_is_rescaled(tmp_path: Path) -> None:
    results = []
    for i, factor in enumerate((1.0, 37.0)):
        path = camrt.export_model(Rescaled(factor), tmp_path / f"{i}.camrt", (3, 32, 32), "conv")
        results.append(camrt.load(path).explain(IMAGES, "integrative_cam", 1, reading="residual"))
    np.testing.assert_allclose(results[0].logits, results[1].logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results[0].layer_weights, results[1].layer_weights, rtol=1e-4)
    np.testing.assert_allclose(results[0].layer_weights.sum(1), 1, rtol=1e-5)
    assert np.abs(results[0].maps - results[1].maps).max() < 1e-3


# ---- awkward networks and wrong arguments


class OneChannel(nn.Module):
    """One channel, one class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 1, 3, 1, 1), nn.ReLU())
        self.fc = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x).mean((2, 3)))


class Flat(nn.Module):
    """Its activations are the same at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(0 * x + 1).mean((2, 3)))


@pytest.mark.parametrize("make", [OneChannel, Flat])
@pytest.mark.parametrize("method", list(METHODS))
def test_awkward_networks(make: Any, method: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A channel count of one, one class, constant activations: a finite map, constant where nothing varies, or a
    refusal.
    """
    torch.manual_seed(3)
    explainer = camrt.load(camrt.export_model(make().eval(), tmp_path / "net.camrt", (3, 16, 16)))
    if make is OneChannel and method == "finer_cam":
        with pytest.raises(camrt.CamrtError, match="finer_cam compares classes, and this network has one"):
            explainer.explain(smooth_images((3, 16, 16), 2), method)
        return
    result = explainer.explain(smooth_images((3, 16, 16), 2), method)
    assert result.maps.shape == (2, 16, 16) and np.isfinite(result.maps).all()
    if make is Flat and method not in ("full_grad", "winsor_cam"):
        assert not np.ptp(result.maps, axis=(1, 2)).any()


def test_one_class_has_a_probability(tmp_path: Path) -> None:
    """A single logit's softmax is always 1; its sigmoid says something."""
    torch.manual_seed(3)
    explainer = camrt.load(camrt.export_model(OneChannel().eval(), tmp_path / "net.camrt", (3, 16, 16)))
    images = smooth_images((3, 16, 16), 2)
    logits = explainer.classify(images)
    np.testing.assert_allclose(explainer.probabilities(images), 1 / (1 + np.exp(-logits)), rtol=1e-5)
    with pytest.raises(camrt.CamrtError, match="the softmax of one class is always 1"):
        explainer.explain(images, "integrative_cam", smooth="softmax")


class Squeezed(nn.Module):
    """Gates its channels by a convolution of their means, as squeeze-and-excitation does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, 1, 1)
        self.gate = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return self.fc((x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()).relu().mean((2, 3)))


def test_a_layer_without_a_grid_is_refused_where_its_map_would_say_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = camrt.export_model(Squeezed().eval(), tmp_path / "net.camrt", (3, 16, 16), "conv")
    explainer, images = camrt.load(path), smooth_images((3, 16, 16), 1)
    assert explainer.explain(images, "winsor_cam", 1, percentile=0).layers == ("body", "gate")
    for method in ("grad_cam", "score_cam_pp"):
        with pytest.raises(camrt.CamrtError, match="layer 'gate' has no grid, it is 1 x 1"):
            explainer.explain(images, method, layers=["body", "gate"])


def test_a_bundle_without_the_methods_layers_says_how_to_get_them(tmp_path: Path) -> None:
    conv = camrt.load(camrt.export_model(small_net(), tmp_path / "conv.camrt", (3, 32, 32), ["stem"]))
    for method in ("score_cam_pp", "recipro_cam", "grad_cam"):
        with pytest.raises(
            camrt.CamrtError, match=rf"{method} needs the layers 'last', .* export it with layer 'head' as well"
        ):
            conv.explain(IMAGES, method)
    last = camrt.load(camrt.export_model(small_net(), tmp_path / "last.camrt", (3, 32, 32), "last"))
    with pytest.raises(
        camrt.CamrtError, match=r"integrative_cam needs the layers 'conv', .* export it with --layers conv"
    ):
        last.explain(IMAGES, "integrative_cam")


REFUSALS = [
    ("score_cam_pp", {"variant": "relu"}, "variant 'relu': use tanh, tanh_mask_only, sigmoid_relu"),
    ("score_cam_pp", {"baseline": "black"}, "baseline 'black': use none, zero"),
    ("score_cam_pp", {"max_error": -1}, "max_error -1: use a number from 0"),
    ("score_cam", {"variant": "tanh"}, "variant 'tanh': use original, pytorch_grad_cam"),
    ("recipro_cam", {"variant": "paper"}, "variant 'paper': use original, openvino_xai"),
    ("integrative_cam", {"smooth": "log"}, "smooth 'log': use identity, exp, softmax, softplus, or camrt.Smooth"),
    (
        "integrative_cam",
        {"smooth": "softmax", "target": np.array([[1.0, -1, 0, 0, 0]])},
        "smooth='softmax' explains classes, not seed arrays",
    ),
    (
        "integrative_cam",
        {"smooth": camrt.Smooth(np.square, np.zeros_like, np.ones_like, np.zeros_like)},
        "the smooth function's first derivative is zero or infinite at a score",
    ),
    ("finer_cam", {"comparisons": 0}, "comparisons 0: use a whole number from 1"),
    ("finer_cam", {"target": np.array([[1.0, -1, 0, 0, 0]])}, "finer_cam explains classes, not seed arrays"),
    ("full_grad", {"layers": "last"}, "full_grad reads the whole network: leave layers out"),
    ("ablation_cam", {"layers": ["stem"]}, "has no program 'trunk' for stem: .* export it with --layers last"),
    ("eigen_cam", {"target": 9}, r"class 9 is out of range: the network has classes 0\.\.4"),
    ("grad_cam", {"target": np.array([[1e-50, 0, 0, 0, 0]])}, "every row needs finite entries, not all of them zero"),
    ("grad_cam", {"target": [[1], [1, 2]]}, "target: every image needs the same number of classes"),
    ("grad_cam", {"target": np.zeros((1, 0, 5), np.float32)}, r"seed array of shape \(1, 0, 5\)"),
    ("gradcam", {}, "no method 'gradcam': did you mean 'grad_cam'"),
]


@pytest.mark.parametrize(("method", "arguments", "message"), REFUSALS, ids=[f"{r[0]} {r[2][:30]}" for r in REFUSALS])
def test_refusals_are_one_line(method: str, arguments: dict, message: str, explainer: camrt.Explainer) -> None:
    with pytest.raises(camrt.CamrtError, match=message) as caught:
        explainer.explain(IMAGES[:1], method, **arguments)
    assert "\n" not in str(caught.value)


def test_eigen_cams_sign_is_not_decided_by_rounding() -> None:
    """Behind a layer norm the mean over channels is zero but for rounding: the sign is told by the distance from it."""

    def of(activation: np.ndarray) -> np.ndarray:
        return eigen_cam(SimpleNamespace(activations=[activation.astype(np.float32)], size=(6, 6))).maps[0]  # type: ignore[arg-type]

    for seed in range(20):
        random = np.random.default_rng(seed)
        tokens = random.standard_normal((6, 6, 32))
        tokens[1:3, 2:4] += 3 * random.standard_normal(32)  # what stands out
        normalized = (tokens - tokens.mean(axis=2, keepdims=True)).transpose(2, 0, 1)[None]
        for noise in (0, 1e-6, -1e-6):
            found = of(normalized + noise * random.standard_normal(normalized.shape))
            assert found[1:3, 2:4].min() > 0.5 > found[4:].max()
    shown = np.zeros((1, 2, 6, 6))
    shown[0, :, 0, 0], shown[0, :, 5, 5] = (1, -1), (-1, 1)  # symmetric: no rule tells the two apart
    with pytest.warns(UserWarning, match="rounding decides the sign"):
        of(shown)


def test_a_seed_array_is_a_contrast_of_probabilities(explainer: camrt.Explainer) -> None:
    """Score methods are linear in the seed before the ReLU: doubling it changes nothing after min-max."""
    seed = np.array([[1.0, -1.0, 0, 0, 0]], np.float32)
    for method in ("score_cam_pp", "score_cam", "recipro_cam", "ablation_cam"):
        first, second = (explainer.explain(IMAGES[:1], method, s).maps for s in (seed, 2 * seed))
        assert largest_difference(first, second) < 1e-5
        assert largest_difference(first, explainer.explain(IMAGES[:1], method, 0).maps) > 1e-3


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].options])
def test_options_of_any_type_are_used_or_refused(name: str, explainer: camrt.Explainer) -> None:
    values: list[Any] = [
        "90",
        None,
        True,
        [],
        {},
        [1, 2],
        float("nan"),
        float("inf"),
        -1,
        object(),
        np.array([1.0]),
        1j,
    ]
    for option in METHODS[name].options:
        for value in values:
            with contextlib.suppress(camrt.CamrtError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert np.isfinite(explainer.explain(IMAGES[:1], name, 1, **{option: value}).maps).all()


@pytest.mark.parametrize("layers", [-1, [-1], [None], 3, b"head", {"head": 1}, [["head"]], ""], ids=str)
def test_layers_that_are_no_names_are_refused(layers: Any, explainer: camrt.Explainer) -> None:
    with pytest.raises(camrt.CamrtError, match=r"layers .*: pass names, 'conv' or 'last'|has no layer ''"):
        explainer.explain(IMAGES[:1], layers=layers)


def test_a_fraction_is_asked_about(explainer: camrt.Explainer) -> None:
    with pytest.warns(UserWarning, match=r"percentile 0.9 is of 0\.\.100: did you mean 90\?"):
        explainer.explain(IMAGES[:1], percentile=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for percentile in (0, 1, 0.0, 100, np.float32(50)):
            explainer.explain(IMAGES[:1], percentile=percentile, layer_aggregation="max")


# ---- methods of other packages


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, "gave NoneType, it must give a Result"),
        (Result(np.zeros((3, 32, 32)), np.ones((3, 1), np.float32)), r"gave maps float64\[3, 32, 32\], it must give"),
        (Result(np.zeros((3, 32, 32), np.float32), np.ones((3, 7), np.float32)), r"layer_weights float32\[3, 7\], it"),
        (Result(np.zeros((3, 32, 32), np.float32), None), r"layer_weights NoneType, it must give float32\[3, 1\]"),
        (
            Result(np.full((3, 32, 32), np.nan, np.float32), np.ones((3, 1), np.float32)),
            "the map of wrong holds NaN or infinity, though the network's logits are finite",
        ),
    ],
    ids=["nothing", "dtype", "weights", "no weights", "NaN"],
)
def test_what_a_method_gives_is_checked(
    result: Any, said: str, explainer: camrt.Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = dataclasses.replace(METHODS["grad_cam"], name="wrong", function=lambda data: result)
    monkeypatch.setitem(METHODS, "wrong", wrong)
    with pytest.raises(camrt.CamrtError, match=said):
        explainer.explain(IMAGES, "wrong")


PLUGIN = """
import numpy as np
from camrt.kernels import upsample
from camrt.methods import Gradients, Result, cam

@cam("mean_cam", needs=Gradients, layers="last", source="a test")
def mean_cam(data: Gradients, power: float = 1.0) -> Result:
    '''The mean gradient, to a power.'''
    _, gradient = next(iter(data.pairs()))
    maps = np.abs(gradient.mean(axis=1)) ** power
    return Result(upsample(maps, data.size) if power > 0 else maps, np.ones((len(maps), 1), np.float32))
"""


def test_a_package_brings_its_methods(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    for name, module in (("plugin", "plugin"), ("broken", "nowhere.at_all")):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[camrt.methods]\n{name} = {module}\n")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "black.png")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def camrt_says(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "camrt", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    listed = camrt_says("methods")
    assert "mean_cam" in listed.stdout and listed.stdout.index("mean_cam") > listed.stdout.index("winsor_cam")
    assert "the methods of nowhere.at_all cannot be used: No module named 'nowhere'" in listed.stderr
    done = camrt_says("explain", str(exported), "black.png", "--method", "mean_cam:power=2")
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "explanations" / "black.npy").shape == (32, 32)
    wrong = camrt_says("explain", str(exported), "black.png", "--method", "mean_cam:power=0", "--out", "wrong")
    assert "the method mean_cam gave maps float32[1, 8, 8], it must give float32[1, 32, 32]" in wrong.stderr
    assert "no option 'powr'" in camrt_says("explain", str(exported), "black.png", "--method", "mean_cam:powr=2").stderr
