"""Pictures of maps."""

from __future__ import annotations

import math

import numpy as np

from ..errors import InputError
from .colormaps import colorize

BLOCK = 1 << 20  # pixels that are blended at a time, for the memory
UNSEEN = 0.35  # the brightness of what the network did not see, drawn in grey


def overlay(
    picture: np.ndarray, scaled: np.ndarray, opacity: float = 0.5, colormap: str = "turbo", by_value: bool = False
) -> np.ndarray:
    """Blends a coloured map over a picture; uint8 (H, W, 3).

    picture: uint8 (H, W, 3); scaled (H, W): in [0, 1], NaN for what the network did not see, which is drawn dark and
    grey. opacity: of the colours, in [0, 1]; by_value: opacity times the map's value, so that low values leave the
    picture as it is. InputError for an opacity or sizes that do not fit, UnknownName for the colour map.
    """
    check_opacity(opacity)
    if picture.shape[:2] != scaled.shape:
        raise InputError(f"picture {picture.shape[:2]} and map {scaled.shape} differ in size")
    out = np.empty((*scaled.shape, 3), np.uint8)
    rows = max(1, BLOCK // max(1, scaled.shape[1]))
    for start in range(0, len(scaled), rows):
        block = slice(start, start + rows)
        out[block] = _blended(picture[block], scaled[block], opacity, colormap, by_value)
    return out


def _blended(picture: np.ndarray, scaled: np.ndarray, opacity: float, colormap: str, by_value: bool) -> np.ndarray:
    seen = np.isfinite(scaled)
    values = np.where(seen, scaled, 0).astype(np.float32)
    weight = (opacity * values if by_value else np.full_like(values, opacity))[..., None]
    blended = (picture * (1 - weight) + colorize(values, colormap) * weight + 0.5).astype(np.uint8)
    if not seen.all():
        blended[~seen] = (picture[~seen].mean(axis=1, keepdims=True) * UNSEEN).astype(np.uint8)
    return blended


def check_opacity(opacity: float) -> None:
    """InputError unless it is a number in [0, 1]."""
    if isinstance(opacity, bool) or not isinstance(opacity, int | float | np.floating) or not 0 <= opacity <= 1:
        shown = repr(opacity) if not isinstance(opacity, float) or math.isfinite(opacity) else str(opacity)
        raise InputError(f"opacity {shown}: use a number from 0 to 1")
