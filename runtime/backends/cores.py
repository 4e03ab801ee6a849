"""The cores that this process may use."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

_GROUPS, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def allowed() -> list[int]:
    """Numbers of the logical CPUs that the process may run on; empty where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def cores() -> int:
    """How many cores the process may use: those of `allowed`, and no more than its quota of CPU time is worth."""
    count = len(allowed()) or os.cpu_count() or 1
    return min(count, max(1, math.ceil(min(quota(), count))))


def quota(groups: Path = _GROUPS, mount: Path = _MOUNT) -> float:
    """CPUs that the process's control groups grant it, as a container's limit is, e.g. 1.5; infinity without a limit.

    groups, mount: as Linux gives them, version 1 or 2 (Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst).
    """
    granted = math.inf
    with contextlib.suppress(OSError):
        for line in groups.read_text(encoding="utf-8", errors="replace").splitlines():
            _, _, named = line.partition(":")
            controllers, _, path = named.partition(":")
            if controllers and "cpu" not in controllers.split(","):
                continue
            # the folder of version 1 may name its controllers in another order
            for name in (controllers, "cpu", "cpu,cpuacct") if controllers else ("",):
                top = mount / name
                own = top / path.lstrip("/")
                # a container may see its own group at the top and still read the path that it has outside
                inside = (folder for folder in (own, *own.parents) if folder.is_relative_to(top))
                granted = min(granted, *map(_granted, inside))
    return granted


def _granted(folder: Path) -> float:
    """CPUs that one control group grants."""

    def numbers(*names: str) -> list[int]:
        return [int(n) for name in names for n in (folder / name).read_text(encoding="ascii").split()]

    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError, OverflowError):  # no such file; or "max"
            time, period = numbers(*names)
            return time / period if time > 0 and period > 0 else math.inf
    return math.inf
