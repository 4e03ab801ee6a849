"""Explanations as a response: JSON, PNG or NumPy's format."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..runtime.explanation import Explanation


def as_json(explanations: Sequence[Explanation], ids: Sequence[str | None], maps: bool) -> dict[str, Any]:
    """What made them, and of each image what `Explanation.to_dict` says of it, its options, its id and its map (H, W):
    base64 of little-endian float32 numbers, row after row.
    """
    told = [explanation.to_dict(0) for explanation in explanations]
    images = []
    for explanation, one, known in zip(explanations, told, ids, strict=True):
        said = one["images"][0] | {"options": one["options"]} | ({} if known is None else {"id": known})
        for of_input in ("pixels_sha256", "size"):  # of the network's input: the picture itself is not kept
            del said[of_input]
        if maps:
            array = explanation.maps[0].astype("<f4")
            text = base64.b64encode(array.tobytes()).decode()
            said["map"] = {"shape": list(array.shape), "dtype": "float32", "base64": text}
        images.append(said)
    together = {name: value for name, value in told[0].items() if name not in ("options", "images")}
    return together | {"images": images}


def as_npy(explanations: Sequence[Explanation]) -> bytes:
    """The maps (B, H, W) float32."""
    out = io.BytesIO()
    np.save(out, np.concatenate([e.maps for e in explanations]))
    return out.getvalue()
