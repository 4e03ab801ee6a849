"""What `camrt verify`, `camrt check` and `camrt build` print of comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..verification.device.check import DeviceReport
    from ..verification.distances import Row


def print_device_report(report: DeviceReport, every: bool) -> int:
    """Of `check`. Returns the exit code. every: all rows, not the worst of each kind."""
    print(report.engine)
    print_rows(report.rows, every)
    print_count(report.rows, report.seconds)
    return 0 if report.passed else 1


def print_rows(rows: Sequence[Row], every: bool, pytorch: bool = False) -> None:
    """every: all rows, not the worst of each kind. pytorch: with a column of PyTorch float32's own distance."""
    shown = rows if every else _worst(rows)
    columns = [row.program for row in shown], [row.subject for row in shown]
    programs, subjects = (max(len(text) for text in ("compared", *column)) + 2 for column in columns)
    header = f"{'distance':>10}{'PyTorch' if pytorch else '':>{10 * pytorch}}{'limit':>10}"
    print(f"{'':5}{'program':{programs}}{'compared':{subjects}}{header}")
    for row in shown:
        figures = f"{row.distance:10.1e}{f'{row.torch_float32:10.1e}' if pytorch else ''}{row.limit:10.1e}"
        mark = "ok" if row.passed else "FAIL"
        print(f"{mark:5}{row.program:{programs}}{row.subject:{subjects}}{row.problem or figures}")


def print_count(rows: Sequence[Row], seconds: float | None = None) -> None:
    passed = sum(row.passed for row in rows)
    print(f"{passed} of {len(rows)} comparisons passed{'' if seconds is None else f' in {seconds:.1f} s'}")


def _worst(rows: Sequence[Row]) -> list[Row]:
    """The failed rows, and for each program and kind of comparison the passed row that is nearest to its limit."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.program, row.subject.split()[0].rstrip(","))
        if row.passed and (key not in found or _share(row) > _share(found[key])):
            found[key] = row
    return [*(r for r in rows if not r.passed), *found.values()]


def _share(row: Row) -> float:
    """Of its limit."""
    return row.distance / row.limit if row.limit > 0 else 0.0
