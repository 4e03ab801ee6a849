"""Array operations behind the maps, for NumPy's arrays and for a GPU's.

calls.py is what callers use; reference.py is NumPy and the specification of each kernel; cuda/ has their CUDA sources,
build.py compiles them, launches.py plans their launches and device.py owns the GPU.
"""

from .arrays import DeviceArray
from .calls import accumulate_maps, fuse_layers, mask_batch, winsorize
from .errors import DeviceError
from .reference import GATES, gate, minmax, normalize_layers, resize_taps, upsample

__all__ = [
    "GATES",
    "DeviceArray",
    "DeviceError",
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
