"""An explanation as HTML, for notebooks."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from ..explanation import Explanation, Index

MOST_IMAGES = 8
MOST_BARS = 24
_SIDE = 320  # pixels that the longer side of a picture has at most


def explanation_html(result: Explanation) -> str:
    """A table with a row for each map: photo, overlay, the likeliest classes, the layers' weights."""
    several = result.maps.ndim == 4
    indices: list[Index] = list(np.ndindex(*result.maps.shape[:-2])) if several else list(range(len(result)))
    top = result.top(3)
    rows = [
        _row(result, index, top[index[0] if isinstance(index, tuple) else index]) for index in indices[:MOST_IMAGES]
    ]
    more = f"<p>and {len(indices) - MOST_IMAGES} more</p>" if len(indices) > MOST_IMAGES else ""
    head = html.escape(f"{result.method}, {result.provenance.get('bundle', '')}")
    return f"<div><b>{head}</b><table>{''.join(rows)}</table>{more}</div>"


def _row(result: Explanation, index: Index, top: list[tuple[int, str, float]]) -> str:
    image = index[0] if isinstance(index, tuple) else index
    pictures = "".join(f"<td>{_picture(p)}</td>" for p in (result.images.photo(image), result.overlay(index)))
    target = html.escape(result.caption(index)[0])
    classes = "<br>".join(html.escape(f"{name or c}: {p:.1%}") for c, name, p in top)
    return f"<tr>{pictures}<td><b>{target}</b><br>{classes}</td><td>{_bars(result, index)}</td></tr>"


def _picture(pixels: np.ndarray) -> str:
    small = Image.fromarray(pixels)
    small.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    small.save(out, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}">'


def _bars(result: Explanation, index: Index) -> str:
    """The layers with the largest weights, as bars."""
    weights = result.layer_weights[index]
    if len(weights) < 2:
        return ""
    largest = float(np.abs(weights).max()) or 1.0
    order = np.sort((-np.abs(weights)).argsort(kind="stable")[:MOST_BARS])
    lines = [
        f"<tr><td>{html.escape(result.layers[i])}</td><td><div style='background:#4878cf;height:10px;"
        f"width:{120 * abs(float(weights[i])) / largest:.0f}px'></div></td><td>{weights[i]:.3f}</td></tr>"
        for i in order
    ]
    return f"<table style='font-size:80%'>{''.join(lines)}</table>"
