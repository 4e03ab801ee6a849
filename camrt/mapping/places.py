"""Files on the local disk or in an object store, by pyarrow's file systems."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .. import install
from ..runtime.errors import CamrtError, InputError, first_line

RUN = "_run.json"  # in every folder that camrt map wrote
UNFINISHED = ".unfinished"


def pyarrow_fs() -> Any:
    """The module pyarrow.fs. CamrtError without the map extra."""
    try:
        import pyarrow.fs

        return pyarrow.fs
    except ImportError as error:
        raise CamrtError(install.repair("map", "pyarrow", "map", error)) from None


@dataclass(frozen=True)
class Place:
    """A file or folder. filesystem: pyarrow's, of an object store; None on the local disk. label: for rows and
    messages: without the keys and options that an address may have.
    """

    filesystem: Any
    path: str
    label: str

    @classmethod
    def local(cls, path: Path) -> Place:
        return cls(None, str(path), os.fsencode(path).decode("utf-8", "backslashreplace"))

    @classmethod
    def of(cls, text: str) -> Place:
        """A local path or file:// address, or s3://, gs://, abfs://BUCKET/PATH with options as pyarrow takes them.
        InputError. One file has one place, however it is spelled.
        """
        if not text:
            raise InputError("an empty path: name a file or folder, . for this one")
        local = _local_path(text)
        if local is not None:
            path = Path(local).expanduser()
            return cls.local(path.resolve() if path.is_dir() else path.parent.resolve() / path.name)
        parts = urlsplit(text)
        label = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        try:
            filesystem, path = pyarrow_fs().FileSystem.from_uri(text)
        except (ValueError, OSError, NotImplementedError) as error:
            raise InputError(f"{label}: not an address that pyarrow opens ({_without(error, parts.netloc)})") from None
        return cls(filesystem, path, label)

    @property
    def is_local(self) -> bool:
        return self.filesystem is None

    def child(self, name: str) -> Place:
        return Place(self.filesystem, f"{self.path.rstrip('/')}/{name}", f"{self.label.rstrip('/')}/{name}")

    def is_within(self, folder: Place) -> bool:
        return f"{self.label.rstrip('/')}/".startswith(f"{folder.label.rstrip('/')}/")

    def make_folder(self) -> None:
        if self.is_local:
            Path(self.path).mkdir(parents=True, exist_ok=True)
        else:
            self.filesystem.create_dir(self.path, recursive=True)

    def names(self) -> list[str]:
        """Of the files in this folder; none if it does not exist."""
        if self.is_local:
            folder = Path(self.path)
            return [f.name for f in folder.iterdir() if f.is_file()] if folder.is_dir() else []
        selector = pyarrow_fs().FileSelector(self.path, allow_not_found=True)
        return [i.base_name for i in self.filesystem.get_file_info(selector) if i.is_file]

    def open(self, seeks: bool = False) -> Any:
        """The file's bytes, to be read from the start, or with `seeks` in any order."""
        if self.is_local:
            return Path(self.path).open("rb")
        opened = self.filesystem.open_input_file if seeks else self.filesystem.open_input_stream
        return opened(self.path) if seeks else opened(self.path, compression=None)

    def read(self) -> bytes:
        with self.open() as stream:
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

    @contextlib.contextmanager
    def for_one_run(self) -> Iterator[None]:
        """Holds this folder, if it is local, and removes what a run that was killed left. InputError if another run
        holds it.
        """
        if not self.is_local:
            yield
            return
        import fcntl

        self.make_folder()
        with (Path(self.path) / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{self.label}: another run writes there: wait for it, or stop it") from None
            for file in Path(self.path).glob(f".*{UNFINISHED}"):
                file.unlink(missing_ok=True)
            yield


def _local_path(text: str) -> str | None:
    """Of a path or a file:// address; None for another address."""
    if "://" not in text:
        return text
    scheme, _, rest = text.partition("://")
    host, slash, path = rest.partition("/")
    if scheme.lower() != "file" or host not in ("", "localhost"):
        return None
    return unquote(slash + path)


def find(source: str) -> list[tuple[Place, int]]:
    """The files of a file, a folder with its subfolders, or a pattern, with their sizes in bytes, sorted by path.

    Hidden files are left out, and so is what begins with _ as a mark of other tools. InputError if there are none.
    """
    base, pattern = _divided(source)
    place = Place.of(base)
    try:
        found = _inside_local(place) if place.is_local else _inside(place)
    except OSError as error:
        raise InputError(f"{place.label}: cannot be listed ({error.strerror or first_line(error)})") from None
    chosen = [
        (one, size)
        for one, size, inside in found
        if not (inside and any(part[:1] in "._" for part in inside.split("/")))
        and (pattern is None or _matches(inside, pattern))
    ]
    if not chosen:
        raise InputError(f"{place.label}{'' if pattern is None else f'/{pattern}'}: no files there")
    return sorted(chosen, key=lambda f: f[0].path)


def _inside_local(place: Place) -> Iterator[tuple[Place, int, str]]:
    """(file, bytes, path below `place`): each folder once, whatever links there are; a link to nothing has 0 bytes."""
    top = Path(place.path)
    if top.is_file():
        yield place, top.stat().st_size, ""
        return
    if not top.is_dir():
        raise InputError(f"{place.label}: no such file or folder")
    visited = set()
    for folder, folders, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited or RUN in files:  # results of an earlier run
            folders.clear()
            continue
        visited.add(real)
        for name in files:
            path = Path(folder) / name
            try:
                status = path.stat()
                regular = stat.S_ISREG(status.st_mode)
            except OSError:
                status, regular = None, path.is_symlink()
            if regular:
                yield Place.local(path), status.st_size if status else 0, str(path.relative_to(top))


def _inside(place: Place) -> Iterator[tuple[Place, int, str]]:
    fs = pyarrow_fs()
    info = place.filesystem.get_file_info(place.path)
    if info.type == fs.FileType.NotFound:
        raise InputError(f"{place.label}: no such file or folder")
    infos = [info] if info.is_file else place.filesystem.get_file_info(fs.FileSelector(place.path, recursive=True))
    for one in infos:
        inside = one.path[len(place.path.rstrip("/")) :].strip("/")
        if one.is_file:
            label = f"{place.label.rstrip('/')}/{inside}" if inside else place.label
            yield Place(place.filesystem, one.path, label), one.size or 0, inside


def would_find(source: str, file: Place) -> bool:
    """Whether the source names this file, if it is there."""
    base, pattern = _divided(source)
    folder = Place.of(base)
    if not file.is_within(folder):
        return False
    inside = file.label[len(folder.label.rstrip("/")) :].strip("/")
    return pattern is None or _matches(inside, pattern)


def _divided(source: str) -> tuple[str, str | None]:
    """(the folder, the pattern below it) of a source with * or [, or locally ?; else (source, None). A file that is
    there is no pattern. In an address, what follows ? are its options, which the folder keeps.
    """
    remote = _local_path(source) is None
    plain, question, options = source.partition("?") if remote else (source, "", "")
    first = min((i for i in map(plain.find, "*[" if remote else "*[?") if i >= 0), default=-1)
    if first < 0 or (not remote and Path(_local_path(source) or "").expanduser().exists()):
        return source, None
    cut = plain.rfind("/", 0, first)
    folder = plain[:cut] if cut > 0 else ("/" if cut == 0 else ".")
    return folder + question + options, plain[cut + 1 :]


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
