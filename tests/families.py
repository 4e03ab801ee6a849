"""The networks that tests export: one of each torchvision classification family, and small transformers.

Weights are random, batch norm statistics warmed up; sizes are small and some odd. Of four families the blocks are
stacked less deep than in the published networks, which takes minutes less.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from support import import_torchvision, warmed_up
from torch import nn

# name, input size, taps (convolutions and the last block), last block
FAMILIES = [
    ("alexnet", 224, 6, "features"),
    ("vgg11_bn", 224, 9, "features"),
    ("resnet18", 97, 21, "layer4.1"),
    ("resnext", 96, 18, "layer4.0"),
    ("wide_resnet", 64, 18, "layer4.0"),
    ("densenet", 96, 33, "relu"),
    ("googlenet", 96, 58, "inception5b"),
    ("inception_v3", 107, 95, "Mixed_7c"),
    ("squeezenet1_1", 97, 27, "classifier.2"),
    ("shufflenet_v2_x0_5", 96, 57, "conv5"),
    ("mobilenet_v2", 96, 53, "features.18"),
    ("mobilenet_v3_small", 96, 53, "features.12"),
    ("mnasnet0_5", 96, 53, "layers"),
    ("efficientnet_b0", 96, 82, "features.8"),
    ("efficientnet_v2", 64, 23, "features.5"),
    ("regnet_y_400mf", 96, 86, "trunk_output.block4.block4-5"),
    ("convnext_tiny", 96, 23, "features.7.2"),
]
OPTIONS = {
    "googlenet": {"init_weights": True},
    "inception_v3": {"init_weights": False, "aux_logits": False},
    "convnext_tiny": {"layer_scale": 0.3},
}


def resnext() -> nn.Module:
    module = import_torchvision().models.resnet
    return module.ResNet(module.Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4)


def wide_resnet() -> nn.Module:
    module = import_torchvision().models.resnet
    return module.ResNet(module.Bottleneck, [1, 1, 1, 1], width_per_group=128)


def densenet() -> nn.Module:
    return import_torchvision().models.DenseNet(16, (2, 3, 5, 4), 32)


def efficientnet_v2() -> nn.Module:
    module = import_torchvision().models.efficientnet
    stages = [
        module.FusedMBConvConfig(1, 3, 1, 24, 24, 1),
        module.FusedMBConvConfig(4, 3, 2, 24, 48, 2),
        module.MBConvConfig(4, 3, 2, 48, 64, 2),
        module.MBConvConfig(6, 3, 1, 64, 80, 1),
    ]
    return module.EfficientNet(stages, 0.2, last_channel=320)


SHALLOW = {"resnext": resnext, "wide_resnet": wide_resnet, "densenet": densenet, "efficientnet_v2": efficientnet_v2}


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


def convnext(layer_scale: float) -> nn.Module:
    module = import_torchvision().models.convnext
    stages = [module.CNBlockConfig(24, 48, 2), module.CNBlockConfig(48, None, 2)]
    return module.ConvNeXt(stages, layer_scale=layer_scale, num_classes=7)


def swin(window: int) -> nn.Module:
    models = import_torchvision().models
    return models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [window, window], num_classes=7)


def swin_v2() -> nn.Module:
    module = import_torchvision().models.swin_transformer
    parts = {"block": module.SwinTransformerBlockV2, "downsample_layer": module.PatchMergingV2}
    return module.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=7, **parts)


def xcit() -> nn.Module:
    """Attention over channels, then of a class token."""
    import_torchvision()
    return importlib.import_module("timm.models.xcit").Xcit(
        img_size=64, patch_size=16, embed_dim=48, depth=2, num_heads=4, cls_attn_layers=1, eta=1.0, num_classes=7
    )


class SequenceFirst(nn.Module):
    """Tokens as nn.TransformerEncoder holds them unless told otherwise, (tokens, batch, channels); with a class token
    as CLIP's image tower has it.
    """

    def __init__(self, with_class_token: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 16, 16)
        self.token = nn.Parameter(torch.randn(24)) if with_class_token else None
        layer = nn.TransformerEncoderLayer(24, 2, 48, 0.0, "gelu", norm_first=True)
        self.blocks = nn.ModuleList(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 7)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patches(image).flatten(2).permute(2, 0, 1)
        if self.token is not None:
            x = torch.cat([self.token.expand(1, x.shape[1], -1), x])
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(0) if self.token is None else x.permute(1, 0, 2)[:, 0])


# make, last tap, its layout, prefix, channels and grid; swin with windows of 7 pads a grid of 16
TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], str, str, int, int, tuple[int, int]]] = {
    "vit": (vit, "encoder.layers.encoder_layer_2.ln_1", "tokens", 1, 48, (4, 4)),
    "deit": (deit, "blocks.2.norm1", "tokens", 1, 192, (4, 4)),
    "deit_distilled": (deit_distilled, "blocks.2.norm1", "tokens", 2, 192, (4, 4)),
    "vit_pooled": (vit_pooled, "norm", "tokens", 0, 192, (4, 4)),
    "xcit": (xcit, "cls_attn_blocks.0.norm1", "tokens", 1, 48, (4, 4)),
    "sequence_first": (functools.partial(SequenceFirst, False), "norm", "LND", 0, 24, (4, 4)),
    "clip": (functools.partial(SequenceFirst, True), "blocks.1.layers.0.norm1", "LND", 1, 24, (4, 4)),
    "swin": (functools.partial(swin, 4), "norm", "NHWC", 0, 48, (8, 8)),
    "swin_padded": (functools.partial(swin, 7), "norm", "NHWC", 0, 48, (8, 8)),
    "swin_v2": (swin_v2, "norm", "NHWC", 0, 48, (8, 8)),
}


def network(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network of either table by its name, in eval mode, and its input's shape."""
    torch.manual_seed(0)
    if name in TRANSFORMERS:
        return TRANSFORMERS[name][0]().eval(), (3, 64, 64)
    size = next(f[1] for f in FAMILIES if f[0] == name)
    if name in SHALLOW:
        model = SHALLOW[name]()
    else:
        model = import_torchvision().models.get_model(name, weights=None, **OPTIONS.get(name, {}))
    if name in ("alexnet", "vgg11_bn"):
        _narrow(model)
    return warmed_up(model, (3, size, size)), (3, size, size)


def _narrow(model: nn.Module) -> None:
    """The linear layers with 64 units instead of 4096, of 100 million weights that only take time."""
    width = 64
    layers: Any = model.get_submodule("classifier")
    places = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    for i in places:
        inputs, outputs = layers[i].in_features, layers[i].out_features
        layers[i] = nn.Linear(inputs if i == places[0] else width, outputs if i == places[-1] else width)
