"""The option --plot of several commands."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .. import install
from ..runtime.errors import InputError


def check_plot(path: Path | None) -> None:
    """InputError for what would only be found out after minutes."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"--plot needs matplotlib: {install.extra('bench')}")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {path}: name it .png, .svg or .pdf")
    if not path.resolve().parent.is_dir():
        raise InputError(f"{path}: no such folder")
