"""Which class to explain in each image, from a file of labels."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..runtime.bundle.manifest import Manifest
from ..runtime.errors import InputError
from ..runtime.targets import class_index


def read_targets_file(path: Path, images: Mapping[Path, str], manifest: Manifest) -> dict[Path, int]:
    """image -> class, for the images that the file names.

    path: a JSON object, or CSV with an image and a class in each row (a first row with other words is a heading).
    images: image -> its name below the folder. An image is named so, or by its file name where only one has that name,
    with or without the suffix; a class by its number or name. InputError if the file cannot be read, a class does not
    exist, or no image is named.
    """
    labels = _read(path)
    by_name = _unique({name: image for image, name in images.items()})
    targets: dict[Path, int] = {}
    for number, (name, label) in enumerate(labels):
        image = by_name.get(name) or by_name.get(Path(name).name)
        if image is None:
            continue
        try:
            targets[image] = _class(label, manifest)
        except InputError as error:
            raise InputError(f"{path}, entry {number + 1}: {error}") from None
    if not targets:
        raise InputError(f"{path}: names none of the images, e.g. {next(iter(images.values()), 'a.jpg')}")
    return targets


def _read(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            entries = json.loads(text)
            if not isinstance(entries, dict):
                raise ValueError("it must be an object: image -> class")
            return [(str(name), str(label)) for name, label in entries.items()]
        rows = [row for row in csv.reader(text.splitlines()) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: no labels ({error})") from None
    short = [row for row in rows if len(row) < 2]
    if short:
        raise InputError(f"{path}: {short[0]}: write an image and a class in each row")
    return [(row[0].strip(), row[1].strip()) for row in rows]


def _unique(images: dict[str, Path]) -> dict[str, Path]:
    """By path, by file name and by stem, each where it names one image."""
    names = dict(images)
    for shorten in (lambda n: Path(n).name, _without_suffix, lambda n: Path(n).stem):
        counts = Counter(shorten(name) for name in images)
        for name, image in images.items():
            if counts[shorten(name)] == 1:
                names.setdefault(shorten(name), image)
    return names


def _without_suffix(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _class(label: str, manifest: Manifest) -> int:
    if not label.removeprefix("-").isdecimal():
        return class_index(label, manifest)
    number = int(label)
    if not 0 <= number < manifest.num_classes:
        raise InputError(f"class {number} is out of range: the network has classes 0..{manifest.num_classes - 1}")
    return number
