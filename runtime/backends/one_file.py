"""The only module by which export runs a program: it opens an ONNX file with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..errors import BackendUnavailable, BundleError, first_line
from . import Settings, create
from .cpu import give_back_freed, shapes_of
from .ort import OrtBackend

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def open_file(path: Path) -> Run:
    """Opens an ONNX file on the CPU: inputs by name -> outputs by name. BundleError if it does not load or run.

    BackendUnavailable where no ONNX Runtime is installed.
    """
    try:
        backend = create("onnxruntime", Settings(keeps_memory=False))
    except BackendUnavailable as error:
        raise BackendUnavailable(
            f"an export runs the programs that it wrote, which needs ONNX Runtime: {error}"
        ) from None
    assert isinstance(backend, OrtBackend)
    session = backend.session(path, single=False, packs=False)
    names = [o.name for o in session.get_outputs()]

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            out = dict(zip(names, session.run(names, dict(feeds)), strict=True))
            give_back_freed()  # what lay between inputs and outputs
            return out
        except Exception as error:
            raise BundleError(
                f"{path.name}: ONNX Runtime cannot run it on {shapes_of(feeds)}: {first_line(error)[:300]}"
            ) from error

    return run
