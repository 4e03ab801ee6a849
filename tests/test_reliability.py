"""A little of what benchmarks/reliability.py does at length, and the pages that are made of its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import report
from breaking import fuzzing


def test_damaged_files_are_refused_or_explained(tmp_path: Path) -> None:
    place = fuzzing.Place(tmp_path)
    said = [fuzzing.run(number, 1, place) for number in range(300)]
    explained = said.count("explained")
    assert 30 < explained < 200, "damage that is always refused, or never, tests nothing"


def test_a_finding_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(place: fuzzing.Place, _: object) -> None:
        raise IndexError(place.folder)

    monkeypatch.setitem(fuzzing.RUN, "manifest", bug)
    with pytest.raises(IndexError):
        fuzzing.run(0, 1, fuzzing.Place(tmp_path))


def test_the_pages_say_what_was_measured() -> None:
    for file, text in report.pages().items():
        assert file.read_text() == text, f"{file} is old: python benchmarks/report.py"
