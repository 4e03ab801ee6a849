"""Engines that camrt does not use itself. For the tests, an ONNX file is a function: inputs by name -> outputs by name;
and an engine is a backend, since an exported program is ordinary ONNX.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from camrt.runtime.bundle.manifest import Program
from camrt.runtime.bundle.reading import Bundle

Arrays = dict[str, np.ndarray]
Opened = Callable[[Mapping[str, np.ndarray]], Arrays]
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is missing: make interop installs it"
)


def in_onnxruntime(path: Path) -> Opened:
    """With its default optimisations, which are all."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda feeds: dict(zip(names, map(np.asarray, session.run(names, dict(feeds))), strict=True))


def in_openvino(path: Path) -> Opened:
    """OpenVINO's CPU plugin, in float32."""
    import openvino  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = names_of(path)

    def run(feeds: Mapping[str, np.ndarray]) -> Arrays:
        results = compiled(dict(feeds))
        return {name: np.array(results[name]) for name in names}

    return run


def in_reference(path: Path) -> Opened:
    """The reference evaluator of the onnx package: NumPy, operator by operator, as the specification says."""
    from onnx.reference import ReferenceEvaluator

    evaluator, names = ReferenceEvaluator(str(path)), names_of(path)
    return lambda feeds: dict(zip(names, map(np.asarray, evaluator.run(names, dict(feeds))), strict=True))


def names_of(path: Path) -> list[str]:
    """Of the outputs."""
    return [o.name for o in onnx.load(path, load_external_data=False).graph.output]


class Engine:
    """One of these functions as a backend."""

    lanes, prunes, gpu = 1, False, None

    def __init__(self, opened: Callable[[Path], Opened]) -> None:
        self.name, self._opened = opened.__name__.removeprefix("in_"), opened

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> _OpenedProgram:
        return _OpenedProgram(self._opened(bundle.file(program)))


class _OpenedProgram:
    def __init__(self, run: Opened) -> None:
        self.run = run
