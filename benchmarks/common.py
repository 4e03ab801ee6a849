"""What the benchmarks share: models, timing in turns, summaries, a description of the machine."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from camrt.install import processor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support import import_torchvision, warmed_up


def build(name: str, size: int) -> nn.Module:
    """torchvision's network of that name, with random weights and batch norm statistics of random images."""
    torch.manual_seed(0)
    return warmed_up(import_torchvision().models.get_model(name, weights=None), (3, size, size))


def winsor_cam_peer(model: nn.Module, folder: Path | None = None) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Winsor-CAM's public implementation, over all convolutions, bilinear, percentile 90.

    Returns a function: image (1, C, H, W), class -> map (H, W). folder: a checkout of its repository; without one, the
    installed package. It leaves hooks on the model. ImportError if it is not installed.
    """
    if folder is None:
        module = importlib.import_module("winsorcam")
    else:
        spec = importlib.util.spec_from_file_location("winsorcam", folder / "winsorcam.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    wrapped = module.WinsorcamClass(model)
    wrapped.eval()
    layers = [f"model.{n}" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]

    def run(image: torch.Tensor, target: int) -> torch.Tensor:
        stack, _, importance = wrapped.get_gradcams_and_importance(
            image, target, layers, "mean", "mean", True, "bilinear"
        )
        return wrapped.winsorize_stacked_gradcam(image, stack, importance, "bilinear", 90)[0]

    return run


def take_turns(contenders: dict[str, Callable[[], Any]], runs: int, warm_up: int = 3) -> dict[str, np.ndarray]:
    """Seconds of each contender in each turn. Before each run there is a pause, so that the threads of the run before
    stop spinning.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + runs):
        for name, run in contenders.items():
            time.sleep(0.1)
            started = time.perf_counter()
            run()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - started)
    return {name: np.array(t) for name, t in times.items()}


def summary(times: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(times, [0.25, 0.5, 0.75]) * 1e3
    return {"median_ms": round(middle, 3), "quartiles_ms": [round(low, 3), round(high, 3)]}  # type: ignore[dict-item]


def machine() -> dict[str, str]:
    """The processor, the platform and Python."""
    return {"cpu": processor(), "platform": platform.platform(), "python": platform.python_version()}


def versions(*packages: str) -> dict[str, str]:
    return {p: importlib.metadata.version(p) for p in ("camrt", "torch", "onnxruntime", "numpy", *packages)}


def print_times(times: dict[str, Any], ratios: dict[str, float]) -> None:
    for name, numbers in times.items():
        low, high = numbers["quartiles_ms"]
        print(f"{name:32}{numbers['median_ms']:10.2f} ms   quartiles {low:.2f} to {high:.2f}")
    for name, ratio in ratios.items():
        print(f"{name:32}{ratio:10.2f}")
