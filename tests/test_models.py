"""One network of each torchvision classification family, and DeiT: export, then every comparison of `camrt verify`.

Weights are random, batch norm statistics warmed up; sizes are small and some odd. The comparisons are of activations,
gradients and maps with PyTorch in float64, per tap, by the limits in camrt.verify.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support import import_torchvision, warmed_up
from torch import nn

import camrt
from camrt.compare import largest_difference
from camrt.export import reference_runs
from camrt.export.reference import LAYER_METHODS
from camrt.oracle import module_oracle
from camrt.runtime.bundle import read_bundle
from camrt.verify import smooth_images, verify, verify_bundle

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


def vit() -> nn.Module:
    models = import_torchvision().models
    network = models.VisionTransformer(64, 16, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=7)
    head: Any = network.heads.head
    nn.init.normal_(head.weight)  # torchvision starts it at zero, where every gradient is zero
    return network


def deit() -> nn.Module:
    import_torchvision()
    return importlib.import_module("timm").create_model("deit_tiny_patch16_224", img_size=64, depth=3, num_classes=7)


def deit_distilled() -> nn.Module:
    import_torchvision()
    create = importlib.import_module("timm").create_model
    return create("deit_tiny_distilled_patch16_224", img_size=64, depth=3, num_classes=7)


def vit_pooled() -> nn.Module:
    """Its head reads the mean of all tokens, so that its final norm can be explained."""
    import_torchvision()
    create = importlib.import_module("timm").create_model
    return create(
        "vit_tiny_patch16_224", img_size=64, depth=3, num_classes=7, global_pool="avg", class_token=False, fc_norm=False
    )


def swin(window: int) -> nn.Module:
    models = import_torchvision().models
    return models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [window, window], num_classes=7)


def swin_v2() -> nn.Module:
    module = import_torchvision().models.swin_transformer
    parts = {"block": module.SwinTransformerBlockV2, "downsample_layer": module.PatchMergingV2}
    return module.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=7, **parts)


# make, last tap, its layout, prefix, channels and grid; swin with windows of 7 pads a grid of 16
TRANSFORMERS: list[tuple[Callable[[], nn.Module], str, str, int, int, tuple[int, int]]] = [
    (vit, "encoder.layers.encoder_layer_2.ln_1", "tokens", 1, 48, (4, 4)),
    (deit, "blocks.2.norm1", "tokens", 1, 192, (4, 4)),
    (deit_distilled, "blocks.2.norm1", "tokens", 2, 192, (4, 4)),
    (vit_pooled, "norm", "tokens", 0, 192, (4, 4)),
    (functools.partial(swin, 4), "norm", "NHWC", 0, 48, (8, 8)),
    (functools.partial(swin, 7), "norm", "NHWC", 0, 48, (8, 8)),
    (swin_v2, "norm", "NHWC", 0, 48, (8, 8)),
]
NAMES = ["vit", "deit", "deit_distilled", "vit_pooled", "swin", "swin_padded", "swin_v2"]


@pytest.mark.parametrize(("make", "last", "layout", "prefix", "channels", "grid"), TRANSFORMERS, ids=NAMES)
def test_transformer(
    make: Callable, last: str, layout: str, prefix: int, channels: int, grid: tuple[int, int], tmp_path: Path
) -> None:
    """Exported and verified like the others; and the methods that run the network again, against PyTorch."""
    torch.manual_seed(0)
    model = make().eval()
    path = camrt.export_model(model, tmp_path / "model.camrt", (3, 64, 64))
    bundle = read_bundle(path)
    (tap,) = [t for t in bundle.manifest.taps if "last" in t.roles]
    assert (tap.name, tap.layout, tap.prefix, tap.channels, tap.grid) == (last, layout, prefix, channels, grid)
    report = verify_bundle(bundle, module_oracle(model, "the model"))
    assert report.passed, [r for r in report.rows if not r.passed][:5]
    assert verify(path).passed, "by its own graph"
    explainer = camrt.load(path)
    image = smooth_images((3, 64, 64), 1)
    label = int(explainer.classify(image).argmax())
    said = 0
    for name in ("score_cam_pp", "score_cam", "ablation_cam", "recipro_cam"):
        want = getattr(reference_runs, name)(model, torch.from_numpy(image), label, tap).numpy()
        got = explainer.explain(image, name, label).maps[0]
        assert largest_difference(got, want) < 1e-3, name
        said += np.ptp(want) > 0.5
    assert said >= 3, "maps that say nothing test nothing"


def test_a_norm_behind_the_last_attention_is_refused(tmp_path: Path) -> None:
    """Its gradient at the grid is zero: the head reads the class token alone."""
    with pytest.raises(camrt.CamrtError, match="the logits read none of its grid, only its class token"):
        camrt.export_model(vit().eval(), tmp_path / "model.camrt", (3, 64, 64), ["encoder.ln"])


def test_a_transformer_from_onnx_is_tapped_where_its_grid_is_read(tmp_path: Path) -> None:
    """The same choice of the last block without PyTorch's modules, and the same maps."""
    torch.manual_seed(0)
    model = vit().eval()
    source = tmp_path / "vit.onnx"
    torch.onnx.export(model, (torch.zeros(2, 3, 64, 64),), str(source), dynamo=True, dynamic_shapes=({0: "batch"},))
    bundle = camrt.export_onnx(source, tmp_path / "onnx.camrt")
    explainer = camrt.load(bundle)
    (last,) = [t for t in explainer.manifest.taps if "last" in t.roles]
    assert (last.layout, last.prefix, last.grid, last.channels) == ("tokens", 1, (4, 4), 48)
    assert verify(bundle).passed
    direct = camrt.load(camrt.export_model(model, tmp_path / "torch.camrt", (3, 64, 64)))
    images = smooth_images((3, 64, 64), 2)
    np.testing.assert_allclose(explainer.classify(images), direct.classify(images), atol=1e-5)
    norms = [n for n in onnx.load(str(source)).graph.node if n.op_type == "LayerNormalization"]
    assert last.name == norms[-3].name  # behind it: the last block's second norm, and the final one
    for method in ("grad_cam", "recipro_cam"):
        got, want = (ex.explain(images, method, 2).maps for ex in (explainer, direct))
        assert largest_difference(got, want) < 1e-3, method
    with pytest.raises(camrt.CamrtError, match="the logits read none of its grid"):
        camrt.export_onnx(source, tmp_path / "x.camrt", [norms[-1].name])


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
    methods = {"winsor_cam", "integrative_cam", "full_grad", *LAYER_METHODS}
    assert compared == {"logits", "activation", "gradient", "float64", "alphas", "maps", "single", "several", *methods}
    gradients = {r.subject for r in report.rows if r.subject.startswith("float64 gradient")}
    assert len(gradients) == taps
