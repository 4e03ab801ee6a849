"""Damaged manifests, programs, ONNX models and pictures: each must be refused by a message, or be explained."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

import camrt
from camrt.demo.run import BUNDLE
from camrt.demo.scenes import draw_scene

from . import damage

KINDS = ("manifest", "program", "picture", "program", "manifest", "picture", "manifest", "program", "picture", "model")
HANG = 20.0  # seconds
MEMORY = 6 << 30  # bytes of address space
WORKERS = 2
_METHODS = {"activations": "eigen_cam", "gradients": "layer_cam", "layer_maps": "winsor_cam", "full_grad": "full_grad"}
_METHODS_OF_LAST = {"layer_maps.last.onnx": "grad_cam", "trunk.onnx": "recipro_cam", "head.onnx": "ablation_cam"}


class Place:
    """A worker's folder: a bundle to damage, pictures, and their undamaged contents in memory."""

    def __init__(self, folder: Path) -> None:
        self.bundle = folder / "demo.camrt"
        shutil.copytree(BUNDLE, self.bundle)
        self.manifest = (BUNDLE / "manifest.json").read_text()
        self.programs = {p.name: p.read_bytes() for p in sorted(BUNDLE.glob("*.onnx"))}
        picture = Image.fromarray(draw_scene(3)[0]).resize((60, 44))
        self.pictures = {name: damage.encoded(picture, name) for name in damage.FORMATS}
        self.image = np.random.default_rng(0).standard_normal((1, 3, 128, 128)).astype(np.float32)
        self.explainer = camrt.load(BUNDLE, threads=1)
        self.model = damage.small_model()
        self.folder = folder

    def restore(self, file: str) -> None:
        (self.bundle / file).write_bytes(self.programs.get(file) or self.manifest.encode())


def _manifest(place: Place, rng: random.Random) -> None:
    (place.bundle / "manifest.json").write_bytes(damage.manifest_of(place.manifest, rng))
    try:
        explainer = camrt.load(place.bundle, threads=1)
        _checked(explainer.explain(place.image, "grad_cam"), explainer)
    finally:
        place.restore("manifest.json")


def _program(place: Place, rng: random.Random) -> None:
    file = rng.choice(list(place.programs))
    data = damage.model_of(place.programs[file], rng)
    (place.bundle / file).write_bytes(data)
    (place.bundle / "manifest.json").write_text(damage.hashed(place.manifest, file, data))
    try:
        explainer = camrt.load(place.bundle, threads=1)
        method = _METHODS_OF_LAST.get(file) or _METHODS.get(file.split(".")[0])
        if method is None:
            explainer.classify(place.image)
        else:
            layers = "last" if ".last." in file else None
            _checked(
                explainer.explain(place.image, method, layers=None if method == "full_grad" else layers), explainer
            )
    finally:
        place.restore(file)
        place.restore("manifest.json")


def _picture(place: Place, rng: random.Random) -> None:
    name = rng.choice(damage.FORMATS)
    path = place.folder / f"picture.{name.lower()}"
    path.write_bytes(damage.bytes_of(place.pictures[name], rng))
    _checked(place.explainer.explain(path, "grad_cam"), place.explainer)


def _model(place: Place, rng: random.Random) -> None:
    path, bundle = place.folder / "model.onnx", place.folder / "model.camrt"
    path.write_bytes(damage.model_of(place.model, rng))
    try:
        explainer = camrt.load(camrt.export_onnx(path, bundle, overwrite=True), threads=1)
        image = np.zeros((1, *explainer.manifest.input_shape), np.float32) + 0.5
        _checked(explainer.explain(image, "grad_cam"), explainer)
    finally:
        shutil.rmtree(bundle, ignore_errors=True)


RUN: dict[str, Callable[[Place, random.Random], None]] = {
    "manifest": _manifest,
    "program": _program,
    "picture": _picture,
    "model": _model,
}


def _checked(result: camrt.Explanation, explainer: camrt.Explainer) -> None:
    """Asserts that the maps have the right shape and are finite."""
    assert result.maps.shape == (1, *explainer.manifest.input_shape[1:]), result.maps.shape
    assert np.isfinite(result.maps).all(), "a map holds NaN or infinity"


def run(number: int, seed: int, place: Place) -> str:
    """Makes and runs input `number`. Returns "explained", or the CamrtError's message; other errors are raised."""
    try:
        RUN[KINDS[number % len(KINDS)]](place, random.Random(f"{seed}/{number}"))
    except camrt.CamrtError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 2000, (
            f"a message of {len(message)} characters: {message[:100]}"
        )
        return message
    return "explained"


def run_one(number: int, seed: int, work: Path) -> str:
    """Runs one input again, in this process, so that a crash happens here."""
    (work / "again").mkdir()
    return f"{KINDS[number % len(KINDS)]}: {run(number, seed, Place(work / 'again'))}"


def _worker(numbers: range, seed: int, folder: Path, now: Any, tally: Any) -> None:
    """Runs its inputs. now: (current input, its start time); tally: for each kind, refused and explained inputs."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: dies with its parent
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    warnings.simplefilter("ignore")
    place_folder = folder / f"from-{numbers.start}"
    place_folder.mkdir()
    place = Place(place_folder)
    kinds = sorted(RUN)
    for number in numbers:
        now[0], now[1] = number, time.monotonic()
        try:
            explained = run(number, seed, place) == "explained"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
            with (folder / "findings.jsonl").open("a") as file:
                file.write(json.dumps({"input": number, "what": found}) + "\n")
        else:
            tally[2 * kinds.index(KINDS[number % len(KINDS)]) + explained] += 1
    now[0] = -1


def fuzz(inputs: int, seed: int, work: Path) -> dict[str, Any]:
    """Runs that many inputs in child processes. Returns the refused and explained inputs of each kind, and findings."""
    context = multiprocessing.get_context("spawn")
    kinds = sorted(RUN)
    tallies, watched = [], []
    findings: list[dict[str, Any]] = []

    def start(index: int, first: int) -> tuple[Any, Any]:
        now = context.Array("d", [first, time.monotonic() + 60], lock=False)  # a minute more to start
        arguments = (range(first, inputs, WORKERS), seed, work / str(index), now, tallies[index])
        process = context.Process(target=_worker, args=arguments, daemon=True)
        process.start()
        return process, now

    for index in range(WORKERS):
        (work / str(index)).mkdir()
        tallies.append(context.Array("q", 2 * len(kinds), lock=False))
        watched.append(start(index, index))
    with tqdm(total=inputs, unit=" inputs", mininterval=5) as progress:
        while any(process is not None for process, _ in watched):
            time.sleep(0.2)
            for index, (process, now) in enumerate(watched):
                if process is None:
                    continue
                number, hangs = int(now[0]), time.monotonic() - now[1] > HANG
                if process.is_alive() and not (hangs and number >= 0):
                    continue
                if number < 0 and not process.is_alive():
                    watched[index] = (None, now)
                    continue
                if process.is_alive():
                    process.kill()
                process.join()
                what = (
                    f"no end after {HANG:.0f} seconds" if hangs else f"the process died, exit code {process.exitcode}"
                )
                findings.append({"input": number, "what": what})
                watched[index] = start(index, number + WORKERS)
            progress.update(sum(sum(tally) for tally in tallies) + len(findings) - progress.n)
    for index in range(WORKERS):
        noted = work / str(index) / "findings.jsonl"
        findings += [json.loads(line) for line in noted.read_text().splitlines()] if noted.exists() else []
    for finding in findings:
        finding["kind"] = KINDS[finding["input"] % len(KINDS)]
    totals = np.sum([list(tally) for tally in tallies], axis=0).reshape(-1, 2).tolist()
    counted = {
        kind: {"refused": refused, "explained": explained}
        for kind, (refused, explained) in zip(kinds, totals, strict=True)
    }
    return {"inputs": inputs, "kinds": counted, "findings": sorted(findings, key=lambda f: f["input"])}
