"""A backend that rounds to float16 after every float16 operator, to check mixed-precision programs on any machine.

A GPU that sums in float32 rounds in the same places. ONNX Runtime's CPU provider computes in float32 between its casts,
and so rounds less.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..runtime.bundle.manifest import Program
from ..runtime.bundle.reading import Bundle


class RoundingBackend:
    """Runs programs with PyTorch's operators in float32 and rounds float16 tensors of the program to float16."""

    name = "rounding"
    lanes = 1
    gpu = None

    def __str__(self) -> str:
        return "PyTorch operators, rounding to float16"

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> _RoundingExecutable:
        return _RoundingExecutable(bundle.file(program), list(program.outputs))


class _RoundingExecutable:
    def __init__(self, path: Path, outputs: list[str]) -> None:
        import torch

        from ..export.interpreter import Interpreter

        self._program = Interpreter(path, torch.float32, rounding=True)
        self._outputs = outputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        with torch.no_grad():
            out = self._program.run({n: torch.from_numpy(np.array(a)) for n, a in feeds.items()}, self._outputs)
        return {name: value.numpy() for name, value in out.items()}
