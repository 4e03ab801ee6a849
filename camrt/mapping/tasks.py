"""Divides the images of a source into tasks, and reads those of a task."""

from __future__ import annotations

import functools
import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..image_files import suffixes
from ..runtime.errors import InputError, first_line
from .places import Place, find

LARGEST = 256_000_000  # bytes of one picture's file
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_COLUMNS = ("image", "bytes", "content", "jpg", "png", "data")  # that hold pictures, in this order
_READ_ROWS = 64

Fetch = Callable[[], "bytes | Exception"]  # gives a picture's file, or why there is none


@dataclass(frozen=True)
class Task:
    """A part of the source, whose rows become one file. number: of that file. images: how many, 0 if not known before.

    kind: "files", pictures; "parquet", row groups of a table; or "tar", a shard. places: of the files, with sizes.
    """

    number: int
    kind: str
    places: tuple[tuple[Place, int], ...]
    images: int = 0
    groups: tuple[int, ...] = ()
    first_row: int = 0

    def identity(self) -> str:
        """What a resumed run must find unchanged."""
        told = [(place.label, size) for place, size in self.places]
        return repr((self.number, self.kind, told, self.groups))


def plan(sources: Sequence[str], part: int) -> list[Task]:
    """Tasks of `part` images each; a shard is one task. The same source gives the same tasks. InputError."""
    if part < 1:
        raise InputError(f"part {part}: use 1 or more images")
    pictures: list[tuple[Place, int]] = []
    tasks: list[Task] = []
    seen: set[str] = set()
    for source in sources:
        for place, size in find(source):
            if place.label in seen:
                continue
            seen.add(place.label)
            name = place.path.lower()
            if name.endswith(".parquet"):
                tasks += _of_table(place, size, part)
            elif name.endswith(_TARS):
                tasks.append(Task(0, "tar", ((place, size),)))
            elif "." in name.rpartition("/")[2] and f".{name.rpartition('.')[2]}" in suffixes():
                pictures.append((place, size))
    for start in range(0, len(pictures), part):
        chosen = tuple(pictures[start : start + part])
        tasks.append(Task(0, "files", chosen, len(chosen)))
    if not tasks:
        named = ", ".join(source.partition("?")[0] for source in sources)
        raise InputError(f"{named}: no pictures, .parquet or .tar files there")
    return [replace(task, number=number) for number, task in enumerate(tasks)]


def fingerprint(tasks: Sequence[Task]) -> str:
    """SHA-256 of what the tasks read: names and sizes of files."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(task.identity().encode())
    return digest.hexdigest()


def _of_table(place: Place, size: int, part: int) -> list[Task]:
    """Whole row groups, `part` rows or more in a task. A table that cannot be read is a task, which will say so."""
    try:
        metadata = _table(place).metadata
    except InputError:
        return [Task(0, "parquet", ((place, size),), 1)]
    tasks, chosen, rows, first = [], [], 0, 0
    for group in range(metadata.num_row_groups):
        chosen.append(group)
        rows += metadata.row_group(group).num_rows
        if rows >= part or group == metadata.num_row_groups - 1:
            tasks.append(Task(0, "parquet", ((place, size),), rows, tuple(chosen), first))
            chosen, first, rows = [], first + rows, 0
    return tasks


def _table(place: Place) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(place.open(seeks=True))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"not a Parquet file that can be read ({first_line(error)})") from None


def read(task: Task) -> Iterator[tuple[str, Fetch]]:
    """The images of a task: the path in its row, and what gives its file; of pictures, the reading itself."""
    if task.kind == "files":
        for place, size in task.places:
            yield place.label, functools.partial(_file, place, size)
        return
    place, begun = task.places[0][0], False
    try:
        for path, picture in _rows(task, place) if task.kind == "parquet" else _members(place):
            yield path, functools.partial(_same, picture)
            begun = True
    except Exception as error:
        what = "the rest of the file" if begun else "the file"
        yield place.label, functools.partial(_same, InputError(f"{what} cannot be read ({first_line(error)})"))


def _same(picture: bytes | Exception) -> bytes | Exception:
    return picture


def _file(place: Place, size: int) -> bytes | Exception:
    if size > LARGEST:
        return InputError(f"a file of {size} bytes, at most {LARGEST} are read")
    try:
        return place.read()
    except FileNotFoundError:
        return InputError("no such file")
    except Exception as error:
        return InputError(f"cannot be read ({first_line(error)})")


def _rows(task: Task, place: Place) -> Iterator[tuple[str, bytes | Exception]]:
    """The first column of _COLUMNS that is there, else the only one of bytes; of a structure, as Hugging Face has
    them, its `bytes`.
    """
    table = _table(place)
    fields = {f.name: f.type for f in table.schema_arrow}
    named = next((n for n in _COLUMNS if n in fields), None)
    fitting = [n for n, kind in fields.items() if _holds_pictures(kind)]
    if named is None and len(fitting) == 1:
        named = fitting[0]
    if named is None or named not in fitting:
        told = ", ".join(f"{n} ({kind})" for n, kind in list(fields.items())[:8])
        raise InputError(f"no column that is certain to hold pictures; it has {told}")
    row = task.first_row
    for batch in table.iter_batches(_READ_ROWS, row_groups=list(task.groups), columns=[named]):
        for value in batch.column(0).to_pylist():
            name = ""
            if isinstance(value, dict):
                name, value = value.get("path") or "", value.get("bytes")
            where = f"{place.label}#{row}" + (f":{name}" if name else "")
            yield where, value if isinstance(value, bytes) and value else InputError("no picture in this row")
            row += 1


def _holds_pictures(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_pictures(kind.value_type)
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return any(
        f(kind) for f in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    )


def _members(place: Place) -> Iterator[tuple[str, bytes | Exception]]:
    """The pictures of a tar file, in their order. Nothing is unpacked to disk: a member's name is only told."""
    seen: Counter[str] = Counter()
    with place.open() as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            name = member.name.encode("utf-8", "backslashreplace").decode()
            hidden = any(part[:1] in ("_", ".") and part not in (".", "..") for part in name.split("/"))
            if not member.isfile() or hidden or f".{name.rpartition('.')[2].lower()}" not in suffixes():
                continue
            seen[name] += 1
            where = f"{place.label}/{name}" + (f"#{seen[name]}" if seen[name] > 1 else "")
            if member.size > LARGEST:
                yield where, InputError(f"a file of {member.size} bytes, at most {LARGEST} are read")
                continue
            file = tar.extractfile(member)
            assert file is not None
            yield where, file.read()
