"""Array operations behind the maps. NumPy here is the specification of each and runs anywhere."""

from .reference import (
    GATES,
    accumulate_maps,
    fuse_layers,
    gate,
    mask_batch,
    minmax,
    normalize_layers,
    resize_taps,
    upsample,
    winsorize,
)

__all__ = [
    "GATES",
    "accumulate_maps",
    "fuse_layers",
    "gate",
    "mask_batch",
    "minmax",
    "normalize_layers",
    "resize_taps",
    "upsample",
    "winsorize",
]
