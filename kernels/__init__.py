"""Array operations behind the maps. NumPy here is the specification of each and runs anywhere."""

from .reference import fuse_layers, minmax, normalize_layers, resize_taps, upsample, winsorize

__all__ = ["fuse_layers", "minmax", "normalize_layers", "resize_taps", "upsample", "winsorize"]
