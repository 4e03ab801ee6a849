"""The image files that a command line names."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from .runtime.errors import InputError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Image files, each once. patterns: files, folders (with all subfolders) or glob patterns.

    InputError if a pattern gives no file.
    """
    images: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
        if not files:
            raise InputError(f"{pattern}: no images there" if path.is_dir() else f"{pattern}: no such file")
        images.update(dict.fromkeys(files))
    return list(images)
