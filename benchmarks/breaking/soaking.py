"""Runs ten thousand explanations in several processes with several threads: maps must repeat, memory must not grow."""

from __future__ import annotations

import gc
import multiprocessing
import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import camrt
from camrt.demo.run import BUNDLE
from camrt.demo.scenes import draw_scene

PROCESSES, THREADS = 2, 4
WORK: tuple[tuple[str, dict[str, Any]], ...] = (
    ("winsor_cam", {"percentile": 50}),
    ("grad_cam", {}),
    ("winsor_cam", {"percentile": 90}),
    ("layer_cam", {}),
    ("score_cam_pp", {}),
    ("finer_cam", {}),
    ("recipro_cam", {}),
    ("integrative_cam", {}),
)
NEAR = 1e-5  # the largest difference from the first run's map, whatever other threads do
SAMPLES = 40
GROWTH = 0.02  # the largest growth of memory, as a fraction, from the second to the last quarter of the run


def _resident() -> float:
    """MB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def _explain(explainer: camrt.Explainer, pictures: list[np.ndarray], number: int) -> np.ndarray:
    """The maps of one call: one method, one or two pictures; Winsor-CAM is retuned, every third call is drawn."""
    method, options = WORK[number % len(WORK)]
    at = number // len(WORK) % (len(pictures) - 1)
    result = explainer.explain(pictures[at : at + 1 + number % 2], method, **options)
    if method == "winsor_cam":
        result = result.retune(percentile=options["percentile"] / 2)
    if number % 3 == 0:
        result.overlay(0)
    return result.maps


def _process(count: int, report: Any) -> None:
    explainer = camrt.load(BUNDLE, threads=1)
    pictures = [draw_scene(seed)[0] for seed in range(5)]
    period = len(WORK) * (len(pictures) - 1) * 6
    expected = {number: _explain(explainer, pictures, number) for number in range(period)}
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(count):
        todo.put(number)
    farthest, problems, lock = [0.0], [], threading.Lock()

    def work() -> None:
        while True:
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                distance = float(np.abs(_explain(explainer, pictures, number) - expected[number % period]).max())
                if not distance <= NEAR:
                    problems.append(
                        {"explanation": number, "what": f"its maps are {distance:.1e} from the first run's"}
                    )
            except Exception as error:
                distance = 0.0
                problems.append({"explanation": number, "what": f"{type(error).__name__}: {error}"})
            with lock:
                farthest[0] = max(farthest[0], distance)
            if number % (count // SAMPLES) == 0:
                gc.collect()
                report.put(("memory", round(_resident(), 1)))
            if number % 50 == 0:
                report.put(("done", 50))

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report.put(("end", (farthest[0], problems)))


def soak(explanations: int) -> dict[str, Any]:
    """Runs that many explanations. Returns the largest difference of maps, memory in MB over time, and findings."""
    context = multiprocessing.get_context("spawn")
    reports = [context.Queue() for _ in range(PROCESSES)]
    count = explanations // PROCESSES
    running = [context.Process(target=_process, args=(count, report), daemon=True) for report in reports]
    for process in running:
        process.start()
    memory: list[list[float]] = [[] for _ in running]
    ends: list[tuple[float, list[dict[str, Any]]] | None] = [None] * PROCESSES
    with tqdm(total=explanations, unit=" explanations", mininterval=5) as progress:
        while None in ends:
            for index, report in enumerate(reports):
                if ends[index] is not None:
                    continue
                try:
                    what, value = report.get(timeout=1)
                except queue.Empty:
                    if not running[index].is_alive():
                        ends[index] = (0.0, [{"what": f"process {index} died, exit code {running[index].exitcode}"}])
                    continue
                if what == "memory":
                    memory[index].append(value)
                elif what == "done":
                    progress.update(value)
                else:
                    ends[index] = value
    findings = [problem for end in ends if end is not None for problem in end[1]]
    growth = []
    for index, samples in enumerate(memory):
        quarter = len(samples) // 4
        early, late = (float(np.median(part)) for part in (samples[quarter : 2 * quarter], samples[-quarter:]))
        growth.append(round(late / early - 1, 4))
        if late > early * (1 + GROWTH):
            findings.append({"what": f"process {index} grew from {early:.0f} to {late:.0f} MB"})
    farthest = max(end[0] for end in ends if end is not None)
    return {
        "explanations": count * PROCESSES,
        "processes": PROCESSES,
        "threads_each": THREADS,
        "largest_difference": farthest,
        "memory_mb": memory,
        "growth": growth,
        "findings": findings,
    }
