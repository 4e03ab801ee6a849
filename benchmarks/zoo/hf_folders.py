"""Saves Hugging Face image classifiers with random weights, each in a folder with its image processor, for
`camrt export hf:FOLDER`.

python benchmarks/zoo/hf_folders.py FOLDER        needs transformers
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support import import_torchvision

_TOKENS: dict[str, Any] = {"image_size": 64, "patch_size": 16, "hidden_size": 96, "num_hidden_layers": 2}
_TOKENS |= {"num_attention_heads": 4, "intermediate_size": 192}
_STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]}
_SWIN = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": [2, 2, 2],
    "num_heads": [2, 4, 8],
    "window_size": 4,
}
_HEADS = {"num_attention_heads": [1, 2, 3, 4]}
# family: its settings, its image processor
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "ViT": (_TOKENS, "ViTImageProcessor"),
    "DeiT": (_TOKENS, "DeiTImageProcessor"),
    "Beit": (_TOKENS | {"use_relative_position_bias": True, "use_mean_pooling": True}, "BeitImageProcessor"),
    "Swin": (_SWIN, "ViTImageProcessor"),
    "ConvNext": (
        {"image_size": 64, "depths": [1, 1, 2, 1], "hidden_sizes": [32, 64, 96, 128]},
        "ConvNextImageProcessor",
    ),
    "ResNet": (
        {"embedding_size": 16, "depths": [1, 1, 2, 1], "hidden_sizes": [32, 48, 64, 96]},
        "ConvNextImageProcessor",
    ),
    "MobileNetV2": ({"image_size": 64, "depth_multiplier": 0.5}, "MobileNetV2ImageProcessor"),
    "RegNet": (_STAGES | {"embedding_size": 16, "groups_width": 8}, "ConvNextImageProcessor"),
    "Pvt": (_STAGES | _HEADS | {"image_size": 64}, "PvtImageProcessor"),
    "Segformer": (_STAGES | _HEADS, "SegformerImageProcessor"),
    "Dinov2": (_TOKENS | {"image_size": 56, "patch_size": 14}, "BitImageProcessor"),
    "PoolFormer": (_STAGES, "PoolFormerImageProcessor"),
}


def main(folder: Path) -> None:
    import_torchvision()
    import torch
    import transformers  # type: ignore[import-not-found]

    for name, (settings, processor) in FAMILIES.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(num_labels=10, **settings)
        model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
        place = folder / f"hf-{name}"
        model.save_pretrained(place)
        side = int(getattr(config, "image_size", 64))
        size = {"height": side, "width": side}
        known = getattr(transformers, processor)
        known(size=size, crop_size=size).save_pretrained(place)
        print(place.name, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
