"""A folder that is there whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from camrt.export.folder import whole_folder

WRITER = (
    "import sys, time, pathlib\nfrom camrt.export.folder import whole_folder\n"
    "with whole_folder(pathlib.Path(sys.argv[1])) as folder:\n"
    "    (folder / 'half').write_text('x'); print('writing', flush=True); time.sleep(60)"
)


def write(path: Path, text: str) -> None:
    with whole_folder(path) as folder:
        (folder / "file").write_text(text)


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_folder_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.camrt"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
    assert len(list(tmp_path.iterdir())) == 2
    writers[0].kill()
    assert writers[0].wait() == -signal.SIGKILL
    (tmp_path / ".a.camrt.notours").mkdir()  # seven letters
    (tmp_path / ".b.camrt.abcd1234").mkdir()
    write(path, "new")
    left = {p.name for p in tmp_path.iterdir()}
    assert len(left) == 4 and {"a.camrt", ".a.camrt.notours", ".b.camrt.abcd1234"} < left
    writers[1].kill()
    writers[1].wait()
    write(path, "newer")
    assert {p.name for p in tmp_path.iterdir()} == {"a.camrt", ".a.camrt.notours", ".b.camrt.abcd1234"}
    assert (path / "file").read_text() == "newer" and not (path / "half").exists()


def test_what_appeared_meanwhile_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(OSError), whole_folder(path, overwrite=False) as folder:
        (folder / "file").write_text("second")
        write(path, "first")
    assert (path / "file").read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_replaced_is_never_missing(tmp_path: Path) -> None:
    path, missing, over = tmp_path / "a", [], threading.Event()
    write(path, "0")

    def look() -> None:
        while not over.is_set():
            try:
                path.stat()
            except FileNotFoundError:
                missing.append(True)

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(200):
        write(path, str(number))
    over.set()
    reader.join()
    assert not missing and (path / "file").read_text() == "199"


def test_where_folders_cannot_be_exchanged_one_is_moved_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", "old")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    write(tmp_path / "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "file").read_text() == "new"


def test_a_link_is_replaced_and_what_it_named_is_not(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    (tmp_path / "latest").symlink_to("a")
    write(tmp_path / "latest", "new")
    assert (tmp_path / "a" / "file").read_text() == "old" and (tmp_path / "latest" / "file").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "latest"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "file").read_text() == "old"


def test_a_place_that_cannot_be_exchanged_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", "old")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=lambda *_: -1))
    monkeypatch.setattr(ctypes, "get_errno", lambda: errno.EXDEV)
    with pytest.raises(OSError, match="Invalid cross-device link"):
        write(tmp_path / "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "file").read_text() == "old"
