"""Writes networks of torchvision and timm with PyTorch's two ONNX exporters, the legacy one and dynamo.

python benchmarks/zoo/torch_files.py FOLDER        with random weights; needs the test extra
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from families import network
from support import import_torchvision, warmed_up

# network, opset, exporter, batch: as tests/families.py makes them
TORCHVISION = [
    *(
        (name, 17, "legacy", "free")
        for name in ("alexnet", "vgg11_bn", "resnet18", "resnext", "wide_resnet", "densenet")
    ),
    *((name, 17, "legacy", "free") for name in ("googlenet", "inception_v3", "squeezenet1_1", "shufflenet_v2_x0_5")),
    *((name, 17, "legacy", "free") for name in ("mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0")),
    *(
        (name, 17, "legacy", "free")
        for name in ("efficientnet_v2", "regnet_y_400mf", "convnext_tiny", "vit", "swin", "swin_v2")
    ),
    ("resnet18", 9, "legacy", "1"),
    ("mobilenet_v2", 11, "legacy", "1"),
    ("shufflenet_v2_x0_5", 13, "legacy", "1"),
    ("vit", 14, "legacy", "1"),
    ("resnet18", 18, "dynamo", "free"),
    ("swin", 18, "dynamo", "free"),
]
# name, its options
TIMM: dict[str, dict[str, Any]] = {
    "ghostnet_050": {},
    "mobilevit_xxs": {},
    "tf_efficientnet_lite0": {},
    "pvt_v2_b0": {},
    "beit_base_patch16_224": {"img_size": 64, "depth": 3, "embed_dim": 96, "num_heads": 4},
    "fasternet_t0": {},
    "convnextv2_atto": {},
    "edgenext_xx_small": {},
    "resnetv2_50": {"layers": (1, 1, 1, 1)},
    "levit_128s": {},
    "repvgg_a0": {},
    "hrnet_w18_small": {},
    "coatnet_nano_rw_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "poolformer_s12": {},
    "maxvit_pico_rw_256": {"img_size": 64},
    "cait_xxs24_224": {"img_size": 64, "depth": 3},
}


def write(model: torch.nn.Module, path: Path, size: int, opset: int, exporter: str, batch: str) -> None:
    example = torch.randn(1 if exporter == "legacy" else 2, 3, size, size)
    axes = {"input": {0: "batch"}, "output": {0: "batch"}} if batch == "free" else None
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"]}
    if exporter == "legacy":
        torch.onnx.export(model, (example,), path, dynamo=False, opset_version=opset, dynamic_axes=axes, **names)
    else:
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(model, (example,), path, dynamo=True, opset_version=opset, dynamic_shapes=shapes, **names)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    import_torchvision()
    timm = importlib.import_module("timm")
    for name, opset, exporter, batch in TORCHVISION:
        model, (_, size, _) = network(name)
        _try(model, folder, f"torchvision {name}", size, opset, exporter, batch)
    for name, options in TIMM.items():
        torch.manual_seed(0)
        size = 224 if name.startswith("levit") else 64
        model = warmed_up(timm.create_model(name, num_classes=7, **options), (3, size, size))
        _try(model, folder, f"timm {name}", size, 17, "legacy", "free")


def _try(model: torch.nn.Module, folder: Path, name: str, size: int, opset: int, exporter: str, batch: str) -> None:
    path = (
        folder
        / f"{name.replace(' ', '-')}@{'PyTorch' if exporter == 'legacy' else 'PyTorch dynamo'}@{opset}@{batch}.onnx"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(model, path, size, opset, exporter, batch)
        print(path.name, flush=True)
    except Exception as error:  # the exporter's own limits
        print(f"{name}: PyTorch's exporter refuses it ({type(error).__name__})", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
