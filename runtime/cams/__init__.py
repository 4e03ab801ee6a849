"""CAM methods: one pure function each, registered with what it needs; importing this package registers them all."""

from . import gradient, winsor
from .registry import METHODS, LayerMaps, Method, Result, cam, method_named

__all__ = ["METHODS", "LayerMaps", "Method", "Result", "cam", "gradient", "method_named", "winsor"]
