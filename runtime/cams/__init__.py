"""CAM methods: one pure function each, registered with what it reads; importing this package registers them all."""

from . import gradient, integrative, masking, perturbing, winsor
from .data import Gradients, GridMaps, Heads, Lane, LayerMaps, MaskedRuns
from .integrative import Smooth
from .registry import METHODS, NEEDS, Method, Result, cam, join, method_named

__all__ = [
    "METHODS",
    "NEEDS",
    "Gradients",
    "GridMaps",
    "Heads",
    "Lane",
    "LayerMaps",
    "MaskedRuns",
    "Method",
    "Result",
    "Smooth",
    "cam",
    "gradient",
    "integrative",
    "join",
    "masking",
    "method_named",
    "perturbing",
    "winsor",
]
