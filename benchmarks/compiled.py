"""Files of `camrt compile` beside `explain`, engines of them by TensorRT for RTX, and the page in a browser.

python benchmarks/compiled.py [--models resnet50 ...] [--runs 20] --out docs/compiled.json

Every file's map is compared with `explain`'s first. The two then take turns on the same image, with the same number of
threads. The browser is Chromium with the page's own server; its figures are medians in the page.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from common import build, machine, summary, take_turns, versions
from PIL import Image

import camrt
from camrt.demo.run import BUNDLE
from camrt.export.probes import smooth_images
from camrt.kernels import minmax
from camrt.page.serving import server
from camrt.page.site import make_page
from camrt.runtime.backends.tensorrt.bindings import find_library
from camrt.runtime.backends.tensorrt.build import build_engine
from camrt.runtime.backends.tensorrt.target import Profile, Target
from camrt.runtime.bundle.kinds import Kind
from camrt.runtime.bundle.manifest import PRECISIONS, Program
from camrt.runtime.bundle.reading import read_bundle
from camrt.runtime.errors import CamrtError

METHODS = ("winsor_cam", "grad_cam", "layer_cam", "integrative_cam", "recipro_cam", "score_cam_pp")
MOST_MASKS = 1000  # more take minutes a map
THREADS = 1
CAPABILITY = (8, 9)
RECIPE = camrt.Preprocess((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TUNES = 21  # positions of the slider


def exported(name: str, folder: Path) -> Path:
    if name == "shapes":
        return BUNDLE
    model, shape = build(name, 224), (3, 224, 224)
    return camrt.export_model(model, folder / f"{name}.camrt", shape, preprocess=RECIPE, precision=["fp32", "fp16"])


def compared(bundle: Path, method: str, folder: Path, runs: int) -> dict[str, Any]:
    """A file's size, its distance from `explain`, and the times of both."""
    path = camrt.compile(bundle, folder / f"{method}.onnx", method)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    explainer = camrt.load(bundle, "onnxruntime", threads=THREADS)
    image = smooth_images(explainer.manifest.input_shape, 1)
    feeds: dict[str, np.ndarray] = {"image": image, "target": np.array([-1])}
    feeds |= {"percentile": np.array([90], np.float32)} if method == "winsor_cam" else {}

    def by_file() -> np.ndarray:
        return np.asarray(session.run(["map"], feeds)[0])

    difference = np.abs(minmax(by_file()) - minmax(explainer.explain(image, method).maps)).max()
    times = take_turns({"explain": lambda: explainer.explain(image, method), "file": by_file}, runs)
    ratio = float(np.median(times["file"] / times["explain"]))
    return {
        "method": method,
        "bytes": path.stat().st_size,
        "difference": float(difference),
        "explain": summary(times["explain"]),
        "file": summary(times["file"]),
        "file_by_explain": round(ratio, 3),
        "engines": engines(bundle, method, folder),
    }


def engines(bundle: Path, method: str, folder: Path) -> dict[str, Any]:
    """Bytes of the engine in each precision of the bundle; or why it was not built."""
    found: dict[str, Any] = {}
    opened = read_bundle(bundle)
    inputs: dict[str, list[Any]] = {"image": ["batch", *opened.manifest.input_shape], "target": ["batch"]}
    inputs |= {"percentile": ["batch"]} if method == "winsor_cam" else {}
    for precision in opened.precisions:
        path = camrt.compile(bundle, folder / "engine.onnx", method, precision=precision)
        program = Program(Kind.LAYER_MAPS, path.name, "", (), inputs, {}, PRECISIONS[precision])
        library, target = find_library("tensorrt_rtx"), Target(CAPABILITY, None)
        try:
            found[precision] = len(build_engine(library, path, program, target, [Profile("batch", 1, 4)]).engine)
        except CamrtError as error:
            found[precision] = str(error)
    return found


def in_browser(bundle: Path, folder: Path) -> dict[str, Any]:
    """Milliseconds of a run of the network and of a retune of Winsor-CAM."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    picture = folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(picture)
    page_folder = make_page(bundle, folder / "site", ["winsor_cam"], [picture])
    size = sum(f.stat().st_size for f in page_folder.rglob("*") if f.is_file())
    with server(page_folder, port=0) as running, sync_playwright() as playwright:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{running.server_address[1]}/?engine=wasm")
        page.wait_for_selector("body[data-ready=yes]", timeout=300_000)
        page.click("#examples button")
        page.wait_for_selector("#results:not([hidden])", timeout=300_000)
        times = page.evaluate(
            """async (tunes) => {
              const {state, ask} = camrt;
              const timed = async (work) => {
                const began = performance.now();
                await work();
                return performance.now() - began;
              };
              const network = [], retune = [];
              for (let i = 0; i < 7; i++) network.push(await timed(() => ask('run', state.photo.input, -1)));
              for (let i = 0; i < tunes; i++) retune.push(await timed(() => ask('retune', (100 * i) / (tunes - 1))));
              return {network, retune, engine: state.engine, check: state.checks.winsor_cam.difference};
            }""",
            TUNES,
        )
        version = browser.version
        browser.close()
        running.shutdown()
    return {
        "bytes": size,
        "browser": f"Chromium {version}",
        "engine": times["engine"],
        "difference": times["check"],
        "network_ms": round(float(np.median(times["network"])), 1),
        "retune_ms": round(float(np.median(times["retune"])), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["shapes", "mobilenet_v3_small", "resnet50"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            bundle = exported(name, folder)
            rows = []
            for method in METHODS:
                masks = camrt.load(bundle).manifest.taps[-1].channels if method == "score_cam_pp" else 1
                if masks > MOST_MASKS:
                    continue
                rows.append(compared(bundle, method, folder, 3 if masks > 100 else options.runs))
                print(name, json.dumps(rows[-1]), flush=True)
            results.append({"model": name, "rows": rows, "page": in_browser(bundle, folder)})
            print(name, json.dumps(results[-1]["page"]), flush=True)
    found = {
        "machine": machine(),
        "threads": THREADS,
        "versions": versions("tensorrt-rtx-cu13-bindings"),
        "results": results,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
