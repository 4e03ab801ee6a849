"""Files on the local disk or in an object store, by pyarrow's file systems."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .. import install
from ..runtime.errors import CamrtError, InputError, first_line

UNFINISHED = ".unfinished"
_WILD = "*["  # in an address, ? begins its options


def pyarrow_fs() -> Any:
    """The module pyarrow.fs. CamrtError without the map extra."""
    try:
        import pyarrow.fs

        return pyarrow.fs
    except ImportError as error:
        raise CamrtError(install.repair("map", "pyarrow", "map", error)) from None


@dataclass(frozen=True)
class Place:
    """A file or folder. label: for rows and messages: without the keys and options that an address may have."""

    filesystem: Any
    path: str
    label: str

    @classmethod
    def of(cls, text: str) -> Place:
        """A local path, or s3://, gs://, abfs://BUCKET/PATH, with options as pyarrow takes them. InputError."""
        fs = pyarrow_fs()
        if "://" not in text:
            path = str(Path(text).absolute())
            return cls(fs.LocalFileSystem(), path, path)
        parts = urlsplit(text)
        label = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        try:
            filesystem, path = fs.FileSystem.from_uri(text)
        except (ValueError, OSError, NotImplementedError) as error:
            raise InputError(f"{label}: not an address that pyarrow opens ({_without(error, parts.netloc)})") from None
        return cls(filesystem, path, label)

    @property
    def is_local(self) -> bool:
        return self.filesystem.type_name == "local"

    def child(self, name: str) -> Place:
        return Place(self.filesystem, f"{self.path.rstrip('/')}/{name}", f"{self.label.rstrip('/')}/{name}")

    def exists(self) -> bool:
        return self.filesystem.get_file_info(self.path).type != pyarrow_fs().FileType.NotFound

    def make_folder(self) -> None:
        self.filesystem.create_dir(self.path, recursive=True)

    def names(self) -> list[str]:
        """Of the files in this folder; none if it does not exist."""
        selector = pyarrow_fs().FileSelector(self.path, allow_not_found=True)
        return [i.base_name for i in self.filesystem.get_file_info(selector) if i.is_file]

    def read(self) -> bytes:
        with self.filesystem.open_input_stream(self.path, compression=None) as stream:
            return stream.read()

    @contextlib.contextmanager
    def written(self) -> Iterator[Path]:
        """A local file to fill, which takes this place, whole, when the block ends without an error."""
        name = self.path.rpartition("/")[2]
        if self.is_local:  # hidden until then, and beside it
            beside = Path(self.path).with_name(f".{name}.{uuid.uuid4().hex}{UNFINISHED}")
            try:
                yield beside
                beside.replace(self.path)
            finally:
                beside.unlink(missing_ok=True)
            return
        with tempfile.TemporaryDirectory(prefix="camrt-") as folder:
            file = Path(folder) / name
            yield file
            # an object store shows an object when it is whole
            with file.open("rb") as source, self.filesystem.open_output_stream(self.path, compression=None) as out:
                shutil.copyfileobj(source, out, 1 << 22)

    def write(self, data: bytes) -> None:
        """All or nothing."""
        with self.written() as file:
            file.write_bytes(data)

    def clear_unfinished(self) -> None:
        """Removes what a run that was killed left in this folder."""
        if self.is_local:
            for file in Path(self.path).glob(f".*{UNFINISHED}"):
                file.unlink(missing_ok=True)


def find(source: str) -> list[tuple[Place, int]]:
    """The files of a file, a folder with its subfolders, or a pattern, with their sizes in bytes, sorted by path.

    Hidden files are left out, and so is what begins with _ as a mark of other tools. InputError if there are none.
    """
    fs = pyarrow_fs()
    wild = min((i for i in (source.find(c) for c in _WILD) if i >= 0), default=-1)
    pattern = None
    if wild >= 0 and not ("://" not in source and Path(source).exists()):
        tail = source[wild:].partition("?")[2] if "://" in source else ""
        base = source[: source.rfind("/", 0, wild) + 1] or ("." if "://" not in source else "")
        full = source.removesuffix(f"?{tail}") if tail else source
        place = Place.of(base.rstrip("/") + (f"?{tail}" if tail else "") if base != "/" else "/")
        pattern = f"{place.path.rstrip('/')}/{full[len(base) if base != '.' else 0 :]}"
    else:
        place = Place.of(source)
    try:
        info = place.filesystem.get_file_info(place.path)
        if info.type == fs.FileType.NotFound:
            raise InputError(f"{place.label}: no such file or folder")
        infos = [info] if info.is_file else place.filesystem.get_file_info(fs.FileSelector(place.path, recursive=True))
    except OSError as error:
        raise InputError(f"{place.label}: cannot be listed ({first_line(error)})") from None
    below = len(place.path.rstrip("/"))
    found = []
    for one in infos:
        inside = one.path[below:].strip("/")
        if not one.is_file or (info.type != fs.FileType.File and any(p[:1] in "._" for p in inside.split("/"))):
            continue
        if pattern is None or _matches(one.path, pattern):
            label = f"{place.label.rstrip('/')}/{inside}" if inside else place.label
            found.append((Place(place.filesystem, one.path, label), one.size or 0))
    if not found:
        raise InputError(f"{place.label if pattern is None else source.partition('?')[0]}: no files there")
    return sorted(found, key=lambda f: f[0].path)


def _matches(path: str, pattern: str) -> bool:
    """Each part of a path by fnmatch's rules; ** stands for any number of them."""
    import fnmatch

    def match(parts: list[str], wanted: list[str]) -> bool:
        if not wanted:
            return not parts
        if wanted[0] == "**":
            return any(match(parts[i:], wanted[1:]) for i in range(len(parts) + 1))
        return bool(parts) and fnmatch.fnmatchcase(parts[0], wanted[0]) and match(parts[1:], wanted[1:])

    return match(path.strip("/").split("/"), pattern.strip("/").split("/"))


def _without(error: Exception, netloc: str) -> str:
    """The first line of an error, without an address's keys."""
    said, keys = first_line(error), netloc.rpartition("@")[0]
    return said.replace(keys, "...") if keys else said
