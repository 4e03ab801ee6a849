"""Files with the names of a network's classes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..runtime.errors import InputError


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classes", type=Path, help="class names: a JSON list, or a text file with one name per line")


def read_class_names(path: Path) -> list[str]:
    """The names in the order of the logits. InputError if the file cannot be read or holds something else."""
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no class names ({error})") from None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InputError(f"{path}: expected a JSON list of names, or a text file with one name per line")
    return names
