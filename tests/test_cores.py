"""A process that may use some of the machine's cores takes no others: by its affinity, and by a container's limit."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from camrt.demo.run import BUNDLE
from camrt.runtime.backends import cores
from camrt.runtime.backends.cores import quota

CPUS = cores.allowed()
needs_two = pytest.mark.skipif(len(CPUS) < 2, reason="needs two cores that the process may use")
THREADS = """
import os, sys
os.sched_setaffinity(0, [int(cpu) for cpu in sys.argv[2].split(",")])
import numpy as np, camrt
explainer = camrt.load(sys.argv[1], "onnxruntime", threads=int(sys.argv[3]) or None)
explainer.classify(np.zeros((1, *explainer.manifest.input_shape), np.float32))
places = {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}
print(explainer.session.lanes.count, sorted(sorted(place) for place in places))
"""


def threads_of(cpus: list[int], threads: int = 0) -> str:
    """(lanes, on which CPUs the threads of a process may run) after a run in a process that has these CPUs."""
    arguments = [str(BUNDLE), ",".join(map(str, cpus)), str(threads)]
    run = subprocess.run([sys.executable, "-c", THREADS, *arguments], capture_output=True, text=True, check=True)
    return run.stdout.strip()


@needs_two
def test_threads_stay_on_the_cores_that_the_process_has() -> None:
    assert threads_of(CPUS[:1]) == f"1 [[{CPUS[0]}]]"


@needs_two
def test_threads_for_all_cores_have_one_each() -> None:
    first, second = CPUS[:2]
    assert threads_of([first, second], threads=2) == f"2 [[{first}, {second}], [{second}]]"


@pytest.mark.parametrize(
    ("files", "groups", "granted"),
    [
        ({".": {"cpu.max": "150000 100000"}}, "0::/\n", 1.5),
        ({".": {"cpu.max": "max 100000"}}, "0::/\n", math.inf),
        ({"a": {"cpu.max": "400000 100000"}, "a/b": {"cpu.max": "max 100000"}}, "0::/a/b\n", 4),
        ({"a": {"cpu.max": "100000 100000"}, "a/b": {"cpu.max": "400000 100000"}}, "0::/a/b\n", 1),
        ({".": {"cpu.max": "50000 100000"}}, "0::/docker/of/the/host\n", 0.5),
        ({"cpu,cpuacct": {"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"}}, "4:cpu,cpuacct:/\n", 2),
        ({"cpu": {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}}, "4:cpu:/\n", math.inf),
        ({"cpu": {"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}}, "4:cpu:/docker/x\n0::/\n", 3),
        ({"cpu,cpuacct/d": {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "50000"}}, "4:cpuacct,cpu:/d\n", 2),
        ({"cpu/d": {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "50000"}}, "junk\n4:cpu,cpuacct:/d\n", 2),
        ({".": {"cpu.max": f"1{'0' * 400} 100000"}}, "0::/\n", math.inf),
        ({"memory": {"cpu.max": "100000 100000"}}, "4:memory:/\n", math.inf),
        ({".": {"cpu.max": "what"}}, "0::/\n", math.inf),
        ({}, "0::/\n", math.inf),
        ({}, "nonsense\n", math.inf),
        ({}, "", math.inf),
    ],
)
def test_quota(files: dict[str, dict[str, str]], groups: str, granted: float, tmp_path: Path) -> None:
    for folder, texts in files.items():
        place = tmp_path / "mount" / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (place / name).write_text(text + "\n")
    (tmp_path / "cgroup").write_bytes(b"9:\xff:/\n" + groups.encode())
    assert quota(tmp_path / "cgroup", tmp_path / "mount") == granted


def test_no_control_groups(tmp_path: Path) -> None:
    assert quota(tmp_path / "missing", tmp_path) == math.inf


@pytest.mark.parametrize(("granted", "most"), [(0.5, 1), (1.0, 1), (1.2, 2), (64.0, 64), (math.inf, 10**6)])
def test_cores_within_the_quota(granted: float, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "quota", lambda: granted)
    assert cores.cores() == min(len(CPUS) or os.cpu_count() or 1, most)
