"""Measures every method on the demo network's own test scenes, whose object masks are known, and writes
docs/evaluation.md.

python examples/evaluate_demo.py [--scenes 100] [--work FOLDER] [--out docs/evaluation.md]

Interrupted, it goes on where it was when it is started again with the same --work.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from camrt.cli import main as camrt_main
from camrt.demo.run import BUNDLE, FIRST_SEED
from camrt.demo.scenes import CLASSES, draw_scene

METHODS = [
    "winsor_cam:percentile=0",
    "winsor_cam:percentile=50",
    "winsor_cam:percentile=90",
    "winsor_cam:percentile=100",
    "score_cam_pp",
    "score_cam_pp:variant=tanh_mask_only",
    "score_cam_pp:variant=sigmoid_relu",
    "score_cam_pp:baseline=zero",
    "integrative_cam",
    "integrative_cam:smooth=exp",
    "integrative_cam:smooth=softmax",
    "integrative_cam:reading=residual",
    "grad_cam",
    "grad_cam_pp",
    "x_grad_cam",
    "layer_cam",
    "hires_cam",
    "eigen_cam",
    "score_cam",
    "score_cam:variant=pytorch_grad_cam",
    "ablation_cam",
    "recipro_cam",
    "finer_cam",
    "full_grad",
]
BEFORE, AFTER = "<!-- table -->", "<!-- end of table -->"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures every method on the demo network's test scenes.")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "camrt-evaluation")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "evaluation.md")
    options = parser.parse_args()
    for folder in ("images", "masks"):
        (options.work / folder).mkdir(parents=True, exist_ok=True)
    for i in range(options.scenes):
        picture, _, mask = draw_scene(FIRST_SEED + i, label=i % len(CLASSES))
        Image.fromarray(picture).save(options.work / "images" / f"scene-{i:04}.png")
        Image.fromarray((mask * 255).astype(np.uint8)).save(options.work / "masks" / f"scene-{i:04}.png")
    images, masks, results = (str(options.work / name) for name in ("images", "masks", "results"))
    code = camrt_main(["evaluate", str(BUNDLE), images, "--masks", masks, "--out", results, "--methods", *METHODS])
    if code:
        raise SystemExit(code)
    text = options.out.read_text(encoding="utf-8")
    start, end = text.index(BEFORE) + len(BEFORE), text.index(AFTER)
    table = (options.work / "results" / "table.md").read_text(encoding="utf-8").partition("\nDifferences")[0]
    options.out.write_text(f"{text[:start]}\n\n{options.scenes} scenes.\n\n{table}\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
