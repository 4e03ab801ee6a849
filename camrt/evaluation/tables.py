"""The results of `camrt evaluate` as Markdown, CSV and a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .metric_table import METRICS
from .statistics import Cell

Table = Mapping[str, Mapping[str, Cell]]
_ARROWS = {1: " ↑", -1: " ↓", 0: ""}


def as_markdown(table: Table) -> str:
    """Means with half the width of their intervals, a column for each metric; the best mean is bold. The last row has
    the number of images that each column is of.
    """
    names = _columns(table)
    lines = [f"| method | {' | '.join(METRICS[n].heading + _ARROWS[METRICS[n].better] for n in names)} |"]
    lines.append("| --- |" + " --- |" * len(names))
    best = {name: _best(table, name) for name in names}
    for method, cells in table.items():
        parts = [_shown(n, cells.get(n), best[n]) for n in names]
        lines.append(f"| {method} | {' | '.join(parts)} |")
    counts = [sorted({cells[n].images for cells in table.values() if n in cells}) for n in names]
    lines.append(f"| images | {' | '.join(' to '.join(map(str, dict.fromkeys((c[0], c[-1])))) for c in counts)} |")
    return "\n".join(lines) + "\n"


def _best(table: Table, name: str) -> float:
    """The best mean of a column, times its direction."""
    means = (cells[name].mean for cells in table.values() if name in cells)
    return max((mean * METRICS[name].better for mean in means if math.isfinite(mean)), default=0)


def _columns(table: Table) -> list[str]:
    return [n for n in METRICS if any(n in cells for cells in table.values())]


def _shown(name: str, cell: Cell | None, best: float) -> str:
    if cell is None:
        return ""
    digits, better = METRICS[name].digits, METRICS[name].better
    mean = f"{cell.mean:.{digits}f}"
    half = f"{(cell.high - cell.low) / 2:.{digits}f}"
    return f"{f'**{mean}**' if better and cell.mean * better == best else mean} ± {half}"


def differences_as_markdown(differences: Mapping[tuple[str, str], Mapping[str, Cell]]) -> str:
    """For each pair of methods the mean differences with their intervals; those without 0 are bold."""
    names = _columns({" - ".join(pair): cells for pair, cells in differences.items()})
    lines = [f"| difference | {' | '.join(METRICS[n].heading for n in names)} |", "| --- |" + " --- |" * len(names)]
    for (one, other), cells in differences.items():
        parts = []
        for n in names:
            cell = cells.get(n)
            if cell is None:
                parts.append("")
                continue
            d = METRICS[n].digits
            text = f"{cell.mean:+.{d}f} ({cell.low:+.{d}f} to {cell.high:+.{d}f})"
            apart = round(cell.low, d) > 0 or round(cell.high, d) < 0  # not by rounding alone
            parts.append(f"**{text}**" if apart else text)
        lines.append(f"| {one} - {other} | {' | '.join(parts)} |")
    return "\n".join(lines) + "\n"


def as_csv(table: Table) -> str:
    """A row for each method and metric: method, metric, mean, low, high, images."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "metric", "mean", "low", "high", "images"])
    for method, cells in table.items():
        for name, cell in cells.items():
            writer.writerow([method, name, repr(cell.mean), repr(cell.low), repr(cell.high), cell.images])
    return out.getvalue()


def draw(table: Table, path: Path) -> None:
    """A picture with a panel for each metric: each method's mean and interval. Needs matplotlib."""
    from matplotlib.figure import Figure

    names = _columns(table)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    height = 0.9 + 0.32 * len(table)
    figure = Figure(figsize=(3.6 * columns, rows * height + 0.4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, sharey=True, squeeze=False)).ravel()
    for panel, name in zip(panels, names, strict=False):
        for place, cells in enumerate(table.values()):
            if name in cells:
                cell = cells[name]
                panel.errorbar(
                    cell.mean, place, xerr=[[cell.mean - cell.low], [cell.high - cell.mean]], fmt="o", capsize=3
                )
        panel.set_yticks(range(len(table)), list(table), fontsize=8)
        panel.set_title(METRICS[name].heading + _ARROWS[METRICS[name].better], fontsize=9)
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(axis="x", alpha=0.3)
        panel.set_ylim(len(table) - 0.5, -0.5)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=130)
