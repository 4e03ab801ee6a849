"""The table of operators, each a function of PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Operator = Callable[..., Any]
OPERATORS: dict[str, Operator] = {}


def operator(*op_types: str) -> Callable[[Operator], Operator]:
    """Registers (attributes, *inputs) -> output or tuple of outputs."""

    def register(function: Operator) -> Operator:
        for op_type in op_types:
            if op_type in OPERATORS:
                raise ValueError(f"{op_type} is registered already")
            OPERATORS[op_type] = function
        return function

    return register
