"""CAM methods: one pure function each, registered with the data it reads. Importing this package registers all."""

from . import gradient, integrative, masking, perturbing, winsor
from .data import Activations, Gradients, GridMaps, Heads, Lane, LayerMaps, MaskedRuns, MethodData, SignedMaps
from .data.layer_maps import GRADIENT_AGGREGATIONS
from .registry import METHODS, Method, Result, all_methods, cam, join, method_named, pickles, retune_of_rows
from .smooth import Smooth

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
    "SignedMaps",
    "Smooth",
    "all_methods",
    "cam",
    "gradient",
    "integrative",
    "join",
    "masking",
    "method_named",
    "perturbing",
    "pickles",
    "retune_of_rows",
    "winsor",
]
