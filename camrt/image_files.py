"""The image files that a user names: files, folders, patterns, lists."""

from __future__ import annotations

import functools
import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .runtime.errors import InputError

CONFIGURATION = "explanations.json"  # in every folder that camrt explain wrote


@dataclass
class ImageFiles:
    """Files to explain, each once, in the order they were named, a folder's sorted by path.

    names: file -> its path below what named it, which its results keep. skipped: reason -> how many files in folders
    were left out.
    """

    names: dict[Path, Path] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    def share(self, shard: tuple[int, int] | None) -> list[Path]:
        """The files of shard (number, count): every count-th, from the number-th (from 1) on; of None, all."""
        number, count = shard or (1, 1)
        return list(self.names)[number - 1 :: count]


def find_images(patterns: Iterable[str]) -> list[Path]:
    """As `collect`, only the files."""
    return list(collect(patterns).names)


def collect(patterns: Iterable[str], skip: Sequence[Path] = ()) -> ImageFiles:
    """The image files that files, folders (with their subfolders) and glob patterns name.

    In a folder, files count whose suffix is one that Pillow opens; results of camrt, hidden files, and what lies in the
    folders `skip` are left out. InputError if a pattern names no file, or a folder of `skip` itself.
    """
    images, avoid = ImageFiles(), {p.resolve() for p in skip}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            if path.resolve() in avoid:
                raise InputError(f"{pattern}: its results would lie among the images: choose another --out")
            files = [(f, f.relative_to(path)) for f in _inside(path, avoid, set(), images.skipped)]
        elif path.is_file():
            files = [(path, Path(path.name))]
        elif path.exists():
            raise InputError(f"{pattern}: neither a file nor a folder")
        else:
            matches = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
            files = [(p, Path(p.name)) for p in matches]
        if not files:
            raise InputError(f"{pattern}: no images there" if path.is_dir() else f"{pattern}: no such file")
        for file, name in files:
            images.names.setdefault(file, name)
    return images


def read_list(path: Path) -> list[str]:
    """The paths in a text file, one a line; relative ones start where the list is. Empty lines and lines that start
    with # are left out. InputError.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no list of images ({error})") from None
    paths = [str(path.parent / line.strip()) for line in lines if line.strip() and not line.startswith("#")]
    if not paths:
        raise InputError(f"{path}: names no image")
    return paths


def _inside(folder: Path, avoid: set[Path], visited: set[Path], skipped: Counter[str]) -> Iterator[Path]:
    """A folder's image files, sorted, depth first; each folder once, whatever links there are."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        skipped["folder that cannot be read"] += 1
        return
    place = folder.resolve()
    if place in avoid or place in visited:
        return
    visited.add(place)
    if any(e.name == CONFIGURATION for e in entries):
        skipped["in a folder of earlier explanations"] += sum(1 for e in entries if e.suffix.lower() in suffixes())
        return
    for entry in entries:
        if entry.name.startswith("."):
            skipped["hidden"] += 1
        elif entry.is_dir():
            yield from _inside(entry, avoid, visited, skipped)
        elif entry.suffix.lower() in suffixes():
            if entry.is_file() or (entry.is_symlink() and not entry.exists()):
                yield entry
            else:
                skipped["neither a file nor a folder"] += 1
        else:
            skipped[f"{entry.suffix or 'without a suffix'}, no image format"] += 1


@functools.cache
def suffixes() -> set[str]:
    """Of the formats that this Pillow opens, but for those that it opens with outside help, and videos."""
    from PIL import Image

    Image.init()
    openable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return openable - {".pdf", ".eps", ".ps", ".wmf", ".emf", ".mpg", ".mpeg", ".h5", ".hdf", ".bufr", ".grib", ".iim"}
