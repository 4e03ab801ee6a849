"""The data that methods read: one class per kind; its `read` runs the programs of a session."""

from .base import MethodData
from .grid_maps import GridMaps
from .heads import Heads
from .layer_maps import LayerMaps
from .masked_runs import Lane, MaskedRuns
from .signed_maps import SignedMaps
from .tensors import Activations, Gradients

DATA: tuple[type[MethodData], ...] = (LayerMaps, SignedMaps, Gradients, Activations, GridMaps, MaskedRuns, Heads)

__all__ = [
    "DATA",
    "Activations",
    "Gradients",
    "GridMaps",
    "Heads",
    "Lane",
    "LayerMaps",
    "MaskedRuns",
    "MethodData",
    "SignedMaps",
]
