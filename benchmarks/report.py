"""Writes docs/benchmarks.md and docs/reliability.md from the JSON files beside them, which peers.py and reliability.py write.

python benchmarks/report.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(found: dict[str, Any]) -> str:
    said = [f"{found['machine']['cpu']}, {found['threads']} threads", f"Python {found['machine']['python']}"]
    return ", ".join([*said, *(f"{name} {version}" for name, version in found["versions"].items())])


def benchmarks(found: dict[str, Any]) -> str:
    """docs/benchmarks.md."""
    text = """# camrt beside the public implementations

Made by `make peers`, which installs the other implementations into an environment of their own, runs `benchmarks/peers.py` and
writes this page from `docs/benchmarks.json`.

The same network, images and machine, in one run. Before anything is timed, every implementation's map is compared with camrt's,
both scaled by min-max; where the definition is the same they must agree within 1e-3 on every image, and the table says how
near they are. Winsor-CAM reads the gradients of all convolutions, and in a deep network with random weights some rectifier's
input is always within rounding of zero: there the limit is twice the distance of PyTorch's own float32 maps, of images that
differ in their last bits, from its float64 map, if that is more, and the table has that distance as well. Then the contenders take turns on the same image, one image a call, from the preprocessed array to the map in the image's size.
Times are medians over the turns, in milliseconds, with quartiles; the last column is the median of each turn's ratio, more than
1 where camrt is faster. Everything is float32.

Each implementation is used as its documentation shows it. OpenVINO XAI adds its branch to the same ONNX file that camrt's bundle is
made from, asked for float32 and for low latency; its branch computes the maps of all classes at once. ScoreCAM++ stands in
Score-CAM's table because no other package has it. `resnet50` and `resnet18` are torchvision's with random weights and
warmed-up batch norm, which changes no arithmetic; `mobilenet` is a MobileNet v1 of width 0.25 with its ImageNet weights, on
photographs. Layers: all convolutions for Winsor-CAM, the last block for the rest.

"""
    text += f"{machine(found)}.\n"
    for result in found["results"]:
        text += f"\n## {result['model']}, `{result['method']}`\n\n"
        text += f"{result['images']} images, {result['turns']} turns.\n\n"
        text += table(
            ["implementation", "ms", "quartiles", "largest difference from camrt", "its time / camrt's"],
            [_row(row) for row in result["rows"]],
        )
        for row in result["rows"]:
            if row["library"] != "camrt" and "differs" in row:
                text += f"\n{row['library']}'s {row['name']} is another definition: it {row['differs']}.\n"
    if found["left_out"]:
        text += "\n## Left out\n\n" + "".join(f"- {reason}\n" for reason in found["left_out"])
    return text


def _row(row: dict[str, Any]) -> list[str]:
    times = ["", "", row.get("problem", "")]
    if "median_ms" in row:
        low, high = row["quartiles_ms"]
        times = [f"{row['median_ms']:.1f}", f"{low:.1f} to {high:.1f}", f"{row['times_camrt']:.2f}"]
    distance = f"{row['distance']:.0e}" if "distance" in row else ""
    if row.get("spread", 0) > 1e-3 / 2:
        distance += f" (PyTorch from itself: {row['spread']:.0e})"
    return [f"{row['library']} `{row['name']}`", *times[:2], distance, times[2]]


PAGES: dict[str, Callable[[dict[str, Any]], str]] = {"benchmarks": benchmarks}


def pages() -> dict[Path, str]:
    """What each page must say, by its file."""
    return {
        DOCS / f"{name}.md": write(json.loads((DOCS / f"{name}.json").read_text())) for name, write in PAGES.items()
    }


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text)
