"""Compares camrt with the public implementations of the same methods: same model, images and machine, in one run, in
turns.

make peers        installs them into .venv-peers, runs this and writes docs/benchmarks.json and docs/benchmarks.md
python benchmarks/peers.py [--models resnet50 resnet18 mobilenet_v3_small mobilenet] [--threads 2] [--runs 15]
    [--images 3] [--out peers.json]

Every map is compared with camrt's before anything is timed. If both have the same definition, they must agree within
1e-3 after min-max (Winsor-CAM: or within twice the spread of PyTorch's own float32 maps, if that is more); a peer that
differs is reported and not timed. mobilenet is the network of the data folder (see tests/support.py) on its photos; the
others are torchvision's, with random weights and batch norm statistics of random images. Each call has one image. A
turn is one call of each contender on the same image; ratios are medians over turns. Score-CAM runs only on the smaller
networks, with a fifth of the turns.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import contenders
import numpy as np
import torch
from common import build, machine, print_times, summary, take_turns, versions
from contenders import Run
from PIL import Image
from support import DATA, mobilenet, scaled
from torch import nn

import camrt
from camrt.export.probes import last_bits, smooth_images
from camrt.export.pytorch.autograd import record
from camrt.runtime.explainer import Explainer
from camrt.verification.distances import largest_difference
from camrt.verification.methods import in_float64, winsor_cam

LIMIT = 1e-3
SIZE = 224
LAST = {
    "resnet50": "layer4.2",
    "resnet18": "layer4.1",
    "mobilenet_v3_small": "features.12",
    "mobilenet": "features.26",
}
SCORED = ("resnet18", "mobilenet_v3_small", "mobilenet")  # where Score-CAM takes seconds, not minutes


@dataclass(frozen=True)
class Definition:
    """One table of the report: camrt's method and options. others: peer -> how its definition differs."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    def differs(self, library: str, model: str) -> str | None:
        """How the library's definition differs, on every model or on this one; None if it does not."""
        return self.others.get(library) or self.others.get(f"{library} on {model}")

    @property
    def spelled(self) -> str:
        return ":".join([self.method, *(f"{k}={v}" for k, v in self.options.items())])


DEFINITIONS = (
    Definition(
        "winsor_cam",
        {"percentile": 90},
        {"Winsor-CAM on mobilenet_v3_small": "reads the 1 x 1 grids of squeeze-and-excitation as 1 x channels"},
    ),
    Definition("grad_cam"),
    Definition("grad_cam_pp", {}, {"torchcam": "leaves g^2 undivided: the division works on a copy"}),
    Definition("layer_cam"),
    Definition(
        "score_cam",
        {"variant": "pytorch_grad_cam"},
        {"torchcam": "scales the channels before it resizes them, and aligns no corners"},
    ),
    Definition("recipro_cam", {"variant": "openvino_xai"}),
)


@dataclass(frozen=True)
class Photo:
    """An image (1, 3, 224, 224), its class, and `spread`: the largest distance of PyTorch's float32 Winsor-CAM maps
    from its float64 map.

    If a rectifier's input is nearly zero, the spread is chance, and implementations may differ by as much.
    """

    image: np.ndarray
    target: int
    spread: float


def open_model(name: str, count: int) -> tuple[nn.Module, list[Photo]]:
    """A model, and the `count` of its candidate images with the least spread."""
    if name == "mobilenet":
        model, images = mobilenet(), map(photograph, sorted((DATA / "photos").iterdir()))
    else:
        model, images = build(name, SIZE), (smooth_images((3, SIZE, SIZE), 1, seed) for seed in range(20))
    found = [Photo(image, *target_and_spread(model, image)) for image in images]
    return model, sorted(found, key=lambda photo: photo.spread)[:count]


def photograph(path: Path) -> np.ndarray:
    picture = Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return (np.asarray(picture, np.float32) / 127.5 - 1).transpose(2, 0, 1)[None].copy()


def target_and_spread(model: nn.Module, image: np.ndarray) -> tuple[int, float]:
    """(top class, spread): the float32 maps are of the image and of copies that differ in their last bits."""
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    target = int(model(torch.from_numpy(image)).argmax())

    def maps(network: nn.Module, x: np.ndarray) -> np.ndarray:
        found = record(network, torch.from_numpy(x), target, layers)
        return scaled(winsor_cam(found, (SIZE, SIZE), 90, "mean")[0].numpy().astype(np.float32))

    exact = maps(in_float64(model), image.astype(np.float64))
    return target, max(largest_difference(maps(model, x), exact) for x in last_bits(image, 4))


@dataclass(frozen=True)
class Peer:
    """A method of another package."""

    method: str
    package: str
    name: str
    run: Run

    def distances(self, ours: Sequence[np.ndarray], photos: Sequence[Photo]) -> list[float]:
        """The largest difference between camrt's map and the peer's, after min-max, for each image."""
        theirs = [self.run(photo.image, photo.target) for photo in photos]
        return [largest_difference(scaled(a), scaled(b)) for a, b in zip(ours, theirs, strict=True)]


def offered(name: str, model: nn.Module, onnx_file: Path, threads: int) -> tuple[list[Peer], list[str]]:
    """(the methods of the installed libraries, a line for each library that is missing)."""
    found: list[Peer] = []
    missing = []
    for library in contenders.PACKAGES:
        try:
            if library == "OpenVINO XAI":
                offers = contenders.openvino_xai(onnx_file, threads)
            else:
                offers = contenders.BY_MODEL[library](copy.deepcopy(model), LAST[name])
            found += [Peer(method, library, called, run) for method, called, run in offers]
        except ImportError as error:
            missing.append(f"{library}: {error}")
    return found, missing


def measure(name: str, threads: int, runs: int, count: int) -> tuple[list[dict[str, Any]], list[str]]:
    model, photos = open_model(name, count)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "model.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(model, (torch.from_numpy(photos[0].image),), dynamo=True, verbose=False)
        assert program is not None
        program.save(onnx_file)
        of_module = camrt.export_model(model, Path(folder) / "module.camrt", (3, SIZE, SIZE))
        of_file = camrt.export_onnx(onnx_file, Path(folder) / "file.camrt", "last")
        explainers = {"module": camrt.load(of_module, threads=threads), "file": camrt.load(of_file, threads=threads)}
        peers, missing = offered(name, model, onnx_file, threads)
        for definition in DEFINITIONS:
            if definition.method == "score_cam" and name not in SCORED:
                continue
            explainer = explainers["file" if definition.method == "recipro_cam" else "module"]
            turns = max(3, runs // 5) if definition.method == "score_cam" else runs
            rivals = [peer for peer in peers if peer.method == definition.method]
            others = {peer.package: why for peer in rivals if (why := definition.differs(peer.package, name))}
            rows = beside(replace(definition, others=others), explainer, rivals, photos, turns)
            results.append(
                {"model": name, "method": definition.spelled, "images": len(photos), "turns": turns, "rows": rows}
            )
            print_result(results[-1])
    return results, missing


def beside(
    definition: Definition,
    explainer: Explainer,
    peers: list[Peer],
    photos: list[Photo],
    turns: int,
) -> list[dict[str, Any]]:
    """Rows of one table: camrt, ScoreCAM++ after Score-CAM, and the peers."""
    state = {"turn": 0}

    def on_the_next_image(run: Callable[[np.ndarray, int], Any], first: bool = False) -> Callable[[], Any]:
        def call() -> Any:
            state["turn"] += first
            photo = photos[state["turn"] % len(photos)]
            return run(photo.image, photo.target)

        return call

    def explain(image: np.ndarray, target: int) -> np.ndarray:
        return explainer.explain(image, definition.method, target, **definition.options).maps[0]

    ours = [explain(photo.image, photo.target) for photo in photos]
    spreads = [photo.spread if definition.method == "winsor_cam" else 0.0 for photo in photos]
    runs = {"camrt": on_the_next_image(explain, first=True)}
    rows: list[dict[str, Any]] = [{"library": "camrt", "name": definition.spelled}]
    if definition.method == "score_cam":
        runs["camrt score_cam_pp"] = on_the_next_image(lambda x, t: explainer.explain(x, "score_cam_pp", t))
        rows.append({"library": "camrt score_cam_pp", "name": "score_cam_pp", "differs": "ScoreCAM++"})
    for peer in peers:
        row: dict[str, Any] = {"library": peer.package, "name": peer.name}
        distances = peer.distances(ours, photos)
        row |= {"distance": max(distances), "spread": max(spreads)}
        rows.append(row)
        if peer.package in definition.others:
            row["differs"] = definition.others[peer.package]
        elif any(distance > max(LIMIT, 2 * own) for distance, own in zip(distances, spreads, strict=True)):
            row["problem"] = "not timed: its maps differ from camrt's"
            continue
        runs[peer.package] = on_the_next_image(peer.run)
    times = take_turns(runs, turns, warm_up=2)
    for row in rows:
        if row["library"] in times:
            own = times[row["library"]]
            row |= summary(own) | {"times_camrt": round(float(np.median(own / times["camrt"])), 2)}
        row["library"] = row["library"].split(" score_cam")[0]
    return rows


def print_result(result: dict[str, Any]) -> None:
    print(f"{result['model']}, {result['method']}: median of {result['turns']} turns")
    timed = {f"{r['library']} {r['name']}": r for r in result["rows"] if "median_ms" in r}
    print_times(timed, {})
    for row in result["rows"]:
        said = f"{row['times_camrt']} times camrt's" if "times_camrt" in row else row["problem"]
        distance = f", {row['distance']:.1e} from camrt's map" if "distance" in row else ""
        print(
            f"    {row['library']} {row['name']}: {said}{distance}{', ' + row['differs'] if 'differs' in row else ''}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Times camrt beside the public implementations of the same methods.")
    parser.add_argument("--models", nargs="+", default=[*LAST], choices=[*LAST])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name in arguments.models:
        if name == "mobilenet" and not DATA.is_dir():
            left_out.append(f"mobilenet: {DATA} is missing (CAMRT_DATA names another folder)")
            continue
        found, missing = measure(name, arguments.threads, arguments.runs, arguments.images)
        results += found
        left_out += [m for m in missing if m not in left_out]
    installed = {p: v for p in contenders.PACKAGES.values() if (v := _version(p))}
    report = {
        "machine": machine(),
        "versions": versions() | installed,
        "threads": arguments.threads,
        "left_out": left_out,
        "results": results,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for reason in left_out:
        print(f"skipped: {reason}")
    wrong = [f"{r['model']} {row['library']} {row['name']}" for r in results for row in r["rows"] if "problem" in row]
    if wrong:
        print(f"same definition, but the maps differ: {', '.join(wrong)}")
    return 1 if wrong else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
