"""Which tensors count as feature maps: networks that were once mistaken, each with a map that would have
looked right.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from support import small_net
from torch import nn

import camrt
from camrt.export.probes import smooth_images
from camrt.verification.oracle import module_oracle
from camrt.verification.verify import verify_bundle


class Gated(nn.Module):
    """Squeeze and excitation: maps times gates of 1 x 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))


class ChannelNorm(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GatedLast(nn.Module):
    """A layer norm early on, and a last block that ends in a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), ChannelNorm(8)
        self.block = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), Gated(12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.block(self.norm(self.stem(x))).mean((2, 3)))


class GroupNormed(nn.Module):
    """Group norm folds channels into its groups and back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x).relu().mean((2, 3)))


class Windowed(nn.Module):
    """A convolution inside windows: four rows of the batch for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        b, c, h, w = x.shape
        y = x.reshape(b, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, h // 2, w // 2)
        y = self.inner(y).reshape(b, 2, 2, c, h // 2, w // 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)
        return self.fc((x + y).relu().mean((2, 3)))


class Triplet(nn.Module):
    """Attention over rows and channels: a convolution whose grid is not the image's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.spatial = (
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.Conv2d(2, 1, 7, 1, 3),
            nn.Conv2d(2, 1, 7, 1, 3),
        )
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        turned = x.permute(0, 2, 1, 3)
        both = torch.cat([turned.amax(1, keepdim=True), turned.mean(1, keepdim=True)], 1)
        rows = (turned * torch.sigmoid(self.attention(both))).permute(0, 2, 1, 3)
        both = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return self.fc(self.body(rows + x * torch.sigmoid(self.spatial(both))).mean((2, 3)))


class Context(nn.Module):
    """Behind the tap it reads gates of which each image has two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        b, c, h, w = x.shape
        gate = torch.sigmoid(x.reshape(b * 2, c // 2, h, w).mean((2, 3)) * 5)
        y = (self.block(x).reshape(b * 2, c // 2, h, w) * gate[:, :, None, None]).reshape(b, c, h, w)
        return self.fc(y.mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "want", "left_out"),
    [
        (
            GatedLast,
            {
                "stem": ((16, 24), ("conv",)),
                "block.0": ((8, 12), ("conv",)),
                "block.2.gate": ((1, 1), ("conv",)),
                "block.2": ((8, 12), ("last",)),
            },
            None,
        ),
        (
            GroupNormed,
            {"body.0": ((16, 24), ("conv",)), "body.3": ((16, 24), ("conv",)), "relu": ((16, 24), ("last",))},
            None,
        ),
        (Windowed, {"stem": ((16, 24), ("conv",)), "relu": ((16, 24), ("last",))}, "inner"),
        (
            Triplet,
            {
                "stem": ((16, 24), ("conv",)),
                "spatial": ((16, 24), ("conv",)),
                "body.0": ((16, 24), ("conv",)),
                "body": ((16, 24), ("last",)),
            },
            "attention",
        ),
    ],
)
def test_layers_are_what_they_are(make: type[nn.Module], want: dict, left_out: str | None, tmp_path: Path) -> None:
    """And every map of the layers that are left agrees with PyTorch."""
    torch.manual_seed(0)
    model = make().eval()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        path = camrt.export_model(model, tmp_path / "model.camrt", (3, 32, 48))
    said = [str(w.message) for w in seen if "skipped" in str(w.message)]
    assert said == ([f"skipped, because they are not known to be feature maps: {left_out}"] if left_out else [])
    assert {t.name: (t.grid, t.roles) for t in camrt.load(path).manifest.taps} == want
    report = verify_bundle(camrt.load(path).bundle, module_oracle(model, "the model"))
    assert report.passed, [r for r in report.rows if not r.passed][:5]


def test_a_context_with_several_rows_an_image_is_not_cut(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = camrt.export_model(Context().eval(), tmp_path / "model.camrt", (3, 32, 32), ["block"])
    explainer = camrt.load(path)
    assert {p.kind for p in explainer.manifest.programs}.isdisjoint({"trunk", "head"})
    with pytest.raises(camrt.CamrtError, match="has no program 'trunk' for block"):
        explainer.explain(smooth_images((3, 32, 32), 1), "ablation_cam", 1, "block")


class Counting(nn.Module):
    """Starts with an operator that has no gradient rule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x + torch.linalg.det(x)[..., None, None] / 1e9)


def test_an_operator_without_a_rule_before_the_layers_costs_full_grad_alone(tmp_path: Path) -> None:
    explainer = camrt.load(camrt.export_model(Counting().eval(), tmp_path / "model.camrt", (3, 32, 32), ["net.block"]))
    images = smooth_images((3, 32, 32), 1)
    assert np.isfinite(explainer.explain(images, "grad_cam", 1, ["net.block"]).maps).all()
    with pytest.raises(camrt.CamrtError, match="no program 'full_grad': it needs a gradient rule for every operator"):
        explainer.explain(images, "full_grad", 1)
