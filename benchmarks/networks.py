"""Checks and times explanations on a GPU, forward passes, PyTorch and the public implementations, for gpu.py.

python benchmarks/networks.py FOLDER [--models mobilenet_v3_small resnet18 resnet50 vgg16 mobilenet_v2]

This command prepares the folder, on any machine with the test extra. For each network it writes a bundle in float32 and
float16, verified against PyTorch in float64; its weights for PyTorch; an image; and, of every method (of two for the
networks that take long), the CPU's map of the image and the largest distance of a map that a GPU may give: 1e-3, or
twice what a change of the image's last bits does to the map, if that is more.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import camrt
from camrt.kernels import DeviceError, minmax
from camrt.runtime.backends import BACKENDS
from camrt.runtime.cams import METHODS
from camrt.runtime.errors import BackendUnavailable
from camrt.verification.distances import cosine_distance, largest_difference

MODELS = ("mobilenet_v3_small", "resnet18", "resnet50", "vgg16", "mobilenet_v2")
CHECKED = ("mobilenet_v3_small",)  # with every method
TIMED = ("winsor_cam", "score_cam_pp")
SHAPE = (3, 224, 224)
BATCHES = (1, 4, 16, 64)
LIMITS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], float], float]] = {
    "fp32": (largest_difference, 1e-3),
    "fp16": (cosine_distance, 1e-3),
}


def prepare(folder: Path, models: list[str]) -> None:
    import torch
    from common import build

    from camrt.export.probes import smooth_images
    from camrt.runtime.bundle.reading import read_bundle
    from camrt.verification.oracle import module_oracle
    from camrt.verification.verify import verify_bundle

    folder.mkdir(parents=True, exist_ok=True)
    for name in models:
        model = build(name, SHAPE[1])
        path = camrt.export_model(model, folder / f"{name}.camrt", SHAPE, precision=["fp32", "fp16"], overwrite=True)
        report = verify_bundle(read_bundle(path), module_oracle(model, name))
        if not report.passed:
            raise SystemExit(
                f"{name}: not prepared, because comparisons failed: {[r for r in report.rows if not r.passed][:3]}"
            )
        torch.save(model.state_dict(), folder / f"{name}.pt")
        explainer, image = camrt.load(path, "onnxruntime", precision="fp32"), smooth_images(SHAPE, 1)
        np.savez(folder / f"{name}.npz", **expected_of(explainer, image, METHODS if name in CHECKED else TIMED))
        print(f"{name}: {len(report.rows)} comparisons passed", flush=True)


def expected_of(explainer: camrt.Explainer, image: np.ndarray, methods: Iterable[str]) -> dict[str, Any]:
    """What `distances_of` compares with: the image, its class, and each method's map and limits."""
    from camrt.export.probes import last_bits

    target = int(explainer.classify(image).argmax())
    arrays: dict[str, Any] = {"image": image, "target": target}
    for method in methods:
        arrays[f"map:{method}"] = want = explainer.explain(image, method, target).maps
        changed = [] if method == "score_cam_pp" else last_bits(image, 4)  # which takes long, and hardly changes
        others = [explainer.explain(other, method, target).maps for other in changed]
        for precision, (distance, limit) in LIMITS.items():
            own = max((distance(minmax(other), minmax(want)) for other in others), default=0.0)
            arrays[f"limit:{precision}:{method}"] = max(limit, 2 * own)
    return arrays


def backends() -> list[str]:
    return [n for n, row in BACKENDS.items() if row.on_gpu]


def check(folder: Path, quick: bool = False) -> list[dict[str, Any]]:
    """Every method of every network on every backend and precision, three times. quick: one network, two methods."""
    rows = []
    paths = sorted(folder.glob("*.camrt"), key=lambda p: p.stem not in CHECKED)
    for path, backend, precision in itertools.product(paths[:1] if quick else paths, backends(), LIMITS):
        row: dict[str, Any] = {"model": path.stem, "backend": backend, "precision": precision}
        try:
            explainer = camrt.load(path, backend, precision=precision)
            row |= distances_of(explainer, np.load(path.with_suffix(".npz")), precision, TIMED if quick else None)
        except BackendUnavailable as error:
            row["problem"] = str(error)
        except (camrt.CamrtError, DeviceError) as error:
            row |= {"problem": str(error), "wrong": str(error)}
        rows.append(row)
        print(row, flush=True)
    return rows


def check_in_little_memory(folder: Path) -> list[dict[str, Any]]:
    """The same for one network, while other memory is taken so that 600, 300 and 150 MB are left."""
    from camrt.kernels.gpu.device import device

    rows = []
    path = min(folder.glob("*.camrt"), key=lambda p: p.stem not in CHECKED, default=None)
    if path is None:
        return []
    expected = np.load(path.with_suffix(".npz"))
    for backend in backends():
        for left in (600, 300, 150):
            row: dict[str, Any] = {"model": path.stem, "backend": backend, "precision": "fp32", "MB left": left}
            taken = None
            try:
                stream = device().stream()
                taken = stream.empty((device().memory()[0] - (left << 20),), np.uint8)
                row |= distances_of(camrt.load(path, backend, precision="fp32"), expected, "fp32", TIMED)
            except BackendUnavailable as error:
                row["problem"] = str(error)
            except (camrt.CamrtError, DeviceError) as error:
                full = "memory" in str(error)  # it says so: that is right too
                row |= {"problem": str(error)} | ({"distances": {}} if full else {"wrong": str(error)})
            finally:
                del taken
                device().give_back()
            rows.append(row)
            print(row, flush=True)
    return rows


def distances_of(
    explainer: camrt.Explainer, expected: Any, precision: str, methods: Sequence[str] | None
) -> dict[str, Any]:
    """distances: of each method's map from the CPU's, the largest of three calls; wrong: what is beyond its limit."""
    image, target, distance = expected["image"], int(expected["target"]), LIMITS[precision][0]
    distances, wrong = {}, {}
    for method in methods or [name.removeprefix("map:") for name in expected if name.startswith("map:")]:
        want = minmax(expected[f"map:{method}"])
        found = [distance(minmax(explainer.explain(image, method, target).maps), want) for _ in range(3)]
        distances[method] = max(found)
        if not max(found) <= float(expected[f"limit:{precision}:{method}"]):
            wrong[method] = max(found)
    if explainer.classify(image).argmax() != target:
        wrong["top class"] = 1.0
    return {"distances": distances} | ({"wrong": wrong} if wrong else {})


def measure(folder: Path, runs: int, peer: Path | None = None) -> list[dict[str, Any]]:
    """The result of `_measured` per network, backend and precision, and PyTorch's times per network. Needs a GPU."""
    found = []
    for path in sorted(folder.glob("*.camrt")):
        name, expected = path.stem, np.load(path.with_suffix(".npz"))
        for backend in (n for n, row in BACKENDS.items() if row.on_gpu):
            for precision in LIMITS:
                row: dict[str, Any] = {"model": name, "backend": backend, "precision": precision}
                try:
                    row |= _measured(path, backend, precision, expected, runs)
                except (camrt.CamrtError, DeviceError) as error:
                    row["problem"] = str(error)
                found.append(row)
                print(_line(row), flush=True)
        row = {"model": name, "backend": "PyTorch", **_peers(name, folder, expected, runs, peer)}
        found.append(row)
        print(_line(row), flush=True)
    return found


def _measured(path: Path, backend: str, precision: str, expected: Any, runs: int) -> dict[str, Any]:
    """Compares the maps with the CPU's; if they agree, times calls for one image, from the array to the map, in
    milliseconds (p50, p99), and images per second.
    """
    image, target = expected["image"], int(expected["target"])
    explainer = camrt.load(path, backend, max_batch=64, precision=precision)
    compared = distances_of(explainer, expected, precision, TIMED)
    distances = compared["distances"]
    if "wrong" in compared:
        return compared | {"problem": f"not timed, it is not the CPU's: {compared['wrong']}"}
    masks = int(explainer.explain(image, "score_cam_pp", target).details["masked_runs"][0])
    batch = np.repeat(image, 64, axis=0)
    session = explainer.session
    with session.exclusive():
        chunks = [session.memory.put(batch[: min(64, masks - i)]) for i in range(0, masks, 64)]

    def passes() -> None:
        with session.exclusive():
            for chunk in chunks:
                session.logits(chunk)

    result = {
        "distances": distances,
        "masked_runs": masks,
        "forward": _times(lambda: explainer.classify(image), runs),
        "winsor_cam": _times(lambda: explainer.explain(image, target=target), runs),
        "score_cam_pp": _times(lambda: explainer.explain(image, "score_cam_pp", target), max(runs // 10, 5)),
        "forward passes of its masks": _times(passes, max(runs // 10, 5)),
        "winsor_cam images per second": {n: _throughput(path, backend, precision, batch[:n], target) for n in BATCHES},
        "score_cam_pp masks per second": {
            n: masks * _rate(path, backend, precision, image, target, n) for n in BATCHES[1:]
        },
    }
    result["winsor_cam / forward"] = result["winsor_cam"]["p50_ms"] / result["forward"]["p50_ms"]
    alone = result["forward passes of its masks"]["p50_ms"]
    result["score_cam_pp / its masks' forward passes"] = result["score_cam_pp"]["p50_ms"] / alone
    return result


def _throughput(path: Path, backend: str, precision: str, batch: np.ndarray, target: int) -> float:
    """Winsor-CAM explanations per second in batches of that size."""
    explainer = camrt.load(path, backend, max_batch=len(batch), precision=precision)
    return len(batch) / _times(lambda: explainer.explain(batch, target=target), 20)["p50_ms"] * 1e3


def _rate(path: Path, backend: str, precision: str, image: np.ndarray, target: int, masks: int) -> float:
    """ScoreCAM++ explanations per second, `masks` masked images at a time."""
    explainer = camrt.load(path, backend, mask_batch=masks, precision=precision)
    return 1e3 / _times(lambda: explainer.explain(image, "score_cam_pp", target), 5)["p50_ms"]


def _times(run: Callable[[], Any], runs: int) -> dict[str, float]:
    """p50 and p99 of whole calls, in milliseconds, after three to warm up."""
    times = []
    for i in range(runs + 3):
        started = time.perf_counter()
        run()
        if i >= 3:
            times.append((time.perf_counter() - started) * 1e3)
    low, high = np.quantile(times, [0.5, 0.99])
    return {"p50_ms": float(low), "p99_ms": float(high)}


def _peers(name: str, folder: Path, expected: Any, runs: int, peer: Path | None) -> dict[str, Any]:
    """Times of PyTorch eager and compiled, pytorch-grad-cam's ScoreCAM and Winsor-CAM's public implementation.
    `problem` names what is not installed.
    """
    try:
        import torch
        from common import winsor_cam_peer
        from support import import_torchvision

        model = import_torchvision().models.get_model(name, weights=None)
    except ImportError as error:
        return {"problem": str(error)}
    if not torch.cuda.is_available():
        return {"problem": "PyTorch sees no GPU"}
    model.load_state_dict(torch.load(folder / f"{name}.pt"))
    model.eval().cuda()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    image, target = torch.from_numpy(expected["image"]).cuda(), int(expected["target"])

    def synchronized(work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            work()
            torch.cuda.synchronize()

        return run

    found: dict[str, Any] = {}
    with torch.no_grad():
        found["eager forward"] = _times(synchronized(lambda: model(image)), runs)
        compiled = torch.compile(model, mode="reduce-overhead")
        found["compiled forward"] = _times(synchronized(lambda: compiled(image)), runs)
    if importlib.util.find_spec("pytorch_grad_cam") is None:
        found["problem"] = "pytorch-grad-cam is not installed"
    else:
        found["pytorch-grad-cam ScoreCAM"] = _times(synchronized(_score_cam(model, name, image, target)), 5)
    if peer is not None:
        run = winsor_cam_peer(model, peer)
        found["Winsor-CAM's public implementation"] = _times(synchronized(lambda: run(image, target)), 10)
    return found


def _score_cam(model: Any, name: str, image: Any, target: int) -> Callable[[], Any]:
    from pytorch_grad_cam import ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    last = model.layer4[-1] if name.startswith("resnet") else model.features[-1]
    cam: Any = ScoreCAM(model, [last])
    cam.batch_size = 64
    return lambda: cam(image, [ClassifierOutputTarget(target)])


def _line(row: dict[str, Any]) -> str:
    said = [f"{k} {v['p50_ms']:.2f} ms" for k, v in row.items() if isinstance(v, dict) and "p50_ms" in v]
    said += [f"{k} {v:.2f}" for k, v in row.items() if " / " in k]
    return f"{row['model']:14}{row['backend']:18}{row.get('precision', ''):6}{', '.join(said)}{row.get('problem', '')}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prepares the folder that gpu.py takes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    arguments = parser.parse_args()
    prepare(arguments.folder, arguments.models)
