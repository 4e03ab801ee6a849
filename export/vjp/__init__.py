"""Gradient rules, one function per operator; importing this package registers them all."""

from . import conv, matmul, norm, pointwise, pool, reduce, sample, shape

__all__ = ["conv", "matmul", "norm", "pointwise", "pool", "reduce", "sample", "shape"]
