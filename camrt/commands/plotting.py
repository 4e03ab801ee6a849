"""The option --plot of several commands."""

from __future__ import annotations

import importlib
from pathlib import Path

from .. import install
from ..runtime.errors import InputError


def check_plot(path: Path | None) -> None:
    """InputError for what would only be found out after minutes."""
    if path is None:
        return
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise InputError(install.repair("--plot", "matplotlib", "bench", error)) from None
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {path}: name it .png, .svg or .pdf")
    if not path.resolve().parent.is_dir():
        raise InputError(f"{path}: no such folder")
