"""The cache of engines: files in the user's own folder, each named by what it is and the hash of its key, never half
written.

An engine is native code. One is loaded only from this folder, only if this user alone can write it, and only if its
bytes are those that were written for exactly this program, GPU, library and profile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import EngineError, first_line
from ...user_cache import FOLDER_VARIABLE, cache_folder

LIMIT_VARIABLE = "CAMRT_CACHE_GB"
DEFAULT_GB = 20.0
_MAGIC = b"camrt engine 1\n"
_SUFFIX = ".engine"
_PART = ".part"  # of one that is being written
_HEADER_LIMIT = 1 << 16
_UNFIT = re.compile(r"[^A-Za-z0-9._]+")  # for a file's name


def _limit() -> int:
    """$CAMRT_CACHE_GB in bytes. EngineError if it is no number."""
    text = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_GB))
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < 1e9:
        raise EngineError(f"{LIMIT_VARIABLE}={text}: use a number of gigabytes, from 0")
    return int(gigabytes * 1e9)


@dataclass(frozen=True)
class Entry:
    """A file of the cache. key: see `engine_key`, None if the file is damaged; size: bytes; used: Unix time of the last
    use.
    """

    path: Path
    key: dict[str, Any] | None
    size: int
    used: float


class EngineCache:
    """A folder of engines, `limit` bytes in all; if there are more, those that were used longest ago are removed."""

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = (cache_folder() if folder is None else folder) / "engines"
        self.limit = _limit() if limit is None else limit

    def path(self, key: dict[str, Any]) -> Path:
        """E.g. resnet50-layer_maps.fp16-tensorrt_11.1-sm_8.9-<24 digits of the hash>.engine."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        parts = [key.get("model"), str(key.get("file", "")).removesuffix(".onnx"), key.get("library")]
        if "compute_capability" in key:
            parts.append(f"sm_{'.'.join(map(str, key['compute_capability']))}")
        if "compiled on" in key:
            parts.append("compiled")
        words = [_UNFIT.sub("_", str(part))[:40].strip("._") for part in parts if part]
        return self.folder / f"{'-'.join([*filter(None, words), digest])}{_SUFFIX}"

    def fetch(self, key: dict[str, Any], build: Callable[[], bytes]) -> bytes:
        """The engine of that key; calls `build` and keeps its result if there is none.

        If several processes ask at once, one builds and the others wait. If the cache cannot be written, the engine is
        built but not kept, with a warning. Raises the errors of `build`.
        """
        stored_engine = self.get(key)
        if stored_engine is not None:
            return stored_engine
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._locked(key))
            except OSError as error:
                self._warn(error)
                return build()
            engine = self.get(key)
            if engine is None:
                engine = build()
                try:
                    self._put(key, engine)
                except OSError as error:
                    self._warn(error)
            return engine

    def _warn(self, error: OSError) -> None:
        warnings.warn(
            f"{self.folder}: engines cannot be kept there ({first_line(error)}): set {FOLDER_VARIABLE} to another "
            "folder",
            stacklevel=3,
        )

    def get(self, key: dict[str, Any]) -> bytes | None:
        """The engine of that key, or None. A file that is damaged, or that others can write, is removed."""
        path = self.path(key)
        try:
            with path.open("rb") as file:
                written, digest = _header(file)
                engine = file.read()
                trusted = _own(os.fstat(file.fileno())) and _own(self.folder.stat())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            written, digest, engine, trusted = None, "", b"", False
        if trusted and written == key and hashlib.sha256(engine).hexdigest() == digest:
            with contextlib.suppress(OSError):
                os.utime(path)
            return engine
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def put(self, key: dict[str, Any], data: bytes) -> None:
        """Keeps bytes under a key, unless they are there already. A cache that cannot be written keeps nothing."""
        if self.get(key) == data:
            return
        with contextlib.suppress(OSError), self._locked(key):
            self._put(key, data)

    def discard(self, key: dict[str, Any]) -> None:
        """Removes an engine that its library would not load."""
        with contextlib.suppress(OSError):
            self.path(key).unlink()

    def entries(self) -> list[Entry]:
        """The engines of the cache, the last used first."""
        entries = []
        for path in self.folder.glob(f"*{_SUFFIX}") if self.folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                try:
                    with path.open("rb") as file:
                        key = _header(file)[0]
                except (OSError, ValueError):
                    key = None
                entries.append(Entry(path, key, status.st_size, status.st_mtime))
        return sorted(entries, key=lambda e: -e.used)

    def clear(self) -> int:
        """Removes every engine and returns their number. OSError if a file cannot be removed."""
        entries = self.entries()
        for entry in entries:
            entry.path.unlink(missing_ok=True)
        for suffix in (".lock", _PART):
            for path in self.folder.glob(f"*{suffix}") if self.folder.is_dir() else ():
                path.unlink(missing_ok=True)
        return len(entries)

    def _put(self, key: dict[str, Any], engine: bytes) -> None:
        header = json.dumps({"key": key, "sha256": hashlib.sha256(engine).hexdigest()}).encode()
        prefix = f"{self.path(key).stem}."
        handle, name = tempfile.mkstemp(
            dir=self.folder, prefix=prefix, suffix=_PART
        )  # which this user alone may read or write
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + header + b"\n")
                file.write(engine)
                file.flush()
                os.fsync(file.fileno())
            path = self.path(key)
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
        self._make_room(path)

    def _make_room(self, new_file: Path) -> None:
        """Removes the engines that were used longest ago until the rest fits the limit; never `new_file`."""
        total = 0
        for entry in self.entries():
            total += entry.size
            if total > self.limit and entry.path != new_file:
                with contextlib.suppress(OSError):
                    entry.path.unlink()

    @contextlib.contextmanager
    def _locked(self, key: dict[str, Any]) -> Iterator[None]:
        """Only one process at a time gets past this. The system releases the lock when its process ends."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _own(self.folder.stat()):
            raise PermissionError(f"others than this user can write to {self.folder}")
        path = self.path(key).with_suffix(".lock")
        while True:
            with path.open("w") as file:
                _wait_for_lock(file)
                try:
                    ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
                except FileNotFoundError:
                    ours = False
                if not ours:  # the last holder removed this file, and another process may hold a new one
                    continue
                for part in self.folder.glob(f"{path.stem}.*{_PART}"):  # its writer was killed: we hold the lock
                    part.unlink(missing_ok=True)
                try:
                    yield
                finally:
                    with contextlib.suppress(PermissionError):  # Windows removes no open file
                        path.unlink(missing_ok=True)
                return


def _wait_for_lock(file: Any) -> None:
    """Locks an open file against other processes, waiting for them."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        while True:
            with contextlib.suppress(OSError):  # LK_LOCK gives up after ten seconds: try again
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
                return
    fcntl.flock(file, fcntl.LOCK_EX)


def _header(file: Any) -> tuple[dict[str, Any], str]:
    """Reads the header of an engine's file: (key, sha256 of the engine). ValueError if it has none."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("not an engine of this cache")
    header = json.loads(file.readline(_HEADER_LIMIT))
    try:
        return dict(header["key"]), str(header["sha256"])
    except (KeyError, TypeError) as error:
        raise ValueError("no key") from error


def _own(status: os.stat_result) -> bool:
    """Whether this user alone may write a file or folder. True on Windows, which has no such permission bits."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
