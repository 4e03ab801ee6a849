"""`camrt demo`: explains drawn scenes and writes one picture of all of them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .. import install
from ..runtime.errors import InputError
from ..runtime.explainer import load
from ..runtime.images.overlay import overlay
from .scenes import CLASSES, SIZE, draw_scene

BUNDLE = Path(__file__).parent / "shapes.camrt"
FIRST_SEED = 1_000_000  # the network was not trained on scenes from this seed on
PERCENTILES = (0, 50, 90, 100)
_MARGIN, _HEADER, _CAPTION, _ZOOM = 8, 26, 20, 1.5


def run(out: Path, scenes: int = 6, seed: int = 0) -> Path:
    """Writes scenes, maps and the picture `demo.png` into `out`, prints what it did, and returns the picture's path."""
    if scenes < 1:
        raise InputError(f"--scenes {scenes}: use 1 or more")
    explainer = load(BUNDLE)
    drawn = [draw_scene(FIRST_SEED + 1000 * seed + i, label=i % len(CLASSES)) for i in range(scenes)]
    pictures = [picture for picture, _, _ in drawn]
    started = time.perf_counter()
    winsor = explainer.explain(pictures, "winsor_cam", percentile=PERCENTILES[0])
    tuned = [winsor.retune(percentile=p) for p in PERCENTILES]
    grad = explainer.explain(pictures, "grad_cam")
    seconds = time.perf_counter() - started

    assert winsor.target is not None
    columns = ["picture", *(f"Winsor-CAM p={p}" for p in PERCENTILES), "Grad-CAM"]
    rows = []
    for i, (picture, label, _) in enumerate(drawn):
        maps = [*(t.normalized()[i] for t in tuned), grad.normalized()[i]]
        logits = winsor.logits[i].astype(np.float64)
        probability = np.exp(logits - logits.max())[winsor.target[i]] / np.exp(logits - logits.max()).sum()
        seen = CLASSES[winsor.target[i]]
        caption = f"{CLASSES[label]}, seen as {seen} ({probability:.2f})"
        rows.append((caption, [picture, *(overlay(picture, m) for m in maps)]))
    try:
        out.mkdir(parents=True, exist_ok=True)
        path = out / "demo.png"
        sheet(columns, rows).save(path)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(out / f"scene-{i}.png")
            np.save(out / f"scene-{i}-winsor-cam-p90.npy", tuned[PERCENTILES.index(90)].maps[i])
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}): choose another folder with --out") from None

    right = sum(int(t == label) for t, (_, label, _) in zip(winsor.target, drawn, strict=True))
    print(
        f"{scenes} scenes, {right} recognised; {len(columns) - 1} maps of each in {seconds * 1e3:.0f} ms, loading "
        "included."
    )
    print(f"Open {path}: each scene with its Winsor-CAM maps at four percentiles and its Grad-CAM map.")
    print("For your own model:")
    print(f"  {install.extra('export,cpu')}")
    print("  camrt export torchvision:resnet50:DEFAULT resnet50.camrt     (or package.module:callable, or model.onnx)")
    print("  camrt explain resnet50.camrt photo.jpg")
    return path


def sheet(columns: list[str], rows: list[tuple[str, list[np.ndarray]]]) -> Image.Image:
    """Pictures in a grid, with a heading over each column and a caption under each row."""
    cell = int(SIZE * _ZOOM)
    width = len(columns) * (cell + _MARGIN) + _MARGIN
    height = _HEADER + len(rows) * (cell + _CAPTION + _MARGIN) + _MARGIN
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=14)
    for j, title in enumerate(columns):
        draw.text((_MARGIN + j * (cell + _MARGIN), 6), title, fill="black", font=font)
    for i, (caption, pictures) in enumerate(rows):
        top = _HEADER + i * (cell + _CAPTION + _MARGIN)
        for j, picture in enumerate(pictures):
            scaled = Image.fromarray(picture).resize((cell, cell), Image.Resampling.BICUBIC)
            canvas.paste(scaled, (_MARGIN + j * (cell + _MARGIN), top))
        draw.text((_MARGIN, top + cell + 2), caption, fill="black", font=font)
    return canvas
