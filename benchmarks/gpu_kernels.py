"""Checks and times the CUDA kernels on a GPU, for gpu.py.

Every row of tests/kernel_table.py is compared with the NumPy specification. Each kernel is timed as a CUDA graph of ten
launches, and a device-to-device copy of the same number of bytes is timed in the same run. A kernel's bytes are those
that it must read and write once; a copy's bytes are those that it reads and those that it writes.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kernel_table import RESNET50, TABLE, Row, everything

from camrt import kernels
from camrt.kernels.gpu import device as gpu

LAUNCHES = 10  # per graph: they share the cost of starting the graph
SIDE = 224


@dataclass
class Case:
    """make: returns a function that queues the kernel once, on new arrays; moved: bytes that it must read and write;
    aim: the speed that the project wants.
    """

    name: str
    make: Callable[[], Callable[[], Any]]
    moved: int
    aim: str


def check(stream: gpu.Stream, rows: Sequence[Row] = TABLE) -> list[str]:
    """Names of the rows that differ, with the first line of their message."""
    wrong = []
    for row in rows:
        try:
            row.check(stream)
        except AssertionError as error:
            wrong.append(f"{row}: {(str(error).strip() or 'an assertion').splitlines()[0]}")
            print("differs:", wrong[-1], flush=True)
    for a, b in zip(everything(stream), everything(stream), strict=True):
        if not np.array_equal(a, b):
            wrong.append("two runs give different bits")
    return wrong


def seconds(stream: gpu.Stream, make: Callable[[], Callable[[], Any]], repeats: int) -> np.ndarray:
    """Seconds of one launch, `repeats` times. Events measure a graph of LAUNCHES launches, each on its own arrays, so
    that caches do not help.
    """
    runs = [make() for _ in range(LAUNCHES)]
    runs[0]()
    with stream.capture() as graph:
        for run in runs:
            run()
    for _ in range(3):
        graph.launch()
    times = []
    for _ in range(repeats):
        before = stream.event()
        graph.launch()
        after = stream.event()
        stream.synchronize()
        times.append(before.time_till(after) / 1e3 / LAUNCHES)
    return np.array(times)


def cases(stream: gpu.Stream) -> list[Case]:
    @functools.cache
    def numbers(*shape: int) -> np.ndarray:
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    def normal(*shape: int) -> kernels.DeviceArray:
        return stream.upload(numbers(*shape))

    def mask(count: int, side: int, kind: str, dtype: Any) -> Callable[[], Any]:
        image, activations = normal(3, SIDE, SIDE), normal(count, side, side)
        out = stream.empty((count, 3, SIDE, SIDE), dtype)
        return lambda: kernels.mask_batch(image, activations, kind, out=out, stream=stream)

    def add(count: int, side: int, kind: str) -> Callable[[], Any]:
        total, scores, activations = normal(1, SIDE, SIDE), normal(1, count), normal(count, side, side)
        return lambda: kernels.accumulate_maps(total, scores, activations, kind, stream=stream)

    def clamp(rows: int, length: int) -> Callable[[], Any]:
        values = normal(rows, length)
        return lambda: kernels.winsorize(values, 90, stream=stream)

    def fuse(images: int) -> Callable[[], Any]:
        maps, weights = normal(images, sum(h * w for h, w in RESNET50)), normal(images, len(RESNET50))
        return lambda: kernels.fuse_layers(maps, RESNET50, weights, (SIDE, SIDE), normalize=True, stream=stream)

    plane, found = SIDE * SIDE, []
    for dtype in (np.float32, np.float16):
        for count, side in ((256, 7), (64, 56)):
            moved = 3 * plane * (count * np.dtype(dtype).itemsize + 4) + 4 * count * side * side
            for kind in ("tanh", "minmax"):
                name = f"mask_batch {count} x {side}x{side} {kind} {np.dtype(dtype).name}"
                make = functools.partial(mask, count, side, kind, dtype)
                found.append(Case(name, make, moved, "85 % of the copy" if kind == "tanh" else ""))
    for count, side, kind in ((512, 7, "tanh"), (512, SIDE, "identity"), (512, SIDE, "tanh")):
        moved = 4 * (count * side * side + count + 2 * plane)
        aim = "85 % of the copy" if side == SIDE else ""
        name = f"accumulate_maps {count} x {side}x{side} {kind}"
        found.append(Case(name, functools.partial(add, count, side, kind), moved, aim))
    for rows, length in ((64, plane), (64, 53), (1, 2**24)):
        aim = "3 times one read" if (rows, length) == (64, plane) else ""
        made = functools.partial(clamp, rows, length)
        found.append(Case(f"winsorize {rows} x {length}", made, 8 * rows * length, aim))
    for images in (1, 16):
        moved = 4 * images * (sum(h * w for h, w in RESNET50) + plane)
        aim = "20 microseconds" if images == 1 else ""
        found.append(Case(f"fuse_layers ResNet-50, {images}", functools.partial(fuse, images), moved, aim))
    return found


def copy_seconds(stream: gpu.Stream, size: int, repeats: int) -> float:
    """Median time of a device-to-device copy that moves `size` bytes: half of them read, half written."""

    def make() -> Callable[[], Any]:
        source, target = (stream.empty((size // 2,), np.uint8) for _ in range(2))
        return lambda: stream.copy(source, target)

    return float(np.median(seconds(stream, make, repeats)))


def measure(stream: gpu.Stream, repeats: int) -> list[dict[str, Any]]:
    measured = []
    for case in cases(stream):
        times = seconds(stream, case.make, repeats)
        copy = copy_seconds(stream, case.moved, repeats)
        low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
        row = {
            **{k: v for k, v in asdict(case).items() if k in ("name", "moved", "aim")},
            "median_us": middle * 1e6,
            "quartiles_us": [low * 1e6, high * 1e6],
            "gb_per_s": case.moved / middle / 1e9,
            "copy_gb_per_s": case.moved / copy / 1e9,
            "of_the_copy": copy / middle,
        }
        if case.name.startswith("winsorize"):
            row["reads"] = middle / (copy / 2)  # `copy` is one read and one write of the rows
        measured.append(row)
        print(
            f"{case.name:46}{middle * 1e6:10.1f} us  {row['gb_per_s']:7.0f} GB/s  {row['of_the_copy']:6.1%} of the "
            f"copy{'  ' + format(row['reads'], '.1f') + ' reads' if 'reads' in row else ''}  {case.aim}",
            flush=True,
        )
    return measured


def sanitize() -> dict[str, str]:
    """compute-sanitizer's tool -> its exit code and the last line of its output, for one run of every kernel."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "no compute-sanitizer on the PATH"}
    code = (
        "from kernel_table import everything\n"
        "from camrt.kernels.gpu.device import device\n"
        "everything(device().stream())"
    )
    found = {}
    for check_name in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = [tool, "--tool", check_name, "--error-exitcode", "9", sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent / "tests")
        found[check_name] = f"exit {done.returncode}: {(done.stdout + done.stderr).strip().splitlines()[-1]}"
        print(f"{check_name}: {found[check_name]}", flush=True)
    return found
