"""Runs an ONNX graph with PyTorch, in any precision and with autograd: a reference that shares no code with the rules.

Semantics are the ONNX specification's (onnx.ai/onnx/operators). Reads graphs in opset 18 or later form. A new operator
is one function in the file of its kind.
"""

from . import linear, norm, pointwise, quantised, reduce, shape
from .interpreter import Interpreter
from .registry import OPERATORS

__all__ = ["OPERATORS", "Interpreter", "linear", "norm", "pointwise", "quantised", "reduce", "shape"]
