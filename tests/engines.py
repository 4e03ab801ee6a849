"""Engines that camrt does not use itself, as backends for tests: an exported program is ordinary ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from camrt.runtime.bundle.manifest import Program
from camrt.runtime.bundle.reading import Bundle


class OpenVino:
    """OpenVINO's CPU plugin, in float32."""

    name, lanes, gpu = "openvino", 1, None

    def __init__(self) -> None:
        import openvino  # pyright: ignore[reportMissingImports]

        self._core = openvino.Core()

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> _OpenVinoProgram:
        model = self._core.read_model(str(bundle.file(program)))
        return _OpenVinoProgram(self._core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}), program)


class _OpenVinoProgram:
    def __init__(self, compiled: Any, program: Program) -> None:
        self._compiled, self._outputs = compiled, list(program.outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = self._compiled(dict(feeds))
        return {name: np.array(results[name]) for name in self._outputs}


class Reference:
    """The reference evaluator of the onnx package: NumPy, operator by operator, as the specification says."""

    name, lanes, gpu = "reference", 1, None

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> _ReferenceProgram:
        from onnx.reference import ReferenceEvaluator

        return _ReferenceProgram(ReferenceEvaluator(str(bundle.file(program))), list(program.outputs))


class _ReferenceProgram:
    def __init__(self, evaluator: Any, outputs: list[str]) -> None:
        self._evaluator, self._outputs = evaluator, outputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._evaluator.run(self._outputs, dict(feeds)), strict=True))
