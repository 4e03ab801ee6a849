"""Writes a folder completely or not at all, even if the writing process is killed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # a system or file system that cannot exchange


@contextlib.contextmanager
def whole_folder(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """Yields a hidden folder beside `path` to write into. When the block ends without an error, this folder replaces
    whatever is at `path`; without `overwrite`, OSError if something has appeared there.

    The writing process holds a lock on the hidden folder. Hidden folders that killed writers of the same `path` left
    behind are removed first. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with _locked(path.parent, wait=True):  # no other process removes the new folder before it is locked
            _remove_left_over(path)
            work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            stack.callback(_remove, work)
            stack.enter_context(_locked(work))
        yield work
        work.chmod(0o755)
        if overwrite and (path.exists() or path.is_symlink()):
            _exchange(work, path)
        else:
            work.rename(path)


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Yields True if this process holds the folder's lock inside the block; False if another process holds it, if the
    file system has no locks, or if the folder cannot be opened. wait: waits until another process releases it.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        locked = True
    except OSError:
        locked = False
    try:
        yield locked
    finally:
        os.close(handle)


def _remove_left_over(path: Path) -> None:
    ours = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")
    for other in path.parent.iterdir():
        if ours.fullmatch(other.name) and other.is_dir() and not other.is_symlink():
            with _locked(other) as left:
                if left:
                    _remove(other)


def _remove(path: Path) -> None:
    if path.is_symlink():  # what was exchanged for the folder
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _exchange(work: Path, path: Path) -> None:
    """Exchanges two paths: in one step with renameat2, else with three renames. Raises OSError."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(_AT_FDCWD, os.fsencode(work), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE) == 0:
            return
        problem = ctypes.get_errno()
        if problem not in _NOT_HERE:
            raise OSError(problem, os.strerror(problem), str(path))
    aside = Path(f"{work}.replaced")  # a writer killed here leaves the old folder under this name
    path.rename(aside)
    work.rename(path)
    aside.rename(work)
