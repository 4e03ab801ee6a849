"""One network of each torchvision classification family: export, then every comparison of `camrt verify`.

Weights are random, batch norm statistics warmed up; sizes are small and some odd. The comparisons are of activations,
gradients and maps with PyTorch in float64, per tap, by the limits in camrt.verify.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import import_torchvision, warmed_up

import camrt
from camrt.runtime.bundle import read_bundle
from camrt.verify import module_oracle, verify_bundle

# name, input size, taps (convolutions and the last block), last block
FAMILIES = [
    ("alexnet", 224, 6, "features"),
    ("vgg11_bn", 224, 9, "features"),
    ("resnet18", 97, 21, "layer4.1"),
    ("resnext50_32x4d", 96, 54, "layer4.2"),
    ("wide_resnet50_2", 64, 54, "layer4.2"),
    ("densenet121", 96, 121, "features"),
    ("googlenet", 96, 58, "inception5b"),
    ("inception_v3", 107, 95, "Mixed_7c"),
    ("squeezenet1_1", 97, 27, "features.12"),
    ("shufflenet_v2_x0_5", 96, 57, "conv5"),
    ("mobilenet_v2", 96, 53, "features.18"),
    ("mobilenet_v3_small", 96, 53, "features.12"),
    ("mnasnet0_5", 96, 53, "layers"),
    ("efficientnet_b0", 96, 82, "features.8"),
    ("efficientnet_v2_s", 64, 171, "features.7"),
    ("regnet_y_400mf", 96, 86, "trunk_output.block4.block4-5"),
    ("convnext_tiny", 96, 23, "features.7.2"),
]
OPTIONS = {"googlenet": {"init_weights": True}, "inception_v3": {"init_weights": False, "aux_logits": False}}


@pytest.mark.parametrize(("name", "size", "taps", "last"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_family(name: str, size: int, taps: int, last: str, tmp_path: Path) -> None:
    models = import_torchvision().models
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, **OPTIONS.get(name, {}))
    model = warmed_up(model, (3, size, size))
    path = camrt.export_model(model, tmp_path / "model.camrt", (3, size, size))
    bundle = read_bundle(path)
    manifest = bundle.manifest
    assert len(manifest.taps) == taps
    assert [t.name for t in manifest.taps if "last" in t.roles] == [last]
    assert manifest.batch == "dynamic" and manifest.seeds_share_image
    report = verify_bundle(bundle, module_oracle(model, name))
    assert report.passed, [r for r in report.rows if not r.passed][:5]
    compared = {row.subject.split()[0] for row in report.rows}
    methods = {"winsor_cam", "grad_cam", "alphas", "maps", "single", "several"}
    assert compared == {"logits", "activation", "gradient", "float64", *methods}
    gradients = {r.subject for r in report.rows if r.subject.startswith("float64 gradient")}
    assert len(gradients) == taps
