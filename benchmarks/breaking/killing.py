"""Kills `camrt export`, `camrt build` and `camrt evaluate` at random moments and runs them again."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

import camrt
from camrt.demo.run import BUNDLE
from camrt.demo.scenes import draw_scene
from camrt.runtime.backends.tensorrt.cache import EngineCache

from . import damage

Problems = list[dict[str, Any]]


class Command:
    """A camrt command, to run to its end (`through`) or to kill (`killed`), in a folder."""

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
        self.arguments = [sys.executable, "-m", "camrt", *arguments]
        self.folder = folder
        self.environment = {**os.environ, **(environment or {})}

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.arguments,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def through(self) -> tuple[float, str | None]:
        """Runs the command to its end: (seconds, its error, None if it succeeded)."""
        started, process = time.monotonic(), self.start()
        said = process.communicate()[1].decode(errors="replace")
        failed = f"exit code {process.returncode}: {said[-300:]}" if process.returncode else None
        return time.monotonic() - started, failed

    def killed(self, moment: Callable[[subprocess.Popen[bytes]], None]) -> bool:
        """Starts the command, waits for `moment`, kills it. Returns whether it was still running then."""
        process = self.start()
        moment(process)
        with_life = process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return with_life


def _attack(
    command: Command,
    rounds: int,
    rng: random.Random,
    look: Callable[[int], list[str]],
    busy: Callable[[], bool],
    prepare: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Kills the command `rounds` times: half of the kills at random moments, half within 30 ms after `busy()` is true,
    while it writes. look(round) returns the problems after a kill.
    """
    duration, failed = command.through()
    problems: Problems = [] if failed is None else [{"round": -1, "what": failed}]
    kills = while_busy = 0
    for number in tqdm(range(rounds), unit=" kills", mininterval=5):
        prepare(number)
        delay, close = rng.uniform(0, duration), rng.uniform(0, 0.03)

        def moment(
            process: subprocess.Popen[bytes], number: int = number, delay: float = delay, close: float = close
        ) -> None:
            if number % 2:
                time.sleep(delay)
                return
            end = time.monotonic() + 3 * duration
            while process.poll() is None and not busy() and time.monotonic() < end:
                time.sleep(0.0005)
            time.sleep(close)

        killed = command.killed(moment)
        kills += killed
        while_busy += killed and number % 2 == 0
        problems += [{"round": number, "what": what} for what in look(number)]
    return {"kills": kills, "of_them_while_writing": while_busy, "problems": problems}


def _export(folder: Path, rounds: int, rng: random.Random) -> dict[str, Any]:
    """Kills exports that replace a bundle, and in every third round exports without an earlier bundle."""
    (folder / "small.onnx").write_bytes(damage.small_model())
    bundle = folder / "small.camrt"
    command = Command(["export", "small.onnx", "small.camrt", "--force"], folder)
    image = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    expected: list[np.ndarray] = []
    left = [0]

    def look(number: int) -> list[str]:
        left[0] += busy()
        if not bundle.exists():
            return [] if number % 3 == 2 else ["the bundle that was there is gone"]
        try:
            logits = camrt.load(bundle, threads=1).classify(image)
        except camrt.CamrtError as error:
            return [str(error)]
        expected.append(logits)
        return [] if np.array_equal(logits, expected[0]) else ["the bundle gives other logits"]

    def prepare(number: int) -> None:
        if number % 3 == 2:
            shutil.rmtree(bundle, ignore_errors=True)

    def busy() -> bool:
        return any(folder.glob(".small.camrt.*"))

    def settle(number: int) -> None:
        prepare(number)
        if number % 3 != 2 and not bundle.exists():
            command.through()

    found = _attack(command, rounds, rng, look, busy, settle)
    _, failed = command.through()
    found["problems"] += [{"round": rounds, "what": what} for what in [failed, *look(0)] if what]
    still = [path.name for path in folder.glob(".small.camrt.*")]
    found["problems"] += [{"round": rounds, "what": f"left over: {still}"}] if still else []
    return found | {"kills_that_left_a_folder": left[0], "folders_left_by_the_last_run": len(still)}


def _build(folder: Path, rounds: int, rng: random.Random) -> dict[str, Any]:
    """Kills builds of engines of the demo's classify program, by TensorRT for RTX, in a separate cache."""
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        return {"left_out": "TensorRT for RTX is not installed", "problems": []}
    cache = folder / "cache"
    arguments = ["build", str(BUNDLE), "--compute-capability", "8.9", "--programs", "classify.onnx"]
    command = Command(arguments, folder, {"CAMRT_CACHE": str(cache)})
    engines = EngineCache(cache)

    def look(_: int) -> list[str]:
        damaged = [e.path.name for e in engines.entries() if e.key is None or engines.get(e.key) is None]
        return [f"damaged: {damaged}"] if damaged else []

    def busy() -> bool:
        return any((cache / "engines").glob("*.part"))

    def prepare(number: int) -> None:
        if number % 4 != 3:
            engines.clear()

    found = _attack(command, rounds, rng, look, busy, prepare)
    _, failed = command.through()
    complete = len(engines.entries())
    left = [path.name for path in (cache / "engines").iterdir() if path.suffix != ".engine"]
    problems = [failed] if failed else [] if complete else ["no engine"]
    problems += [f"left over: {left}"] if left else []
    found["problems"] += [{"round": rounds, "what": what} for what in problems]
    return found | {"engines": complete}


def _evaluate(folder: Path, rounds: int, rng: random.Random) -> dict[str, Any]:
    """Kills evaluations of two methods on drawn scenes; every fourth round starts without earlier results."""
    (folder / "scenes").mkdir()
    for seed in range(6):
        Image.fromarray(draw_scene(seed)[0]).save(folder / "scenes" / f"{seed}.png")
    methods = ["grad_cam", "recipro_cam"]
    arguments = ["evaluate", str(BUNDLE), "scenes", "--methods", *methods, "--out"]
    command, undisturbed = Command([*arguments, "results"], folder), Command([*arguments, "undisturbed"], folder)
    _, failed = undisturbed.through()
    if failed is not None:
        return {"problems": [{"round": -1, "what": failed}]}
    records = folder / "results" / "results.jsonl"

    def written() -> int:
        return records.stat().st_size if records.exists() else 0

    begun = [0]

    def prepare(number: int) -> None:
        if number % 4 == 0:
            shutil.rmtree(folder / "results", ignore_errors=True)
        begun[0] = written()

    found = _attack(command, rounds, rng, lambda _: [], lambda: written() > begun[0], prepare)
    _, failed = command.through()
    problems = [failed] if failed else _differences(folder / "undisturbed", folder / "results")
    found["problems"] += [{"round": rounds, "what": what} for what in problems]
    return found


def _differences(undisturbed: Path, results: Path) -> list[str]:
    """How two folders that `evaluate` wrote differ: other files, other records, or records that are there twice."""
    names = [sorted(path.name for path in folder.iterdir()) for folder in (undisturbed, results)]
    if names[0] != names[1]:
        return [f"files {names[1]} instead of {names[0]}"]
    lines = [(folder / "results.jsonl").read_text().splitlines() for folder in (undisturbed, results)]
    wanted, got = ({(r["image"], r["method"]): r for r in map(json.loads, part)} for part in lines)
    if len(lines[1]) != len(lines[0]) or set(wanted) != set(got):
        return [f"{len(lines[1])} records of {len(got)} pairs, instead of {len(lines[0])}"]
    numbers = [(key, name) for key, record in wanted.items() for name, v in record.items() if isinstance(v, float)]
    far = [at for at in numbers if abs(wanted[at[0]][at[1]] - got[at[0]][at[1]]) > 1e-4]
    return [f"other numbers: {far[:3]}"] if far else []


def kill(rounds: int, seed: int, work: Path) -> dict[str, Any]:
    """Kills each command `rounds` times and returns the counts and findings."""
    found: dict[str, Any] = {}
    findings: Problems = []
    for name, attack in {"export": _export, "build": _build, "evaluate": _evaluate}.items():
        (work / name).mkdir()
        found[name] = attack(work / name, rounds, random.Random(f"{seed}/{name}"))
        findings += [{"command": name, **problem} for problem in found[name].pop("problems")]
    return {"rounds": rounds, "commands": found, "findings": findings}
