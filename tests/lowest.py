"""Prints constraints that pin the runtime's dependencies to the lowest versions that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNTIME_EXTRAS = ("cpu", "evaluate", "bench")


def lowest() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *(line for extra in RUNTIME_EXTRAS for line in extras[extra])]
    pins = {re.split(r"[<>=]", line)[0]: line.replace(">=", "==") for line in declared}
    others = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return [*pins.values(), *(line for line in others if line.split("==")[0] not in pins)]


if __name__ == "__main__":
    print("\n".join(lowest()))
