"""Exact values from other projects' tests, by our programs and metrics: their numbers, our code.

captum (BSD-3-Clause, commit faac087): tests/attr/layer/test_grad_cam.py and test_layer_gradient_x_activation.py, on
the models of captum/testing/helpers/basic_models.py. torch-cam (Apache-2.0, commit f44afef): tests/test_metrics.py,
tests/test_methods_gradient.py. captum's maps are sums of mean gradient times activation, neither rectified nor scaled:
the `layer_maps` program's. Left out, because camrt has no counterpart: several inputs, embeddings, layers that the
output does not depend on, guided backpropagation, and torch-cam's NaN counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import camrt
from camrt.runtime import metrics
from camrt.runtime.backends import create
from camrt.runtime.bundle.reading import Bundle, read_bundle


class OneConv(nn.Module):
    """captum's BasicModel_ConvNet_One_Conv; `front` passes the image on, so that the first layer's input is a layer's
    output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv2d(1, 1, 1, bias=False)
        self.conv1 = nn.Conv2d(1, 2, 3)
        self.relu1 = nn.ReLU()
        self.fc1 = nn.Linear(8, 4, bias=False)
        self.relu2 = nn.ReLU()
        with torch.no_grad():
            self.front.weight.fill_(1)
            self.conv1.weight.fill_(1)
            assert self.conv1.bias is not None
            self.conv1.bias.copy_(torch.tensor([-50.0, -75.0]))
            self.fc1.weight.copy_(torch.tensor([1.0] * 5 + [-1.0] * 3).repeat(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu2(self.fc1(self.relu1(self.conv1(self.front(x))).flatten(1)))


def linear(rows: Sequence[Sequence[float]], bias: Sequence[float]) -> nn.Conv2d:
    """A linear layer on an image of one pixel."""
    layer = nn.Conv2d(len(rows[0]), len(rows), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows)[:, :, None, None])
        assert layer.bias is not None
        layer.bias.copy_(torch.tensor(bias))
    return layer


class MultiLayer(nn.Module):
    """captum's BasicModel_MultiLayer; `multi`: with its second branch, which reads the input itself."""

    def __init__(self, multi: bool) -> None:
        super().__init__()
        self.linear0 = linear(np.eye(3).tolist(), [0.0] * 3)
        self.linear1 = linear([[1.0] * 3] * 4, [-10.0, 1.0, 1.0, 1.0])
        self.linear1_alt = linear([[1.0] * 3] * 4, [-10.0, 1.0, 1.0, 1.0]) if multi else None
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.linear2 = linear([[1.0] * 4] * 2, [-1.0, 1.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.relu1(self.linear1(self.linear0(x)))
        if self.linear1_alt is not None:
            found = found + self.relu2(self.linear1_alt(x))
        return self.linear2(found).flatten(1)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models: dict[str, tuple[nn.Module, tuple[int, int, int], list[str]]] = {
        "one": (OneConv(), (1, 4, 4), ["front", "conv1", "relu1"]),
        "multi": (MultiLayer(False), (3, 1, 1), ["linear0", "linear1", "relu1", "linear2"]),
        "branches": (MultiLayer(True), (3, 1, 1), ["linear0", "relu1", "relu2"]),
    }
    folder = tmp_path_factory.mktemp("foreign")
    return {
        name: camrt.export_model(model.eval(), folder / f"{name}.camrt", shape, layers)
        for name, (model, shape, layers) in models.items()
    }


def run(path: Path, kind: str, layer: str, image: np.ndarray) -> dict[str, np.ndarray]:
    """A program's outputs for class 0."""
    bundle: Bundle = read_bundle(path)
    program = bundle.program(kind, [layer])
    seed = np.zeros((1, bundle.manifest.num_classes), np.float32)
    seed[0, 0] = 1
    out = create("onnxruntime").open(bundle, program).run({"image": image.astype(np.float32)[None], "seed": seed})
    if kind == "gradients":
        return {"activation": out[f"activation:{layer}"][0], "gradient": out[f"gradient:{layer}"][0]}
    taps = [t for t in bundle.manifest.taps if t.name in program.taps]
    starts = np.cumsum([0, *(t.grid[0] * t.grid[1] for t in taps)])
    index = [t.name for t in taps].index(layer)
    return {"map": out["maps"][0, starts[index] : starts[index + 1]].reshape(taps[index].grid)}


RAMP = np.arange(16.0).reshape(1, 4, 4)
DENTED = np.where(RAMP == 5, -4, RAMP)


@pytest.mark.parametrize(
    ("image", "layer", "want"),
    [
        (RAMP, "conv1", [[11.25, 13.5], [20.25, 22.5]]),
        (RAMP, "relu1", [[0, 4], [28, 32.5]]),
        (DENTED, "front", 0.5625 * DENTED[0]),
        (RAMP + 1, "conv1", [[14.5, 19], [32.5, 37]]),  # captum adds a second input of ones
    ],
    ids=["convolution", "rectified", "a layer's input", "two inputs"],
)
def test_captum_grad_cam(bundles: dict[str, Path], image: np.ndarray, layer: str, want: Any) -> None:
    got = run(bundles["one"], "layer_maps", layer, image)["map"]
    np.testing.assert_allclose(got, want, atol=1e-5)
    parts = run(bundles["one"], "gradients", layer, image)
    weights = parts["gradient"].mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose((weights * parts["activation"]).sum(axis=0), want, atol=1e-5)


def test_captum_grad_cam_by_channel(bundles: dict[str, Path]) -> None:
    parts = run(bundles["one"], "gradients", "conv1", RAMP)
    weights = parts["gradient"].mean(axis=(1, 2), keepdims=True)
    want = [[[-3.75, 3], [23.25, 30]], [[15, 10.5], [-3, -7.5]]]
    np.testing.assert_allclose(weights * parts["activation"], want, atol=1e-5)


def test_captum_grad_cam_rectified_is_ours_up_to_its_scale(bundles: dict[str, Path]) -> None:
    """Where the grid is the image's nothing is resized, and ours is theirs divided by its maximum."""
    got = camrt.load(bundles["one"]).explain(DENTED.astype(np.float32)[None], "grad_cam", 0, ["front"]).maps[0]
    want = np.where(RAMP[0] == 5, 0, 0.5625 * RAMP[0])
    np.testing.assert_allclose(got * want.max(), want, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "pixel", "layer", "want"),
    [
        ("multi", [0, 100, 0], "linear0", [0, 400, 0]),
        ("multi", [0, 100, 0], "linear1", [90, 101, 101, 101]),
        ("multi", [3, 4, 0], "relu1", [0, 8, 8, 8]),
        ("multi", [0, 100, 0], "linear2", [392, 0]),
        ("multi", [0, 70, 30], "relu1", [90, 101, 101, 101]),
        ("branches", [3, 4, 0], "relu1", [0, 8, 8, 8]),
        ("branches", [3, 4, 0], "relu2", [0, 8, 8, 8]),
        ("branches", [3, 4, 0], "linear0", [9, 12, 0]),
        ("branches", [0, 6, 0], "relu1", [0, 7, 7, 7]),
    ],
)
def test_captum_gradient_times_activation(
    bundles: dict[str, Path], model: str, pixel: list[float], layer: str, want: list[float]
) -> None:
    image = np.reshape(pixel, (3, 1, 1))
    parts = run(bundles[model], "gradients", layer, image)
    np.testing.assert_allclose((parts["gradient"] * parts["activation"]).ravel(), want, atol=1e-4)
    got = run(bundles[model], "layer_maps", layer, image)[
        "map"
    ]  # of one pixel Grad-CAM is the sum: captum's 400 and 21
    np.testing.assert_allclose(got, [[sum(want)]], atol=1e-4)


# ---- torch-cam

E = np.array([[[0.4, 0.3], [0.2, 0.1]]], np.float32)


def total(images: np.ndarray) -> np.ndarray:
    """torch-cam's model: the score of its class is the sum of the image."""
    return images.reshape(len(images), -1).sum(axis=1)


def test_torchcam_average_drop() -> None:
    """Theirs is a fraction; ours a percentage."""
    cam = np.array([[1, 0], [0, 0]], np.float32)
    before, after = total(E[None]), total((E * cam)[None])
    drop = metrics.average_drop(before, after)
    assert np.mean(drop) / 100 == pytest.approx(0.6 / (1 + 1e-7), rel=1e-6)
    assert np.mean(metrics.increase_in_confidence(before, after)) == 0


def test_torchcam_deletion_and_insertion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs inserts into zeros, ours into a blurred image."""
    zeros = np.zeros_like(E)
    np.testing.assert_allclose(total(metrics.exchanged(E, zeros, E[0], 2)), [1, 0.3, 0], atol=1e-6)
    np.testing.assert_allclose(total(metrics.exchanged(zeros, E, E[0], 2)), [0, 0.7, 1], atol=1e-6)
    assert metrics.deletion(E, E[0], total, 2) == pytest.approx(0.4, rel=1e-6)
    monkeypatch.setattr(metrics, "blurred", np.zeros_like)
    assert metrics.insertion(E, E[0], total, 2) == pytest.approx(0.6, rel=1e-6)


def test_torchcam_steps_that_do_not_divide() -> None:
    """Theirs are of equal size but for the last; ours are spread evenly: the points that both have agree."""
    row = np.array([[[0.3, 0.25, 0.2, 0.15, 0.1]]], np.float32)
    deleted = total(metrics.exchanged(row, np.zeros_like(row), row[0], 5))[[0, 2, 4, 5]]
    inserted = total(metrics.exchanged(np.zeros_like(row), row, row[0], 5))[[0, 2, 4, 5]]
    np.testing.assert_allclose(deleted, [1, 0.45, 0.1, 0], atol=1e-6)
    np.testing.assert_allclose(inserted, [0, 0.55, 0.9, 1], atol=1e-6)
    fractions = [0, 0.4, 0.8, 1]
    assert np.trapezoid(deleted, fractions) == pytest.approx(0.41, rel=1e-5)
    assert np.trapezoid(inserted, fractions) == pytest.approx(0.59, rel=1e-5)


def test_torchcam_differences_are_taken_before_the_rectifier(tmp_path: Path) -> None:
    """Of the difference from the mean of two rivals nothing is left, though one of the single differences is
    positive.
    """
    features, head = nn.Conv2d(1, 1, 1, bias=False), nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        features.weight.fill_(1)
        head.weight.copy_(torch.tensor([[1.0], [3.0], [-1.0]]))
    model = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    path = camrt.export_model(model.eval(), tmp_path / "finer.camrt", (1, 2, 2), ["0"])
    bundle = read_bundle(path)
    opened = create("onnxruntime").open(bundle, bundle.program("layer_maps", ["0"]))
    found = []
    for seed in ([1, -0.5, -0.5], [1, -1, 0], [1, 0, -1]):
        out = opened.run({"image": np.ones((1, 1, 2, 2), np.float32), "seed": np.array([seed], np.float32)})
        found.append(out["maps"][0])
    np.testing.assert_allclose(found, np.repeat([[0], [-0.5], [0.5]], 4, axis=1), atol=1e-6)
    assert np.maximum(found[0], 0).max() == 0 < np.maximum(found[1:], 0).mean(axis=0).max()
