"""Rules for matrix products."""

from __future__ import annotations

import string

from ..autodiff import vjp
from ..tape import attribute, constant_of, dims, open_dims


@vjp("Gemm")
def gemm(op, node, g):
    """y = alpha A B + beta C (A, B optionally transposed): dA = alpha g B^T, for a batch in A's rows."""
    b = node.inputs[1]
    if attribute(node, "transA", 0) or op.wants(b):
        return (None, None, None)
    alpha, turned = attribute(node, "alpha", 1.0), 1 - attribute(node, "transB", 0)
    if is_square_weight(b):
        return (op.Gemm(g, op.Mul(b, op.floats(2.0)), alpha=alpha / 2, transB=turned), None, None)
    return (op.Gemm(g, b, alpha=alpha, transB=turned), None, None)


def is_square_weight(value):
    """Whether it is a constant matrix with as many rows as columns.

    OpenVINO 2026.4 confuses such a weight with its transpose if a graph multiplies by both (its CPU plugin caches
    packed weights by address and size). The gradient multiplies by twice the weight, which is exact, and halves.
    """
    sizes = dims(value)
    return constant_of(value) is not None and len(sizes) == 2 and sizes[0] == sizes[1]


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
    if is_square_weight(b) and op.wants(a):
        doubled = op.MatMul(g, op.Mul(transposed(op, b), op.floats(2.0)))
        return (op.unbroadcast(op.Mul(doubled, op.floats(0.5)), a, y), None)
    return (
        op.unbroadcast(op.MatMul(g, transposed(op, b)), a, y) if op.wants(a) else None,
        op.unbroadcast(op.MatMul(transposed(op, a), g), b, y) if op.wants(b) else None,
    )


@vjp("Einsum", shares_image=False)
def einsum(op, node, g):
    """d operand = Einsum of g and the other operands, with the operand's subscripts as the result. Not for an operand
    or a result that repeats a subscript.
    """
    terms, out = _subscripts(attribute(node, "equation"), [len(dims(x)) for x in node.inputs])
    sizes = {}
    for x, term in zip(node.inputs, terms, strict=True):
        for c, n in zip(term, dims(x), strict=True):
            if sizes.setdefault(c, n) != n:  # a size of 1 that is repeated
                return tuple(None for _ in node.inputs)
    results = []
    for i, (x, term) in enumerate(zip(node.inputs, terms, strict=True)):
        others = [t for j, t in enumerate(terms) if j != i]
        other_subscripts = set(out).union(*map(set, others))
        if not op.wants(x) or len(set(term)) != len(term) or len(set(out)) != len(out):
            results.append(None)
            continue
        shared_subscripts = "".join(c for c in term if c in other_subscripts)
        operands = [g, *(y for j, y in enumerate(node.inputs) if j != i)]
        d = op.Einsum(*operands, equation=f"{','.join([out, *others])}->{shared_subscripts}")
        if shared_subscripts != term:  # subscripts that were summed over alone
            single = [n if c in other_subscripts else 1 for c, n in zip(term, open_dims(x, -1), strict=True)]
            d = op.expand_like(op.Reshape(d, single), x)
        results.append(d)
    return tuple(results)


def _subscripts(equation, ranks):
    """The subscripts of the operands and of the result, with an ellipsis and an implicit result written in full."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    letters = [c for c in string.ascii_letters if c not in equation]
    deepest = max((n - len(t) + 3 for t, n in zip(terms, ranks, strict=True) if "..." in t), default=0)
    names = "".join(letters[:deepest])
    spelt = [
        t.replace("...", names[deepest - (n - len(t) + 3) :]) if "..." in t else t
        for t, n in zip(terms, ranks, strict=True)
    ]
    if not arrow:
        once = left.replace("...", "").replace(",", "")
        out = "..." + "".join(sorted(c for c in set(once) if once.count(c) == 1))
    return spelt, out.replace("...", names)
