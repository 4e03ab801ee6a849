"""Array operations that compute the maps, for NumPy arrays and for GPU arrays.

operations/ has one file per kernel: its checks, its NumPy specification and its launch. cuda/ has the CUDA sources,
which build.py compiles. gpu/ has the device, its streams and its memory. call.py chooses NumPy or CUDA for a call.
"""

from .errors import DeviceError, OutOfMemory
from .gpu.arrays import DeviceArray
from .gpu.protocol import GpuDevice, GpuStream
from .operations.accumulate_maps import accumulate_maps
from .operations.channels import channel_extremes, take_channels
from .operations.check_finite import check_finite
from .operations.class_scores import PROBABILITIES, class_probabilities, class_scores
from .operations.fuse_layers import fuse_layers, normalize_layers
from .operations.gates import GATES, gate, minmax, within_range
from .operations.layer_importance import AGGREGATIONS, layer_importance
from .operations.mask_batch import mask_batch
from .operations.resize_picture import FILTERS, resize_picture
from .operations.resizing import INTERPOLATIONS, resize_taps, upsample
from .operations.winsorize import winsorize

__all__ = [
    "AGGREGATIONS",
    "FILTERS",
    "GATES",
    "INTERPOLATIONS",
    "PROBABILITIES",
    "DeviceArray",
    "DeviceError",
    "GpuDevice",
    "GpuStream",
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
    "within_range",
]
