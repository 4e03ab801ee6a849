"""CAM methods: one pure function each, registered with the data it reads. Importing this package registers all."""

from . import gradient, integrative, masking, perturbing, winsor
from .data import Activations, Gradients, GridMaps, Heads, Lane, LayerMaps, MaskedRuns, MethodData
from .data.layer_maps import GRADIENT_AGGREGATIONS
from .integrative import Smooth
from .registry import METHODS, Method, Result, all_methods, cam, join, method_named

__all__ = [
    "GRADIENT_AGGREGATIONS",
    "METHODS",
    "Activations",
    "Gradients",
    "GridMaps",
    "Heads",
    "Lane",
    "LayerMaps",
    "MaskedRuns",
    "Method",
    "MethodData",
    "Result",
    "Smooth",
    "all_methods",
    "cam",
    "gradient",
    "integrative",
    "join",
    "masking",
    "method_named",
    "perturbing",
    "winsor",
]
