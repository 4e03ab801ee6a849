"""A backend that runs programs with PyTorch's operators, in float64 or float32: slow, and independent of every engine.

Rounding to float16 after every float16 operator, it checks mixed-precision programs on any machine: a GPU that sums in
float32 rounds in the same places. ONNX Runtime's CPU provider computes in float32 between its casts, and so rounds
less.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..runtime.bundle.manifest import Program
from ..runtime.bundle.reading import Bundle


class InterpretedBackend:
    """precise: computes in float64, and gives the results in float32. rounding: rounds float16 tensors of the program
    to float16.
    """

    lanes = 1
    prunes = False
    gpu = None

    def __init__(self, precise: bool = False, rounding: bool = False) -> None:
        self._precise = precise
        self._rounding = rounding
        self.name = "rounding" if rounding else "interpreted"

    def __str__(self) -> str:
        how = ", rounding to float16" if self._rounding else f" in float{64 if self._precise else 32}"
        return f"PyTorch operators{how}"

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> _InterpretedExecutable:
        return _InterpretedExecutable(bundle.file(program), list(program.outputs), self._precise, self._rounding)


class _InterpretedExecutable:
    def __init__(self, path: Path, outputs: list[str], precise: bool, rounding: bool) -> None:
        import torch

        from ..export.interpreter import Interpreter

        self._dtype = torch.float64 if precise else torch.float32
        self._program = Interpreter(path, self._dtype, rounding=rounding)
        self._outputs = outputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        with torch.no_grad():
            tensors = {n: torch.from_numpy(np.array(a)).to(self._dtype) for n, a in feeds.items()}
            out = self._program.run(tensors, self._outputs)
        return {name: value.float().numpy() for name, value in out.items()}
