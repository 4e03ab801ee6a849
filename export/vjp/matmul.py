"""Rules for matrix products."""

from __future__ import annotations

from ..autodiff import vjp
from ..tape import attribute, dims


@vjp("Gemm")
def gemm(op, node, g):
    """y = alpha A B + beta C (A, B optionally transposed): dA = alpha g B^T, for a batch in A's rows."""
    b = node.inputs[1]
    if attribute(node, "transA", 0) or op.wants(b):
        return (None, None, None)
    da = op.Gemm(g, b, alpha=attribute(node, "alpha", 1.0), transB=1 - attribute(node, "transB", 0))
    return (da, None, None)


def transposed(op, value):
    """The last two axes swapped."""
    rank = len(dims(value))
    return op.Transpose(value, perm=[*range(rank - 2), rank - 1, rank - 2])


@vjp("MatMul")
def matmul(op, node, g):
    """da = g b^T, db = a^T g, over the leading axes that the operands share."""
    (a, b), y = node.inputs, node.outputs[0]
    if min(len(dims(a)), len(dims(b))) < 2:
        return (None, None)
    return (
        op.unbroadcast(op.MatMul(g, transposed(op, b)), a, y) if op.wants(a) else None,
        op.unbroadcast(op.MatMul(transposed(op, a), g), b, y) if op.wants(b) else None,
    )
