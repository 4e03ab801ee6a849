"""Recipro-CAM and Ablation-CAM where the network reads only the means over the grid of a layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import camrt
from camrt.export.probes import smooth_images
from camrt.runtime.bundle.kinds import Kind
from camrt.runtime.bundle.reading import read_bundle
from camrt.verification.oracle import module_oracle
from camrt.verification.verify import verify_bundle

Pool = Callable[[torch.Tensor], torch.Tensor]
IMAGES = smooth_images((3, 24, 20), 2)
MEANS: dict[str, Pool] = {
    "global": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "mean": lambda x: x.mean((2, 3)),
    "negative axes": lambda x: x.mean((-1, -2), keepdim=True).flatten(1),
    "whole window": lambda x: F.avg_pool2d(x, (12, 10)).flatten(1),
    "read twice": lambda x: x.mean((2, 3)) + F.adaptive_avg_pool2d(x, 1).flatten(1).tanh(),
    "gated": lambda x: x.mean((2, 3)) * torch.sigmoid(x.mean((2, 3))),
}
OTHERS: dict[str, Pool] = {
    "means and maxima": lambda x: x.mean((2, 3)) + x.amax((2, 3)),
    "one axis": lambda x: x.mean(3).amax(2),
    "padded window": lambda x: F.avg_pool2d(x, (12, 10), padding=(1, 1)).flatten(1)[:, :6],
    "half a window": lambda x: F.avg_pool2d(x, (6, 10)).flatten(1)[:, :6],
}


class Pooled(nn.Module):
    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.SiLU())
        self.wide, self.fc = nn.Linear(6, 16), nn.Linear(16, 4)
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.wide(self.pool(self.body(x)))))


def network(pool: Pool) -> nn.Module:
    torch.manual_seed(0)
    return Pooled(pool).eval()


def whole(x: torch.Tensor) -> torch.Tensor:
    """The means in a form that is not seen to be means."""
    return (x.flatten(2) @ torch.full((x.shape[2] * x.shape[3], 1), 1 / (x.shape[2] * x.shape[3]))).flatten(1)


def exported(pool: Pool, folder: Path) -> camrt.Explainer:
    return camrt.load(camrt.export_model(network(pool), folder / "pooled.camrt", (3, 24, 20), "last"), "onnxruntime")


def head_reads(explainer: camrt.Explainer) -> list[str]:
    return list(explainer.bundle.program(Kind.HEAD).inputs)


@pytest.mark.parametrize("pool", MEANS.values(), ids=MEANS)
def test_the_head_of_means_gives_the_same_maps(pool: Pool, tmp_path: Path) -> None:
    by_means = exported(pool, tmp_path)
    assert head_reads(by_means) == ["means"]
    assert by_means.bundle.program(Kind.TRUNK).outputs["means"] == ["batch", 6]

    def hidden(x: torch.Tensor) -> torch.Tensor:
        means = whole(x)
        return {"read twice": means + means.tanh(), "gated": means * means.sigmoid()}.get(name, means)

    name = next(n for n, p in MEANS.items() if p is pool)
    by_maps = exported(hidden, tmp_path / "whole")
    assert head_reads(by_maps) == ["activation"]
    np.testing.assert_allclose(by_means.classify(IMAGES), by_maps.classify(IMAGES), atol=1e-5)
    choices: list[tuple[str, dict[str, Any]]] = [
        ("recipro_cam", {}),
        ("recipro_cam", {"gaussian": True}),
        ("recipro_cam", {"variant": "openvino_xai"}),
        ("ablation_cam", {}),
    ]
    for method, options in choices:
        got, want = (e.explain(IMAGES, method, [1, 2], **options).maps for e in (by_means, by_maps))
        assert np.ptp(want) > 0.1
        np.testing.assert_allclose(got, want, atol=2e-4)


def test_means_that_are_the_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.SiLU(), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    path = camrt.export_model(model, tmp_path / "means.camrt", (3, 24, 20), "last")
    explainer = camrt.load(path, "onnxruntime")
    assert head_reads(explainer) == ["means"]
    with torch.no_grad():
        want = model(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(explainer.classify(IMAGES), want, atol=1e-5)
    assert verify_bundle(explainer.bundle, module_oracle(model, "the network")).passed
    assert np.ptp(explainer.explain(IMAGES, "recipro_cam", 1, variant="openvino_xai").normalized()) == 1


@pytest.mark.parametrize("pool", OTHERS.values(), ids=OTHERS)
def test_what_reads_more_than_the_means_gets_the_map(pool: Pool, tmp_path: Path) -> None:
    explainer = exported(pool, tmp_path)
    assert head_reads(explainer) == ["activation"]
    assert "means" not in explainer.bundle.program(Kind.TRUNK).outputs


def test_a_bundle_of_means_verifies(tmp_path: Path) -> None:
    path = camrt.export_model(
        network(MEANS["mean"]),
        tmp_path / "pooled.camrt",
        (3, 24, 20),
        precision=["fp32", "fp16"],
    )
    report = verify_bundle(read_bundle(path), module_oracle(network(MEANS["mean"]), "the network"))
    assert report.passed, report
    camrt.add_references(path)
    assert camrt.check(path, "onnxruntime").passed
    assert {tuple(p.inputs) for p in read_bundle(path).manifest.programs if p.kind == Kind.HEAD} == {("means",)}
