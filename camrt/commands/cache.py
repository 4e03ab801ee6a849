"""camrt cache."""

from __future__ import annotations

import argparse
import time

HELP = "list or clear the engines that were built"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "clear"))


def run(options: argparse.Namespace) -> int:
    from ..runtime.backends.tensorrt.cache import EngineCache

    engines = EngineCache()
    if options.action == "clear":
        print(f"{engines.clear()} engines removed from {engines.folder}")
        return 0
    entries = engines.entries()
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        print(f"{entry.size / 1e6:8.1f} MB  {used}  {_described(entry.key)}")
    total = sum(e.size for e in entries)
    print(f"{len(entries)} engines, {total / 1e6:.1f} of {engines.limit / 1e6:.0f} MB: {engines.folder}")
    return 0


def _described(key: dict | None) -> str:
    if key is None:
        return "damaged: it will be built again"
    whom = key.get("gpu") or "compute capability " + ".".join(map(str, key.get("compute_capability", [])))
    values = (key.get(field, "?") for field in ("model", "file", "precision", "library"))
    what = (
        "kernels compiled for " + str(key["compiled on"])
        if "compiled on" in key
        else ", ".join(key.get("profiles", []))
    )
    return f"{' '.join(map(str, values))}, {whom}: {what}"
