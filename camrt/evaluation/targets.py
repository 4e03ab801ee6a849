"""Which class to explain in each image, from a file of labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

from ..runtime.bundle.manifest import Manifest
from ..runtime.errors import InputError
from ..runtime.targets import class_index


def read_targets_file(path: Path, images: Mapping[Path, str], manifest: Manifest) -> dict[Path, int]:
    """image -> class, for the images that the file names.

    path: a JSON object, or CSV with an image and a class in each row; a first row that names no image or no class is a
    heading. An image is named by the end of its path, as far as that names one image alone, with or without the
    suffix; a class by its number or name. images: image -> its name below the folder. InputError if the file cannot be
    read, a class does not exist, an image has two classes, or no image is named.
    """
    labels, by_end = _read(path), _by_end(images)
    targets: dict[Path, int] = {}
    for number, (name, label) in enumerate(labels):
        image = by_end.get(Path(name).as_posix())
        if image is None:
            continue
        try:
            target = _class(label, manifest)
        except InputError as error:
            if number == 0 and path.suffix.lower() != ".json" and len(labels) > 1:
                continue
            raise InputError(f"{path}, entry {number + 1}: {error}") from None
        if targets.setdefault(image, target) != target:
            raise InputError(f"{path}, entry {number + 1}: {name} has class {targets[image]} already")
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
            return [(str(name), _label(label)) for name, label in entries.items()]
        rows = [row for row in csv.reader(text.splitlines(), skipinitialspace=True) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: no labels ({error})") from None
    short = [row for row in rows if len(row) < 2]
    if short:
        raise InputError(f"{path}: {short[0]}: write an image and a class in each row")
    return [(row[0].strip(), row[1].strip()) for row in rows]


def _label(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _by_end(images: Mapping[Path, str]) -> dict[str, Path]:
    """The ends of the images' paths, with and without the suffix, that name one of them alone. The whole path below
    the folder always does.
    """
    found: dict[str, Path | None] = {}
    for image in images:
        parts = image.absolute().parts
        for start in range(1, len(parts)):
            end = Path(*parts[start:])
            for name in {end.as_posix(), end.with_suffix("").as_posix()}:
                found[name] = None if found.get(name, image) != image else image
    named = {end: image for end, image in found.items() if image is not None}
    return named | {name: image for image, name in images.items()}


def _class(label: str, manifest: Manifest) -> int:
    if not label.removeprefix("-").isdecimal():
        return class_index(label, manifest)
    number = int(label)
    if not 0 <= number < manifest.num_classes:
        raise InputError(f"class {number} is out of range: the network has classes 0..{manifest.num_classes - 1}")
    return number
