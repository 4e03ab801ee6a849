"""Draws maps as colours over pictures."""

from __future__ import annotations

import numpy as np

# The "jet" colour map that the CAM literature draws with: position, red, green, blue.
_JET = np.array(
    [[0, 0, 0, 0.5], [0.125, 0, 0, 1], [0.375, 0, 1, 1], [0.625, 1, 1, 0], [0.875, 1, 0, 0], [1, 0.5, 0, 0]]
)


def colorize(scaled: np.ndarray) -> np.ndarray:
    """A map in [0, 1], (H, W) -> uint8 (H, W, 3), blue for 0 and red for 1."""
    channels = [np.interp(scaled, _JET[:, 0], _JET[:, i]) for i in (1, 2, 3)]
    return (np.stack(channels, axis=-1) * 255 + 0.5).astype(np.uint8)


def overlay(picture: np.ndarray, scaled: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Blends a map (H, W) in [0, 1], as colours, over a picture uint8 (H, W, 3) -> uint8 (H, W, 3).

    opacity: of the map, 0..1. ValueError if the sizes differ.
    """
    if picture.shape[:2] != scaled.shape:
        raise ValueError(f"picture {picture.shape[:2]} and map {scaled.shape} differ in size")
    return (picture * (1 - opacity) + colorize(scaled) * opacity + 0.5).astype(np.uint8)
