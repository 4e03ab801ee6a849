"""Times ScoreCAM++, pytorch-grad-cam's ScoreCAM, and ScoreCAM++'s network runs alone, in one run on one machine.

python benchmarks/scoring.py [--models mobilenet resnet18] [--threads 2] [--runs 7] [--out scoring.json]

mobilenet is the network of the data folder (see tests/support.py), on the zebra; resnet18 has random weights with
warmed-up batch norm. First camrt's score_cam in the peer's convention must equal the peer's map within 1e-3; then the
contenders take turns. `network` runs the same number of ready-made masked images, in the same lanes and batches: the
difference from score_cam_pp is the cost of everything but the network. Needs the test extra.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import build, machine, print_times, summary, take_turns, versions
from PIL import Image
from support import DATA, import_torchvision, mobilenet
from torch import nn

import camrt
from camrt.export.probes import smooth_images
from camrt.kernels import mask_batch
from camrt.runtime.cams import Lane, MaskedRuns
from camrt.runtime.session.batches import Batch
from camrt.verification.distances import largest_difference


def open_model(name: str) -> tuple[nn.Module, str, np.ndarray]:
    """A model, its last block's name and an image (1, 3, 224, 224)."""
    if name == "mobilenet":
        if not DATA.is_dir():
            raise SystemExit(f"{DATA} is missing: CAMRT_DATA names another folder, or choose --models resnet18")
        picture = Image.open(DATA / "photos" / "zebra.png").convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
        return mobilenet(), "features.26", (np.asarray(picture, np.float32) / 127.5 - 1).transpose(2, 0, 1)[None].copy()
    return build(name, 224), "layer4.1", smooth_images((3, 224, 224), 1)


def measure(name: str, threads: int, runs: int) -> dict[str, Any]:
    model, layer, image = open_model(name)
    import_torchvision()
    from pytorch_grad_cam import ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with tempfile.TemporaryDirectory() as folder:
        path = camrt.export_model(model, Path(folder) / "model.camrt", (3, 224, 224), "last")
        explainer = camrt.load(path, threads=threads)
        assert explainer.layers == (layer,), explainer.layers
        target = int(explainer.classify(image).argmax())
        targets: Any = [ClassifierOutputTarget(target)]
        peer_cam = ScoreCAM(model, [dict(model.named_modules())[layer]])

        def peer() -> np.ndarray:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                return peer_cam(torch.from_numpy(image), targets)

        same = explainer.explain(image, "score_cam", target, variant="pytorch_grad_cam")
        distance = largest_difference(same.maps, peer())
        if distance > 1e-3:
            raise SystemExit(f"not timed: camrt's map differs from the peer's by {distance:.1e}")
        found = explainer.explain(image, "score_cam_pp", target)
        batch = Batch(0, image, np.zeros((1, found.logits.shape[1]), np.float32))
        prepared = MaskedRuns.read(explainer.session, batch, [layer], {})
        count = int(found.details["masked_runs"][0])

        masks = mask_batch(image[0], prepared.activations[0][:16])

        def run_network(lane: Lane) -> None:
            for some in lane.batches:
                lane.run(masks[: some.stop - some.start])

        contenders: dict[str, Callable[[], Any]] = {
            "pytorch-grad-cam ScoreCAM": peer,
            "score_cam, the same convention": lambda: explainer.explain(
                image, "score_cam", target, variant="pytorch_grad_cam"
            ),
            "score_cam_pp": lambda: explainer.explain(image, "score_cam_pp", target),
            "network": lambda: prepared.share(count, run_network),
        }
        times = take_turns(contenders, runs, warm_up=2)
    ours = times["score_cam_pp"]
    ratios = {
        "peer / score_cam_pp": times["pytorch-grad-cam ScoreCAM"] / ours,
        "peer / score_cam": times["pytorch-grad-cam ScoreCAM"] / times["score_cam, the same convention"],
        "outside the network, of the total": 1 - times["network"] / ours,
    }
    return {
        "model": name,
        "layer": layer,
        "channels": int(found.details["channels"][0]),
        "masked_runs": count,
        "distance_from_peer": distance,
        "threads": threads,
        "runs": runs,
        "times": {n: summary(t) for n, t in times.items()},
        "ratios": {n: round(float(np.median(r)), 3) for n, r in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Times ScoreCAM++ beside pytorch-grad-cam's ScoreCAM.")
    parser.add_argument("--models", nargs="+", default=["mobilenet", "resnet18"], choices=["mobilenet", "resnet18"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = [measure(name, arguments.threads, arguments.runs) for name in arguments.models]
    report = {"machine": machine(), "versions": versions("grad-cam"), "results": results}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for result in results:
        print(
            f"{result['model']}: {result['masked_runs']} of {result['channels']} masks run, map within "
            f"{result['distance_from_peer']:.0e} of the peer's, {arguments.threads} threads, {report['machine']['cpu']}"
        )
        print_times(result["times"], result["ratios"])


if __name__ == "__main__":
    main()
