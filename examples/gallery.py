"""One picture of all methods on two images.

python examples/gallery.py [--out gallery.png] [--data FOLDER]

With the data folder (real ImageNet weights and photos; by default where the tests look for it) the images are photos
and the network is its MobileNet, exported from the ONNX file beside it; without it they are two scenes of the demo.
The real network's bundle is made in a temporary folder, which needs the export extra.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from evaluate_demo import METHODS
from PIL import Image, ImageDraw, ImageFont

import camrt
from camrt.demo.run import BUNDLE, FIRST_SEED
from camrt.demo.scenes import draw_scene
from camrt.method_choice import parse_method
from camrt.runtime.images.overlay import overlay

DEFAULT_DATA = Path(__file__).parent.parent.parent / "shared" / "data"
PHOTOS = ("zebra.png", "cat.jpg")
LEFT_OUT = ("score_cam_pp:baseline=zero", "score_cam:variant=pytorch_grad_cam")  # they look like their neighbours
COLUMNS, CELL, MARGIN, CAPTION = 7, 168, 6, 18


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws all methods on two images.")
    parser.add_argument("--out", type=Path, default=Path("gallery.png"))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CAMRT_DATA", DEFAULT_DATA)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.data.is_dir():
            explainer, images = real_network(options.data, Path(folder))
        else:
            print(f"{options.data} is missing: two scenes of the demo instead")
            explainer = camrt.load(BUNDLE)
            images = [draw_scene(FIRST_SEED + i, label=i)[0] for i in (1, 6)]
        picture = draw(explainer, images)
    picture.save(options.out)
    print(f"wrote {options.out}")


def real_network(data: Path, folder: Path) -> tuple[camrt.Explainer, list[Any]]:
    recipe = camrt.Preprocess(resize=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    names = json.loads((data / "imagenet_classes.json").read_text(encoding="utf-8"))
    source = data / "mobilenet_v1_025_imagenet.onnx"
    path = camrt.export_onnx(source, folder / "mobilenet.camrt", classes=names, preprocess=recipe)
    return camrt.load(path), [data / "photos" / name for name in PHOTOS]


def draw(explainer: camrt.Explainer, images: list[Any]) -> Image.Image:
    """A block of rows for each image: itself, then every method's overlay."""
    chosen = [parse_method(text) for text in METHODS if text not in LEFT_OUT]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a map of zeros is drawn as what it is
        results = [explainer.explain(images, m.name, **m.options) for m in chosen]
    rows = -(-(len(chosen) + 1) // COLUMNS)
    step = CELL + CAPTION + MARGIN
    canvas = Image.new("RGB", (COLUMNS * (CELL + MARGIN) + MARGIN, len(images) * rows * step + MARGIN), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    for i in range(len(images)):
        first = results[0]
        assert first.target is not None
        names = explainer.manifest.classes
        label = names[first.target[i]].split(",")[0] if names else str(first.target[i])
        cells = [(label, first.pictures[i])]
        cells += [(m.text, overlay(r.pictures[i], r.normalized()[i])) for m, r in zip(chosen, results, strict=True)]
        for j, (caption, picture) in enumerate(cells):
            x = MARGIN + j % COLUMNS * (CELL + MARGIN)
            y = MARGIN + (i * rows + j // COLUMNS) * step
            canvas.paste(Image.fromarray(np.asarray(picture)).resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
            short = caption.replace("percentile=", "p").replace("variant=", "").replace("smooth=", "")
            pen.text((x, y + CELL + 2), short, fill="black", font=font)
    return canvas


if __name__ == "__main__":
    main()
