"""Checks camrt on this machine's GPU, then times it: python benchmarks/gpu.py FOLDER [--smoke] [--out gpu.json]

On any machine with the test extra, `python benchmarks/networks.py FOLDER` prepares the folder: bundles, images and the
CPU's maps. On the GPU's machine, with camrt's cuda or tensorrt extra and compiled kernels (python -m
camrt.kernels.build), this command runs one stage after another, each in a process of its own, so that a failure costs
one stage. After every stage it writes the JSON file; started again, it goes on with what has not succeeded yet
(--again: with everything). Whatever is checked is checked before anything is timed. --smoke says only whether it is
right or wrong. --stages runs some of them alone; --peer is a checkout of Winsor-CAM's public repository. It ends with a
table of what the GPU confirmed, as Markdown too (--page FILE), and an exit code: 0 if nothing was wrong.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]


class Wrong(Exception):
    """A stage found something wrong; it says what."""


class Nothing(Exception):
    """A stage had nothing to do on this machine; it says why."""


@dataclass(frozen=True)
class Asked:
    """The arguments of the command that stages read."""

    folder: Path
    smoke: bool
    repeats: int
    peer: Path | None


class Stage(NamedTuple):
    """shows: what is true if it succeeds. seconds: the most that it may take. quick: part of --smoke."""

    shows: str
    seconds: int
    run: Callable[[Asked], Any]
    quick: bool = False


def _stream() -> Any:
    from camrt.kernels.gpu.device import device

    if "STANDIN" in os.environ:  # the tests' stand-in for the driver
        import standin

        standin.install()
    return device().stream()


def _card(_: Asked) -> Any:
    from camrt.kernels.gpu import device as gpu

    stream = _stream()
    card = stream.device
    versions = {}
    for package in ("numpy", "pycuda", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13-bindings", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "gpu": card.model,
        "compute_capability": card.compute_capability,
        "kernels": json.loads((gpu.BINARIES / "build.json").read_text()),
        "platform": platform.platform(),
        "versions": versions,
    }


def _kernels(asked: Asked) -> Any:
    import gpu_kernels

    rows = gpu_kernels.TABLE[::8] if asked.smoke else gpu_kernels.TABLE
    wrong = gpu_kernels.check(_stream(), rows)
    if wrong:
        raise Wrong(f"{len(wrong)} of {len(rows)} differ: {'; '.join(wrong[:5])}")
    return {"rows": len(rows)}


def _sanitizer(_: Asked) -> Any:
    import gpu_kernels

    found = gpu_kernels.sanitize()
    if "skipped" in found:
        raise Nothing(found["skipped"])
    if any(not said.startswith("exit 0") for said in found.values()):
        raise Wrong(str(found))
    return found


def _tests(_: Asked) -> Any:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]])[-1]
    if "No module named" in done.stderr:
        raise Nothing(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise Wrong(done.stdout[-3000:])
    return {"pytest": last}


def _explanations(asked: Asked) -> Any:
    import networks

    return _compared(networks.check(asked.folder, quick=asked.smoke))


def _full(asked: Asked) -> Any:
    import networks

    return _compared(networks.check_in_little_memory(asked.folder))


def _compared(rows: list[dict[str, Any]]) -> Any:
    if not any("distances" in row for row in rows):
        raise Nothing("; ".join(sorted({row["problem"] for row in rows})) or "no bundle in the folder")
    wrong = [row for row in rows if row.get("wrong")]
    if wrong:
        raise Wrong(json.dumps(wrong)[:3000])
    return rows


def _kernel_times(asked: Asked) -> Any:
    import gpu_kernels

    return gpu_kernels.measure(_stream(), asked.repeats)


def _call_times(asked: Asked) -> Any:
    import networks

    return networks.measure(asked.folder, 10 * asked.repeats, asked.peer)


STAGES = {
    "card": Stage("the kernels load", 60, _card, True),
    "kernels": Stage("the kernels give what NumPy gives, and the same bits twice", 180, _kernels, True),
    "explanations": Stage(
        "every method, on every backend and in both precisions, gives the CPU's maps, the third time too (replayed)",
        240,
        _explanations,
        True,
    ),
    "sanitizer": Stage("compute-sanitizer finds nothing in the kernels", 120, _sanitizer),
    "tests": Stage("streams, memory, graphs, threads and other libraries' arrays: tests/test_gpu.py", 180, _tests),
    "little memory": Stage("a GPU that is nearly full gives the same maps, or says that it is full", 90, _full),
    "kernel times": Stage("", 120, _kernel_times),
    "call times": Stage("", 300, _call_times),
}


def _in_child(name: str, asked: Asked) -> None:
    """Runs a stage in this process and prints its result as the last line."""
    try:
        result = {"ok": True, "result": STAGES[name].run(asked)}
    except Nothing as reason:
        result = {"ok": None, "problem": str(reason)}
    except Wrong as problem:
        result = {"ok": False, "problem": str(problem)}
    except Exception as error:
        result = {"ok": False, "problem": f"{type(error).__name__}: {error}"[:3000]}
    print("\n" + json.dumps(result), flush=True)


def _run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--in-child", name]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        try:
            done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=STAGES[name].seconds)
            said = f"it ended with code {done.returncode}"
        except subprocess.TimeoutExpired:
            said = f"not done in {STAGES[name].seconds} s"
        out.seek(0)
        lines = out.read().strip().splitlines() or [""]
    try:
        result = json.loads(lines[-1])
    except ValueError:
        result = {"ok": False, "problem": f"{said}: {' '.join(lines[-3:])[-1000:]}"}
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def section(report: dict[str, Any]) -> str:
    """What the GPU confirmed, as Markdown."""
    card = report["stages"].get("card", {}).get("result", {})
    versions = ", ".join(f"{name} {version}" for name, version in card.get("versions", {}).items())
    text = f"{card.get('gpu', 'No GPU')}, compute capability {card.get('compute_capability', '?')}; {versions}.\n\n"
    text += "| what | confirmed | seconds |\n| --- | --- | --- |\n"
    for name, stage in STAGES.items():
        found = report["stages"].get(name)
        if stage.shows:
            text += f"| {stage.shows} | {_verdict(found)} | {found['seconds'] if found else ''} |\n"
    return text


def _verdict(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    if found["ok"]:
        return "yes"
    reason = str(found["problem"]).replace("|", "/").replace("\n", " ")[:200]
    return f"{'not run' if found['ok'] is None else 'NO'}: {reason}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--check-only", action="store_true", help="time nothing")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--page", type=Path, help="write the table of what was confirmed to this file")
    parser.add_argument("--in-child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_child:
        _in_child(arguments.in_child, Asked(arguments.folder, arguments.smoke, arguments.repeats, arguments.peer))
        return 0
    report: dict[str, Any] = {"stages": {}}
    if arguments.out.exists() and not arguments.again:
        report = json.loads(arguments.out.read_text())
    wanted = arguments.stages or [
        name
        for name, stage in STAGES.items()
        if (stage.quick or not arguments.smoke) and (stage.shows or not arguments.check_only)
    ]
    for name in wanted:
        stage, before = STAGES[name], report["stages"].get(name, {})
        if before.get("ok") and (before.get("smoke", False) <= arguments.smoke):
            print(f"{name}: done before", flush=True)
            continue
        if not stage.shows and any(s.get("ok") is False for s in report["stages"].values()):
            print(f"{name}: not timed, because something is wrong", flush=True)
            continue
        found = _run(name, arguments) | {"smoke": arguments.smoke}
        report["stages"][name] = found
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name}: {_verdict(found)} ({found['seconds']} s)", flush=True)
    if arguments.page is not None:
        arguments.page.write_text(section(report))
    wrong = [name for name in wanted if report["stages"].get(name, {}).get("ok") is False]
    done = [name for name in wanted if report["stages"].get(name, {}).get("ok")]
    print(f"WRONG: {', '.join(wrong)}" if wrong else f"RIGHT: {', '.join(done)}" if done else "nothing was checked")
    return 1 if wrong or not done else 0


if __name__ == "__main__":
    sys.exit(main())
