"""Draws the demo's pictures: one object of a known class on a cluttered background, with its mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 128
_SCALE = 2  # shapes are drawn larger and reduced, for smooth edges

Point = tuple[float, float]
Part = tuple[str, list[Point]]
Shape = Callable[[], list[Part]]  # parts in [-1, 1]^2: ("add" | "cut", polygon)


def _ellipse(cx: float, cy: float, rx: float, ry: float) -> list[Point]:
    angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def _star() -> list[Part]:
    corners = []
    for i in range(10):
        radius, angle = (1.0, 0.42)[i % 2], math.pi * i / 5 - math.pi / 2
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    return [("add", corners)]


def _heart() -> list[Part]:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    x = 16 * np.sin(t) ** 3 / 17
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 17
    return [("add", list(zip(x.tolist(), y.tolist(), strict=True)))]


def _moon() -> list[Part]:
    return [("add", _ellipse(0, 0, 0.95, 0.95)), ("cut", _ellipse(0.42, -0.12, 0.75, 0.75))]


def _arrow() -> list[Part]:
    return [("add", [(-1, -0.25), (0.1, -0.25), (0.1, -0.7), (1, 0), (0.1, 0.7), (0.1, 0.25), (-1, 0.25)])]


def _house() -> list[Part]:
    walls: list[Point] = [(-0.7, 0.0), (0.7, 0.0), (0.7, 0.9), (-0.7, 0.9)]
    roof: list[Point] = [(-1, 0.02), (0, -0.9), (1, 0.02)]
    door: list[Point] = [(-0.18, 0.35), (0.18, 0.35), (0.18, 0.9), (-0.18, 0.9)]
    return [("add", walls), ("add", roof), ("cut", door)]


def _fish() -> list[Part]:
    return [
        ("add", _ellipse(-0.2, 0, 0.75, 0.45)),
        ("add", [(0.35, 0), (1, -0.6), (0.85, 0), (1, 0.6)]),
        ("cut", _ellipse(-0.6, -0.1, 0.09, 0.09)),
    ]


def _mug() -> list[Part]:
    body = [(-0.75, -0.7), (0.35, -0.7), (0.3, 0.8), (-0.7, 0.8)]
    return [("add", _ellipse(0.4, 0.0, 0.5, 0.5)), ("cut", _ellipse(0.4, 0.0, 0.28, 0.28)), ("add", body)]


def _tree() -> list[Part]:
    tiers = [[(-w, y), (0, y - 0.75), (w, y)] for w, y in ((0.5, -0.25), (0.65, 0.2), (0.8, 0.65))]
    return [("add", tier) for tier in tiers] + [("add", [(-0.13, 0.6), (0.13, 0.6), (0.13, 1.0), (-0.13, 1.0)])]


SHAPES: dict[str, Shape] = {
    "arrow": _arrow,
    "fish": _fish,
    "heart": _heart,
    "house": _house,
    "moon": _moon,
    "mug": _mug,
    "star": _star,
    "tree": _tree,
}
CLASSES = tuple(SHAPES)


def draw_scene(seed: int, label: int | None = None) -> tuple[np.ndarray, int, np.ndarray]:
    """Draws a scene: (picture (SIZE, SIZE, 3) uint8, class index, object mask (SIZE, SIZE) bool).

    label: the class, by default a random one. The same arguments always give the same scene.
    """
    rng = np.random.default_rng(seed)
    drawn = int(rng.integers(len(CLASSES)))
    label = drawn if label is None else label
    background = _clutter(rng)
    mask = _object_mask(rng, CLASSES[label])
    texture = _colour_field(rng, contrast=0.25)
    mean_behind = np.asarray(background, np.float64)[mask > 0.5].mean(axis=0)
    while np.abs(texture.mean(axis=(0, 1)) - mean_behind).sum() < 90:
        texture = _colour_field(rng, contrast=0.25)
    picture = background * (1 - mask[..., None]) + texture * mask[..., None]
    picture = _outlined(picture, mask, rng.uniform(0, 50))
    picture = _front(rng, picture)
    picture = picture + rng.normal(0, rng.uniform(2, 10), picture.shape)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8), label, mask > 0.5


def _colour_field(rng: np.random.Generator, contrast: float) -> np.ndarray:
    """A random colour with smooth variation, (SIZE, SIZE, 3) float64 in 0..255."""
    colour = rng.uniform(0, 255, 3)
    coarse = rng.normal(0, 1, (int(rng.integers(2, 9)), int(rng.integers(2, 9)))).astype(np.float32)
    smooth = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return np.clip(colour + contrast * 120 * smooth[..., None] * rng.uniform(0.4, 1, 3), 0, 255)


def _clutter(rng: np.random.Generator) -> np.ndarray:
    """Overlapping blobs, bars and polygons of random colours over a colour field."""
    canvas = Image.fromarray(_colour_field(rng, contrast=0.5).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(12, 34))):
        x, y = rng.uniform(-10, SIZE + 10, 2)
        size = rng.uniform(3, 24)
        colour = tuple(int(c) for c in rng.uniform(0, 255, 3))
        kind = rng.integers(4)
        if kind == 0:
            draw.ellipse((x - size, y - size * 0.6, x + size, y + size * 0.6), fill=colour)
        elif kind == 1:
            dx, dy = rng.uniform(-60, 60, 2)
            draw.line((x, y, x + dx, y + dy), fill=colour, width=int(rng.integers(1, 8)))
        elif kind == 2:
            angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 6))))
            draw.polygon([(x + size * math.cos(a), y + size * math.sin(a)) for a in angles], fill=colour)
        else:
            draw.arc((x - size, y - size, x + size, y + size), *sorted(rng.uniform(0, 360, 2)), fill=colour, width=3)
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.2)))), np.float64)


def _object_mask(rng: np.random.Generator, name: str) -> np.ndarray:
    """Coverage of the object, (SIZE, SIZE) float64 in 0..1, at a random place, size, tilt and mirroring."""
    radius = rng.uniform(22, 42)
    cx, cy = rng.uniform(radius, SIZE - radius, 2)
    tilt, mirror = rng.uniform(-0.6, 0.6), rng.choice([-1, 1])
    stretch = rng.uniform(0.85, 1.15)
    canvas = Image.new("L", (SIZE * _SCALE, SIZE * _SCALE))
    draw = ImageDraw.Draw(canvas)
    for action, polygon in SHAPES[name]():
        points = []
        for x, y in polygon:
            x, y = x * mirror * stretch, y / stretch
            points.append(
                (
                    (cx + radius * (x * math.cos(tilt) - y * math.sin(tilt))) * _SCALE,
                    (cy + radius * (x * math.sin(tilt) + y * math.cos(tilt))) * _SCALE,
                )
            )
        draw.polygon(points, fill=255 if action == "add" else 0)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), np.float64) / 255


def _outlined(picture: np.ndarray, mask: np.ndarray, shade: float) -> np.ndarray:
    """A dark line of two pixels along the inside of the object's edge."""
    solid = Image.fromarray((mask * 255).astype(np.uint8))
    rim = np.clip(mask - np.asarray(solid.filter(ImageFilter.MinFilter(5)), np.float64) / 255, 0, 1)[..., None]
    return picture * (1 - rim) + shade * rim


def _front(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """A few thin lines across everything, so that no edge is clean."""
    canvas = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 4))):
        ends = tuple(float(v) for v in rng.uniform(0, SIZE, 4))
        draw.line(ends, fill=tuple(int(c) for c in rng.uniform(0, 255, 3)), width=1)
    return np.asarray(canvas, np.float64)
