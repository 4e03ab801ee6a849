"""Tries to break camrt: a hundred thousand damaged files, ten thousand explanations by several threads and processes,
kill -9 at random moments.

python benchmarks/reliability.py COMMAND [--seed 0] [--out docs/reliability.json]    each writes its part of the file
    fuzz [--inputs 100000]        damaged manifests and programs of bundles, damaged ONNX models and pictures
    soak [--explanations 10000]   2 processes of 4 threads each; their results and memory
    kill [--rounds 60]            export, build and evaluate, killed and run again
    networks [--examples 2000]    random networks of all operators against float64 autograd
    coverage                      the result of `make coverage`, for all files and without those that need a GPU

fuzz: an input must be refused with a CamrtError, or be explained with finite maps. A finding is: the process dies, runs
for more than 20 seconds or needs more than 6 GiB, or any other exception. `fuzz --only NUMBER` makes and runs one input
again. kill: after each kill the old or the new bundle must load and give the same logits, and no engine may be damaged.
At the end each command runs without a kill, and must leave the same files as a run that was never killed. Exit code 1
if anything was found. Needs the test extra.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NEED_A_GPU = ("kernels/gpu/device.py", "kernels/gpu/driver.py", "kernels/gpu/pool.py", "kernels/gpu/stream.py")

# imports are inside the functions: a child process runs this file again, and must import only what its part needs


def _fuzz(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    from breaking import fuzzing

    return fuzzing.fuzz(given.inputs, given.seed, work)


def _soak(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    from breaking import soaking

    del work
    return soaking.soak(given.explanations)


def _kill(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    from breaking import killing

    return killing.kill(given.rounds, given.seed, work)


def _networks(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Runs tests/test_random_networks.py with that many examples; they are new in every run."""
    del work
    test = ROOT / "tests" / "test_random_networks.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    environment = {**os.environ, "HYPOTHESIS_EXAMPLES": str(given.examples), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    findings = [{"what": line} for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not findings:
        findings = [{"what": (done.stdout + done.stderr)[-500:]}]
    return {"examples": given.examples, "findings": findings}


def _coverage(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """From build/coverage.json: the number of statements, and the percentage that tests run, with and without the files
    that need PyCUDA.
    """
    del given, work
    files = json.loads((ROOT / "build" / "coverage.json").read_text())["files"]
    counted = {name: file["summary"] for name, file in files.items()}

    def percent(names: Iterable[str]) -> float:
        parts = [counted[name] for name in names]
        return round(100 * sum(p["covered_lines"] for p in parts) / sum(p["num_statements"] for p in parts), 1)

    elsewhere = [name for name in counted if name not in NEED_A_GPU]
    return {
        "statements": sum(p["num_statements"] for p in counted.values()),
        "percent": percent(counted),
        "percent_without_gpu": percent(elsewhere),
        "findings": [],
    }


PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "fuzz": _fuzz,
    "soak": _soak,
    "kill": _kill,
    "networks": _networks,
    "coverage": _coverage,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Damages, loads and kills camrt, and counts what breaks.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--only", type=int)
    parser.add_argument("--explanations", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="camrt-reliability-") as work:
        if given.only is not None:
            from breaking import fuzzing

            print(fuzzing.run_one(given.only, given.seed, Path(work)))
            return 0
        started = time.perf_counter()
        found = PARTS[given.part](given, Path(work))
    from common import machine, versions

    found |= {"seed": given.seed, "seconds": round(time.perf_counter() - started)}
    found |= {"machine": machine(), "versions": versions("onnx", "pillow")}
    if given.out is not None:
        parts = json.loads(given.out.read_text()) if given.out.exists() else {}
        given.out.write_text(json.dumps(parts | {given.part: found}, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, indent=1))
    return 1 if found["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
