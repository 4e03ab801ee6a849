"""The folder that camrt explain writes: pictures, maps, and a line of JSON for each image.

    explanations.json    the configuration: what every result in the folder was made with
    explanations.jsonl   a line for each image; of several lines for one image the last counts
    a.png, a.npy         overlay and map of a.jpg; a subfolder of the images is a subfolder here

A line is appended once the image's files are complete, and every file is moved to its place in one step: a run that is
killed leaves what was finished, and never takes away what an earlier run had finished. Before the files of a picture
that changed are replaced, a line says that it is unfinished, so that no line describes another picture's files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from .image_files import CONFIGURATION, ImageFiles
from .runtime.errors import InputError

LINES = "explanations.jsonl"
_SHARDS = "explanations-*-of-*.jsonl"


@dataclass(frozen=True)
class Outputs:
    """Where an image's overlay and map go, as paths below the results folder; None for what is not written."""

    overlay: str | None
    map: str | None


class ResultsFolder:
    """configuration: what the results are made with, as JSON holds it; shard: (number, count) of several processes that
    share the folder, each with its own file of lines, which a later run without a shard merges.

    InputError if the folder holds results of another configuration, if results would lie among the images, if another
    run writes there, or if it cannot be written.
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
        self._lock = threading.Lock()
        try:
            created = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._has_configuration = self._check_configuration()
                self._earlier = _last_records([self.lines, *sorted(folder.glob("explanations*.jsonl"))])
                self._stems = distinct_stems(images, {key: _stem(r) for key, r in self._earlier.items()})
                self._refuse_to_mix_with_images()
            except InputError:
                if created:
                    folder.rmdir()
                raise
            self._file: BinaryIO = self.lines.open("ab")
            self._refuse_a_second_run(self._file)
            _drop_torn_line(self.lines)
            if shard is None:
                self._merge_shards()
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from None

    def outputs(self, image: Path) -> Outputs:
        stem = self._stems[image]
        return Outputs(f"{stem}.png" if self._overlays else None, f"{stem}.npy" if self._maps else None)

    def finished(self) -> set[Path]:
        """The images with a line, complete files, and contents that have the line's hash."""
        with ThreadPoolExecutor(thread_name_prefix="camrt-hash") as pool:
            done = pool.map(lambda image: self._is_finished(image, self._earlier.get(key_of(image))), self._stems)
            return {image for image, is_done in zip(self._stems, done, strict=True) if is_done}

    def _is_finished(self, image: Path, record: Mapping[str, Any] | None) -> bool:
        if record is None or record.get("unfinished"):
            return False
        outputs = self.outputs(image)
        if not all((self.folder / n).is_file() for n in (outputs.overlay, outputs.map) if n is not None):
            return False
        try:
            if image.stat().st_size != record.get("bytes"):
                return False
            with image.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == record.get("sha256")
        except OSError:
            return False

    def begin(self, image: Path, sha256: str) -> None:
        """Before an image's files are written: the configuration, if it is the first; and that what an earlier line
        says of another picture with this name holds no longer.
        """
        with self._lock:
            if not self._has_configuration:
                with replacing(self.folder / CONFIGURATION) as file:
                    file.write((json.dumps(self._configuration, indent=1, ensure_ascii=False) + "\n").encode())
                self._has_configuration = True
        earlier = self._earlier.get(key_of(image))
        if earlier is not None and earlier.get("sha256") != sha256:
            self.append({"image": str(image), "path": key_of(image), "unfinished": True})

    def append(self, record: Mapping[str, Any]) -> None:
        """A finished image's line; its files must be there."""
        try:
            line = json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a file name that is no UTF-8
            line = json.dumps(record).encode()
        with self._lock:
            self._file.write(line + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Leaves one line for each image: the last; and nothing where nothing was written."""
        self._file.flush()
        last = {_key(record): (number, record) for number, record in enumerate(_records(self.lines))}
        kept = {number for number, record in last.values() if not record.get("unfinished")}
        count = sum(1 for _ in _records(self.lines))
        if count > len(kept):
            with replacing(self.lines) as file, self.lines.open("rb") as lines:
                file.writelines(line for number, line in enumerate(lines) if number in kept)
        self._file.close()
        if not kept:
            self.lines.unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _merge_shards(self) -> None:
        """The lines of earlier shards become lines of this file. InputError if one of them is still at work."""
        for lines in sorted(self.folder.glob(_SHARDS)):
            with lines.open("r+b") as file:
                self._refuse_a_second_run(file)
                _drop_torn_line(lines)
                self._file.write(file.read())
                self._file.flush()
            lines.unlink()

    def _refuse_a_second_run(self, file: BinaryIO) -> None:
        try:
            import fcntl
        except ImportError:  # Windows does not move or remove a file that another process writes
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder}: another run writes there: use --shard, or choose another --out") from None

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
            if not isinstance(earlier, dict):
                raise ValueError("it is no JSON object")
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


def key_of(image: Path) -> str:
    """What an image is known by in every run: its absolute path."""
    return os.path.normpath(image.absolute())


def _key(record: Mapping[str, Any]) -> str:
    return str(record.get("path", record.get("image")))


def _stem(record: Mapping[str, Any]) -> str:
    return str(record.get("overlay") or record.get("map") or "")[: -len(".png")]


class replacing:
    """A file that takes the place of `path` when the block ends; an error leaves `path` as it was."""

    _numbers = itertools.count()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{os.getpid()}-{next(self._numbers)}.part")  # short: names have a limit

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
    """For every image the path of its results without a suffix: no two alike, also where case does not count, and none
    whose files would have a folder's name.

    earlier: absolute path -> the stem that an image has in a folder of earlier results, which it keeps and no other
    image gets.
    """
    stems: dict[Path, str] = {}
    taken = {stem.casefold() for stem in earlier.values()}
    folders = {parent.as_posix().casefold() for name in images.names.values() for parent in name.parents}
    numbers: dict[str, int] = {}
    for image, name in images.names.items():
        own = earlier.get(key_of(image))
        stem = distinct = name.with_suffix("").as_posix()
        while own is None and _is_taken(distinct.casefold(), taken, folders):
            numbers[stem.casefold()] = numbers.get(stem.casefold(), 1) + 1
            distinct = f"{stem}-{numbers[stem.casefold()]}"
        stems[image] = own or distinct
        taken.add(stems[image].casefold())
    return stems


def _is_taken(stem: str, taken: set[str], folders: set[str]) -> bool:
    return stem in taken or f"{stem}.png" in folders or f"{stem}.npy" in folders


def _last_records(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Absolute path -> the last record, of all lines; of images that were never finished, nothing."""
    records: dict[str, dict[str, Any]] = {}
    for lines in dict.fromkeys(reversed(files)):
        for record in _records(lines):
            if record.get("unfinished") and _key(record) in records:
                records[_key(record)] = records[_key(record)] | record
            elif _stem(record):
                records[_key(record)] = record
    return records


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
