"""camrt: explanations of vision models at production speed.

Heavy packages are imported when they are used: `load` needs a backend (onnxruntime), `export_model` torch,
`export_onnx` onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiling.api import compile
    from .explaining import explain_files
    from .export.api import export_model, export_onnx
    from .runtime.bundle.manifest import Preprocess
    from .runtime.cams import Smooth
    from .runtime.errors import CamrtError
    from .runtime.explainer import Explainer, load
    from .runtime.explanation import Explanation
    from .runtime.tuning import tune
    from .verification.device.check import check
    from .verification.device.measure import add_references, store_references

__version__ = "0.1.0"
__all__ = [
    "CamrtError",
    "Explainer",
    "Explanation",
    "Preprocess",
    "Smooth",
    "add_references",
    "check",
    "compile",
    "explain_files",
    "export_model",
    "export_onnx",
    "load",
    "store_references",
    "tune",
]

_HOME = {
    "CamrtError": "runtime.errors",
    "Explainer": "runtime.explainer",
    "Explanation": "runtime.explanation",
    "Preprocess": "runtime.bundle.manifest",
    "Smooth": "runtime.cams",
    "add_references": "verification.device.measure",
    "check": "verification.device.check",
    "compile": "compiling.api",
    "explain_files": "explaining",
    "export_model": "export.api",
    "export_onnx": "export.api",
    "load": "runtime.explainer",
    "store_references": "verification.device.measure",
    "tune": "runtime.tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
