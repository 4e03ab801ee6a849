"""Models, data and comparisons that several tests share."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import library, nn

from camrt.export.probes import smooth_images

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("CAMRT_DATA", ROOT.parent / "shared" / "data"))

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no real weights and photos: {DATA} is missing (CAMRT_DATA names another folder)"
)


def import_torchvision():
    """torchvision, also beside a PyTorch build that lacks its compiled operators, which classification does not use."""
    try:
        import torchvision
    except RuntimeError:  # an operator does not exist
        spec = importlib.util.find_spec("torchvision")
        assert spec is not None and spec.origin is not None
        text = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
        operators = library.Library("torchvision", "FRAGMENT")
        for name in sorted(set(re.findall(r"torchvision::(\w+)", text))):
            if not hasattr(torch.ops.torchvision, name):
                operators.define(f"{name}(...) -> Tensor")
        globals()["_torchvision_operators"] = operators  # definitions live as long as the library object
        import torchvision

    return torchvision


def warmed_up(model: nn.Module, shape: tuple[int, int, int], seed: int = 1) -> nn.Module:
    """The model in eval mode with batch norm statistics of smooth random images, so that activations neither die nor
    explode.
    """
    torch.manual_seed(seed)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average
            module.reset_running_stats()
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for i in range(3):
            model(torch.from_numpy(smooth_images(shape, 8, seed=10 + i)))
    return model.eval()


class SmallNet(nn.Module):
    """Convolutions with and without batch norm, an in-place ReLU, a residual sum, pooling, a linear head."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.head = nn.Sequential(nn.Conv2d(8, 12, 3, 1, 1), nn.ReLU(inplace=True))
        self.fc = nn.Linear(12, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.pool(x + self.block(x))
        return self.fc(self.head(x).mean((2, 3)))


def small_net(classes: int = 5, size: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return warmed_up(SmallNet(classes), (3, size, size))


class Mixing(nn.Module):
    """A network whose images change one another: its batch is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x - 0.5 * x.mean(0, keepdim=True))


class _PadBottomRight(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 1, 0, 1))


class MobileNetV1(nn.Module):
    """MobileNetV1, width 0.25, as the weights in the data folder lay it out."""

    def __init__(self) -> None:
        super().__init__()
        blocks, channels = [self._block(3, 8, 3, 2, 1)], 8
        outputs = [16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256]
        for out, stride in zip(outputs, [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1], strict=True):
            blocks.append(self._block(channels, channels, 3, stride, channels))
            blocks.append(self._block(channels, out, 1, 1, 1))
            channels = out
        self.features = nn.Sequential(*blocks)
        self.fc = nn.Linear(256, 1000)

    @staticmethod
    def _block(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
        padding = 1 if kernel == 3 and stride == 1 else 0
        layers = [
            nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3),
            nn.ReLU6(inplace=True),
        ]
        return nn.Sequential(*([_PadBottomRight()] if stride == 2 else []), *layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def mobilenet() -> nn.Module:
    """MobileNetV1 with its ImageNet weights, from the data folder."""
    from safetensors.torch import load_file

    model = MobileNetV1()
    model.load_state_dict(load_file(DATA / "mobilenet_v1_025_imagenet.safetensors"))
    return model.eval()


def scaled(maps: np.ndarray) -> np.ndarray:
    """Min-max over the last two axes."""
    low, high = maps.min((-2, -1), keepdims=True), maps.max((-2, -1), keepdims=True)
    return (maps - low) / (high - low)


def assert_maps_close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    """Shape, dtype and finiteness first, then the largest difference."""
    assert got.shape == want.shape, (got.shape, want.shape)
    assert got.dtype == want.dtype == np.float32, (got.dtype, want.dtype)
    assert want.size and np.isfinite(want).all() and np.isfinite(got).all()
    difference = np.abs(got - want).max()
    assert difference <= tolerance, f"largest difference {difference:.2e} exceeds {tolerance:.0e}"
