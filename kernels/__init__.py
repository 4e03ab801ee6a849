"""Array operations behind the maps, for NumPy's arrays and for a GPU's.

operations/ has a file for each kernel: what it takes, its NumPy specification and its launch; cuda/ has their CUDA
sources, which build.py compiles; gpu/ owns the GPU; call.py says how arrays of either kind come in.
"""

from .errors import DeviceError, OutOfMemory
from .gpu.arrays import DeviceArray
from .gpu.protocol import GpuDevice, GpuStream
from .operations.accumulate_maps import accumulate_maps
from .operations.channels import channel_extremes, take_channels
from .operations.check_finite import check_finite
from .operations.class_scores import PROBABILITIES, class_probabilities, class_scores
from .operations.fuse_layers import fuse_layers, normalize_layers
from .operations.gates import GATES, gate, minmax
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
]
