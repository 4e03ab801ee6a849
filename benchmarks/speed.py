"""Times an explanation, a forward pass and Winsor-CAM's public implementation, in one run on one machine.

python benchmarks/speed.py [--model resnet50] [--size 224] [--threads 2] [--runs 30] [--peer FOLDER] [--out speed.json]

The weights are random, with batch norm statistics of random images: the amount of arithmetic is that of a trained
network. The bundle is verified against PyTorch in float64 first; then the contenders take turns; a ratio is the median
over the turns. --peer is a
checkout of Winsor-CAM's public repository (its winsorcam.py), timed over the same layers. Needs the test extra.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import build, machine, print_times, summary, take_turns, versions, winsor_cam_peer

import camrt
from camrt.export.probes import smooth_images
from camrt.runtime.backends import Settings, create
from camrt.runtime.bundle.reading import read_bundle
from camrt.verification.oracle import module_oracle
from camrt.verification.verify import verify_bundle


def export_memory(name: str, size: int) -> dict[str, float]:
    """Peak memory of an export in a process of its own, and what PyTorch and the model take before it, in MB."""
    code = (
        f"import resource, sys, tempfile, pathlib, camrt\nsys.path[:0] = [{str(Path(__file__).parent)!r}]\nimport "
        f"common\ntorchvision = common.import_torchvision()\nmodel = torchvision.models.get_model({name!r}, "
        "weights=None).eval()\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nwith "
        "tempfile.TemporaryDirectory() as folder:\n    camrt.export_model(model, pathlib.Path(folder) / 'x.camrt', "
        f"(3, {size}, {size}))\nweights = sum(t.nbytes for t in model.state_dict().values())\nprint(weights / 1e6, "
        "before / 1e3, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    weights, before, peak = map(float, done.stdout.split())
    return {
        "weights_mb": round(weights),
        "before_mb": round(before),
        "peak_mb": round(peak),
        "limit_mb": round(4 * weights + 1000),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Times explanations beside forward passes and a peer.")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = arguments.size
    memory = export_memory(arguments.model, size)
    model = build(arguments.model, size)
    image = smooth_images((3, size, size), 1)
    with tempfile.TemporaryDirectory() as folder:
        path = camrt.export_model(model, Path(folder) / "model.camrt", (3, size, size), layers="conv")
        bundle = read_bundle(path)
        report = verify_bundle(bundle, module_oracle(model, arguments.model))
        if not report.passed:
            raise SystemExit(f"not timed: comparisons failed: {[r for r in report.rows if not r.passed][:3]}")
        backend = create("onnxruntime", Settings(threads=arguments.threads))
        classify = backend.open(bundle, bundle.program("classify"))
        layer_maps = backend.open(bundle, bundle.program("layer_maps", [t.name for t in bundle.manifest.taps]))
        explainer = camrt.load(path, threads=arguments.threads)
        target = int(explainer.classify(image).argmax())
        seed = np.eye(explainer.manifest.num_classes, dtype=np.float32)[[target]]
        explained = explainer.explain(image, target=target, percentile=90)
        contenders: dict[str, Callable[[], Any]] = {
            "classify": lambda: classify.run({"image": image}),
            "layer_maps": lambda: layer_maps.run({"image": image, "seed": seed}),
            "explain": lambda: explainer.explain(image, target=target, percentile=90),
            "retune": lambda: explained.retune(percentile=50),
        }
        if arguments.peer is not None:
            peer, tensor = winsor_cam_peer(model, arguments.peer), torch.from_numpy(image)
            contenders["peer"] = lambda: peer(tensor, target)
        times = take_turns(contenders, arguments.runs)

    ratios = {
        "layer_maps / classify": times["layer_maps"] / times["classify"],
        "explain / classify": times["explain"] / times["classify"],
    }
    if "peer" in times:
        ratios["peer / explain"] = times["peer"] / times["explain"]
    result = {
        "model": arguments.model,
        "layers": len(explainer.layers),
        "input": [1, 3, size, size],
        "threads": arguments.threads,
        "runs": arguments.runs,
        "machine": machine(),
        "versions": versions(),
        "comparisons_passed": len(report.rows),
        "times": {name: summary(t) for name, t in times.items()},
        "ratios": {name: round(float(np.median(r)), 3) for name, r in ratios.items()},
        "export_memory": memory,
        "process_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{arguments.model}, {result['layers']} convolutions, batch 1, {arguments.threads} threads, "
        f"{result['machine']['cpu']}"
    )
    print_times(result["times"], result["ratios"])
    print(
        f"export: peak {memory['peak_mb']} MB, {memory['before_mb']} MB of it before it began; limit "
        f"{memory['limit_mb']} MB"
    )


if __name__ == "__main__":
    main()
