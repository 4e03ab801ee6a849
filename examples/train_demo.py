"""Trains the demo's network on scenes that it draws, and exports the bundle that ships in the package.

python examples/train_demo.py [--out camrt/demo/shapes.camrt] [--scenes 8000] [--epochs 10] [--weights BUNDLE]

About ten minutes on two cores; with --weights, which exports the weights of an earlier bundle again, some seconds.
Needs the export extra: pip install -e '.[export,cpu]'.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import camrt
from camrt.demo.scenes import CLASSES, SIZE, draw_scene

TEST_SEED = 1_000_000  # scenes from here on are never trained on
MEAN, STD = 0.5, 0.25


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm beside a projected shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.bn3(self.shortcut(x)))


class ShapeNet(nn.Module):
    """A small residual network: (B, 3, 128, 128) -> logits (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, 2, 2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block1 = Block(16, 24, 1)
        self.block2 = Block(24, 48, 2)
        self.block3 = Block(48, 80, 2)
        self.fc = nn.Linear(80, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.norm(self.stem(x))))
        x = self.block3(self.block2(self.block1(x)))
        return self.fc(x.mean((2, 3)))


def draw(seeds: range) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 3, SIZE, SIZE) uint8 and labels (N,)."""
    with ProcessPoolExecutor() as pool:
        scenes = list(tqdm(pool.map(draw_scene, seeds, chunksize=64), total=len(seeds), desc="drawing"))
    return np.stack([s[0].transpose(2, 0, 1) for s in scenes]), np.array([s[1] for s in scenes])


def as_input(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures.float() / 255 - MEAN) / STD


def augment(pictures: torch.Tensor) -> torch.Tensor:
    """Random mirroring, shifts, and a random order of the colours."""
    if torch.rand(()) < 0.5:
        pictures = pictures.flip(3)
    shift = torch.randint(-10, 11, (2,)).tolist()
    return torch.roll(pictures, shift, (2, 3))[:, torch.randperm(3)]


def accuracy(model: nn.Module, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(
            (model(as_input(p)).argmax(1) == t).sum().item()
            for p, t in zip(pictures.split(256), labels.split(256), strict=True)
        )
    return right / len(labels)


def weights_of(bundle: Path) -> dict[str, torch.Tensor]:
    """The network's state, from the forward graph of a bundle. Equal tensors have one name there."""
    graph = onnx.load(bundle / "activations.onnx").graph
    arrays = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {name.removeprefix("model."): array for name, array in arrays.items() if name.startswith("model.")}
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            norm = node.input[1].removeprefix("model.").removesuffix(".weight")
            for part, name in zip(("bias", "running_mean", "running_var"), node.input[2:], strict=True):
                state[f"{norm}.{part}"] = arrays[name]
    return state


def train(scenes: int, epochs: int) -> ShapeNet:
    """Trains a network from random weights, and prints its accuracy after each epoch."""
    started = time.time()
    torch.manual_seed(0)
    pictures, labels = (torch.from_numpy(a) for a in draw(range(scenes)))
    test_pictures, test_labels = (torch.from_numpy(a) for a in draw(range(TEST_SEED, TEST_SEED + 2000)))
    model = ShapeNet()
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * (scenes // 64), pct_start=0.15)
    for epoch in range(epochs):
        model.train()
        progress = tqdm(torch.randperm(scenes).split(64), desc=f"epoch {epoch + 1}/{epochs}")
        for rows in progress:
            if len(rows) < 64:
                continue
            batch = as_input(augment(pictures[rows])).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(batch), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}")
        right = accuracy(model, test_pictures, test_labels)
        print(f"epoch {epoch + 1}: test accuracy {right:.4f}, {time.time() - started:.0f} s")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the demo's network.")
    parser.add_argument("--weights", type=Path, help="a bundle of this network: do not train, export its weights again")
    parser.add_argument("--out", type=Path, default=Path("camrt/demo/shapes.camrt"))
    parser.add_argument("--scenes", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()

    if arguments.weights is None:
        model = train(arguments.scenes, arguments.epochs)
    else:
        model = ShapeNet()
        model.load_state_dict(weights_of(arguments.weights), strict=False)  # num_batches_tracked is not in a bundle
    preprocess = camrt.Preprocess(resize=(SIZE, SIZE), mean=(MEAN,) * 3, std=(STD,) * 3)
    model.eval()
    camrt.export_model(
        model, arguments.out, (3, SIZE, SIZE), name="shapes", classes=CLASSES, preprocess=preprocess, overwrite=True
    )
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
