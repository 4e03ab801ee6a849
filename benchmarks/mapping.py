"""Times `camrt map` beside the plain loop of `explain`, one network thread each.

python benchmarks/mapping.py BUNDLE... [--images 10000] [--method winsor_cam] [--ray] [--core] [--out mapping.json]

Draws JPEG photos of 480 x 360. The plain loop reads and explains them in batches of 16 in one process, writes nothing;
one explainer of `camrt map` reads, explains and writes float16 maps, by processes and with --ray on a local Ray. --core
keeps everything on the first core, so that threads that read have none of their own. Times are of the whole run but for
opening the explainer; start-up is told apart. Memory is the largest resident set of a process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import camrt
from camrt.demo.scenes import draw_scene
from camrt.install import processor
from camrt.method_choice import parse_method

BATCH, DISTINCT = 16, 200


def draw(folder: Path, images: int) -> int:
    """Writes the photos, some of them under many names. Returns their bytes."""
    rng = np.random.default_rng(0)
    for i in range(min(DISTINCT, images)):
        photo = Image.fromarray(draw_scene(i)[0]).resize((480, 360), Image.Resampling.BICUBIC)
        grain = np.asarray(photo, np.int16) + rng.integers(-6, 7, (360, 480, 3), np.int16)
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / f"{i:06d}.jpg", quality=90)
    for i in range(DISTINCT, images):
        os.link(folder / f"{i % DISTINCT:06d}.jpg", folder / f"{i:06d}.jpg")
    return sum(f.stat().st_size for f in folder.iterdir())


def plain(bundle: str, folder: Path, method: str) -> dict[str, float]:
    started = time.perf_counter()
    explainer = camrt.load(bundle, "onnxruntime", BATCH, threads=1)
    choice, files = parse_method(method), sorted(folder.iterdir())
    explainer.explain(files[:BATCH], choice.name, **choice.options)
    opened = time.perf_counter()
    for i in range(0, len(files), BATCH):
        explainer.explain(files[i : i + BATCH], choice.name, **choice.options)
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"images_per_second": len(files) / (ended - opened), "start_s": opened - started, "memory_mb": peak}


def mapped(bundle: str, folder: Path, method: str, out: Path, address: str | None) -> dict[str, float]:
    from camrt.mapping.rows import Wanted
    from camrt.mapping.run import Means, Summary, map_images

    choice, times = parse_method(method), []

    def progress(summary: Summary, _: int) -> None:
        times.append((time.perf_counter(), summary.images))

    started = time.perf_counter()
    wanted, means = Wanted(choice.name, choice.options), Means("onnxruntime", 1, BATCH, 1, 2, address)
    map_images(bundle, [str(folder)], str(out), wanted, means, progress=progress)
    (first, before), (last, after) = times[1], times[-1]  # the first part pays for opening the explainer
    rate = (after - before) / (last - first)
    bytes_out = sum(f.stat().st_size for f in out.iterdir())
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    return {
        "images_per_second": rate,
        "start_s": first - started - before / rate,
        "memory_mb": peak,
        "bytes_out": bytes_out / after,
    }


def apart(*arguments: str) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, __file__, "--one", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("bundles", nargs="*")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--method", default="winsor_cam")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--core", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        how, bundle, folder = arguments.one
        with tempfile.TemporaryDirectory() as out:
            if how == "plain":
                print(json.dumps(plain(bundle, Path(folder), arguments.method)))
            else:
                address = "local" if how == "ray" else None
                print(json.dumps(mapped(bundle, Path(folder), arguments.method, Path(out) / "o", address)))
        return
    if arguments.core:
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    report: dict[str, Any] = {"cpu": processor(), "cores": len(os.sched_getaffinity(0)), "method": arguments.method}
    with tempfile.TemporaryDirectory() as folder:
        size = draw(Path(folder), arguments.images)
        report |= {"images": arguments.images, "bytes_in": size / arguments.images, "networks": {}}
        for bundle in arguments.bundles:
            rows: dict[str, Any] = {}
            for how in ("plain", "processes", *(["ray"] if arguments.ray else []), "plain again"):
                kind = how.partition(" ")[0]
                rows[how] = apart(kind, bundle, folder, "--method", arguments.method)
                print(f"{bundle:30}{how:12}{json.dumps(rows[how])}", flush=True)
            base = (rows["plain"]["images_per_second"] + rows["plain again"]["images_per_second"]) / 2
            for how in rows:
                rows[how]["of_plain"] = rows[how]["images_per_second"] / base
            report["networks"][Path(bundle).stem] = rows
            print({how: round(row["of_plain"], 3) for how, row in rows.items()}, flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
