"""Array operations behind the maps, for NumPy's arrays and for a GPU's.

calls.py is what callers use; reference.py is NumPy and the specification of each kernel; cuda/ has their CUDA sources,
build.py compiles them, launches.py plans their launches and device.py owns the GPU.
"""

from .arrays import DeviceArray
from .calls import (
    accumulate_maps,
    channel_extremes,
    check_finite,
    class_scores,
    fuse_layers,
    layer_importance,
    mask_batch,
    resize_picture,
    take_channels,
    winsorize,
)
from .errors import DeviceError, OutOfMemory
from .reference import AGGREGATIONS, GATES, class_probabilities, gate, minmax, normalize_layers, resize_taps, upsample

__all__ = [
    "AGGREGATIONS",
    "GATES",
    "DeviceArray",
    "DeviceError",
    "OutOfMemory",
    "accumulate_maps",
    "channel_extremes",
    "check_finite",
    "class_probabilities",
    "class_scores",
    "fuse_layers",
    "gate",
    "layer_importance",
    "mask_batch",
    "minmax",
    "normalize_layers",
    "resize_picture",
    "resize_taps",
    "take_channels",
    "upsample",
    "winsorize",
]
