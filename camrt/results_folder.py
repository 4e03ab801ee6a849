"""The folder that camrt explain writes: pictures, maps, and a line of JSON for each image.

    explanations.json    the configuration: what every result in the folder was made with
    explanations.jsonl   a line for each image; of several lines for one image the last counts
    a.png, a.npy         overlay and map of a.jpg; a subfolder of the images is a subfolder here

A line is appended once the image's files are complete, and every file is moved to its place in one step: a run that is
killed leaves what was finished, and never takes away what an earlier run had finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from .image_files import CONFIGURATION, ImageFiles
from .runtime.errors import InputError

LINES = "explanations.jsonl"


@dataclass(frozen=True)
class Outputs:
    """Where an image's overlay and map go, as paths below the results folder; None for what is not written."""

    overlay: str | None
    map: str | None


class ResultsFolder:
    """configuration: what the results are made with, as JSON holds it; shard: (number, count) of several processes that
    share the folder, each with its own file of lines.

    InputError if the folder holds results of another configuration, if results would lie among the images, or if it
    cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        configuration: Mapping[str, Any],
        images: ImageFiles,
        overlays: bool = True,
        maps: bool = True,
        shard: tuple[int, int] | None = None,
    ) -> None:
        self.folder = folder
        self._configuration = dict(configuration)
        self.lines = folder / (LINES if shard is None else f"explanations-{shard[0]}-of-{shard[1]}.jsonl")
        self._overlays, self._maps = overlays, maps
        self._stems = distinct_stems(images, self._earlier_stems())
        self._refuse_to_mix_with_images()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._has_configuration = self._check_configuration()
            _drop_torn_line(self.lines)
            self._file: BinaryIO = self.lines.open("ab")
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from None

    def outputs(self, image: Path) -> Outputs:
        stem = self._stems[image]
        return Outputs(f"{stem}.png" if self._overlays else None, f"{stem}.npy" if self._maps else None)

    def finished(self) -> set[Path]:
        """The images with a line, complete files, and the size and time that their line records."""
        done = {}
        for record in _records(self.lines):
            done[record.get("image")] = record.get("bytes"), record.get("modified_ns")
        return {image for image in self._stems if self._is_finished(image, done.get(str(image)))}

    def _is_finished(self, image: Path, recorded: tuple[Any, Any] | None) -> bool:
        if recorded is None:
            return False
        outputs = self.outputs(image)
        try:
            stat = image.stat()
        except OSError:
            return False
        return recorded == (stat.st_size, stat.st_mtime_ns) and all(
            (self.folder / name).is_file() for name in (outputs.overlay, outputs.map) if name is not None
        )

    def begin(self) -> None:
        """Writes the configuration, before the first result."""
        if not self._has_configuration:
            with replacing(self.folder / CONFIGURATION) as file:
                file.write((json.dumps(self._configuration, indent=1, ensure_ascii=False) + "\n").encode())
            self._has_configuration = True

    def append(self, record: Mapping[str, Any]) -> None:
        """A finished image's line; its files must be there."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Leaves one line for each image: the last; and nothing where nothing was written."""
        self._file.close()
        last = {record.get("image"): number for number, record in enumerate(_records(self.lines))}
        count = sum(1 for _ in _records(self.lines))
        if count == 0:
            self.lines.unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
        elif count > len(last):
            kept = set(last.values())
            with replacing(self.lines) as file:
                for number, line in enumerate(self.lines.open("rb")):
                    if number in kept:
                        file.write(line)

    def _earlier_stems(self) -> dict[str, str]:
        """Image -> the stem of its results, of all lines that the folder has."""
        stems = {}
        for lines in sorted(self.folder.glob("explanations*.jsonl")):
            for record in _records(lines):
                name = record.get("overlay") or record.get("map")
                if isinstance(record.get("image"), str) and isinstance(name, str):
                    stems[record["image"]] = name[: -len(".png")]
        return stems

    def _refuse_to_mix_with_images(self) -> None:
        targets = {(self.folder / stem).parent.resolve() for stem in self._stems.values()}
        among = targets & {parent.resolve() for parent in {image.parent for image in self._stems}}
        if among:
            raise InputError(
                f"{self.folder}: its results would lie among the images in {min(among)}: choose another --out"
            )

    def _check_configuration(self) -> bool:
        """Whether there is one already. InputError if it is another."""
        path, configuration = self.folder / CONFIGURATION, self._configuration
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not readable ({error}): choose another --out") from None
        fields = [*configuration, *(n for n in earlier if n not in configuration)]
        other = [n for n in fields if earlier.get(n) != configuration.get(n)]
        if other:
            name = other[0]
            raise InputError(
                f"{self.folder} holds explanations with {name} {_short(earlier.get(name))}, these have "
                f"{_short(configuration.get(name))}: choose another --out"
            )
        return True


class replacing:
    """A file that takes the place of `path` when the block ends; an error leaves `path` as it was."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")

    def __enter__(self) -> BinaryIO:
        self._file = self._part.open("wb")
        return self._file

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._file.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)


def distinct_stems(images: ImageFiles, earlier: Mapping[str, str] = MappingProxyType({})) -> dict[Path, str]:
    """For every image the path of its results without a suffix: no two alike, also where case does not count.

    earlier: image -> its stem in a folder of earlier results, which it keeps and no other image gets.
    """
    stems: dict[Path, str] = {}
    taken = {stem.casefold() for stem in earlier.values()}
    numbers: dict[str, int] = {}
    for image, name in images.names.items():
        stem = distinct = name.with_suffix("").as_posix()
        if str(image) in earlier:
            distinct = earlier[str(image)]
        while str(image) not in earlier and distinct.casefold() in taken:
            numbers[stem.casefold()] = numbers.get(stem.casefold(), 1) + 1
            distinct = f"{stem}-{numbers[stem.casefold()]}"
        taken.add(distinct.casefold())
        stems[image] = distinct
    return stems


def _records(lines: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file; one that is no JSON object counts as one without an image."""
    try:
        file = lines.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                record = {}
            yield record if isinstance(record, dict) else {}


def _drop_torn_line(lines: Path) -> None:
    """What a killed process wrote of its last line."""
    try:
        file = lines.open("r+b")
    except FileNotFoundError:
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
