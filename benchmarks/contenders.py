"""The public implementations that benchmarks/peers.py runs, each used as its documentation shows, in float32.

Each function takes its own copy of the model (libraries leave hooks on it) and yields (camrt's method, the library's
name for it, a function to run). If a library returns a map on the layer's grid, it is resized to the image bilinearly.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import winsor_cam_peer
from support import import_torchvision
from torch import nn

Run = Callable[[np.ndarray, int], np.ndarray]
"""image (1, C, H, W) float32, class -> map (H, W) float32."""
Offered = Iterator[tuple[str, str, Run]]


def _resized(grid: torch.Tensor, image: np.ndarray) -> np.ndarray:
    """(h, w) -> (H, W) of the image."""
    raised = F.interpolate(grid.detach()[None, None], image.shape[2:], mode="bilinear", align_corners=False)
    return raised[0, 0].numpy()


def winsor_cam(model: nn.Module, layer: str) -> Offered:
    """Winsor-CAM's repository, percentile 90."""
    del layer  # all convolutions
    run = winsor_cam_peer(model)
    yield "winsor_cam", "WinsorcamClass", lambda image, target: run(torch.from_numpy(image), target).numpy()


def pytorch_grad_cam(model: nn.Module, layer: str) -> Offered:
    import_torchvision()
    import pytorch_grad_cam as library
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def run_of(kind: Any) -> Run:
        def run(image: np.ndarray, target: int) -> np.ndarray:
            quiet = contextlib.redirect_stderr(io.StringIO())  # ScoreCAM's progress bar
            with kind(model, [model.get_submodule(layer)]) as cam, quiet:
                return cam(torch.from_numpy(image), [ClassifierOutputTarget(target)])[0]

        return run

    kinds = {"grad_cam": "GradCAM", "grad_cam_pp": "GradCAMPlusPlus", "layer_cam": "LayerCAM", "score_cam": "ScoreCAM"}
    for method, name in kinds.items():
        yield method, name, run_of(getattr(library, name))


def torchcam(model: nn.Module, layer: str) -> Offered:
    import_torchvision()
    from torchcam import methods as library  # pyright: ignore[reportMissingImports]

    def run_of(kind: Any, gradients: bool) -> Run:
        def run(image: np.ndarray, target: int) -> np.ndarray:
            with kind(model, layer) as extractor, torch.set_grad_enabled(gradients):
                scores = model(torch.from_numpy(image))
                return _resized(extractor(target, scores)[0][0], image)

        return run

    for method, name in {"grad_cam": "GradCAM", "grad_cam_pp": "GradCAMpp", "layer_cam": "LayerCAM"}.items():
        yield method, name, run_of(getattr(library, name), gradients=True)
    yield "score_cam", "ScoreCAM", run_of(library.ScoreCAM, gradients=False)


def captum(model: nn.Module, layer: str) -> Offered:
    from captum.attr import LayerAttribution, LayerGradCam  # pyright: ignore[reportMissingImports]

    cam = LayerGradCam(model, model.get_submodule(layer))

    def run(image: np.ndarray, target: int) -> np.ndarray:
        found = cam.attribute(torch.from_numpy(image), target, relu_attributions=True)
        return LayerAttribution.interpolate(found, image.shape[2:], "bilinear")[0, 0].detach().numpy()

    yield "grad_cam", "LayerGradCam", run


def openvino_xai(onnx_file: Path, threads: int) -> Offered:
    """On the ONNX file that camrt's bundle was made from; the layer is the one that the library chooses."""
    import openvino  # pyright: ignore[reportMissingImports]
    from openvino_xai import Task, insert_xai  # pyright: ignore[reportMissingImports]
    from openvino_xai.common.parameters import Method  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    network = insert_xai(core.read_model(onnx_file), Task.CLASSIFICATION, Method.RECIPROCAM, embed_scaling=False)
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(network, "CPU", settings)

    def run(image: np.ndarray, target: int) -> np.ndarray:
        return _resized(torch.from_numpy(compiled(image)["saliency_map"][0, target].copy()), image)

    yield "recipro_cam", "ReciproCAM", run


BY_MODEL = {
    "Winsor-CAM": winsor_cam,
    "pytorch-grad-cam": pytorch_grad_cam,
    "torchcam": torchcam,
    "captum": captum,
}
PACKAGES = {
    "Winsor-CAM": "winsorcam",
    "pytorch-grad-cam": "grad-cam",
    "torchcam": "torchcam",
    "captum": "captum",
    "OpenVINO XAI": "openvino_xai",
}
