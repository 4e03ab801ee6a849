"""Times the host's part of explanations on a GPU, without a GPU: on the tests' stand-in for the driver, nothing runs.

python benchmarks/host_time.py [--calls 300] [--out host_time.json]

What is left is Python's own work: checks, launches, copies, memory. ResNet-50 with random weights and 224 x 224 pixels;
its bundle is exported once, into build/host_time. Needs what `make test` installs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import standin

FOLDER = standin.ROOT / "build" / "host_time"
SHAPE = (3, 224, 224)


def prepare() -> Path:
    """The bundle's path; the stand-in lies beside it."""
    path = FOLDER / "resnet50.camrt"
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        from common import build

        import camrt

        camrt.export_model(build("resnet50", SHAPE[1]), path, SHAPE)
    standin.compile_driver(FOLDER)
    return path


class NoEngine:
    """Takes no time."""

    def enqueue(self, inputs: Any, outputs: Any) -> None: ...


class NoBackend(standin.StandinBackend):
    """A GPU whose engines do nothing."""

    def open(self, bundle: Any, program: Any, concurrent: bool = False) -> Any:
        from camrt.runtime.backends.gpu import GpuProgram

        return GpuProgram(program, NoEngine(), self.gpu)


def microseconds(call: Callable[[], Any], calls: int) -> float:
    """Median over the calls."""
    times = []
    for _ in range(calls + 20):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e6 * float(np.median(times[20:]))


def measure(path: Path, calls: int) -> dict[str, float]:
    from camrt import Explainer, kernels
    from camrt.runtime.bundle.reading import read_bundle

    control = standin.install()
    control.do_nothing()
    explainer = Explainer(read_bundle(path), NoBackend(), max_batch=64)  # type: ignore[arg-type]
    stream = explainer.session.memory.stream
    assert stream is not None
    image = np.random.default_rng(0).standard_normal((1, *SHAPE), np.float32)
    activations, picture = stream.empty((16, 7, 7)), stream.empty(SHAPE)
    out, scores = stream.empty((16, *SHAPE)), stream.empty((1, 16))
    total = stream.empty((1, *SHAPE[1:]))

    def waits(call: Callable[[], Any]) -> float:
        before = control.calls("cuStreamSynchronize")
        call()
        return float(control.calls("cuStreamSynchronize") - before)

    def winsor() -> Any:
        return explainer.explain(image, "winsor_cam", 5)

    def score() -> Any:
        return explainer.explain(image, "score_cam_pp", 5)

    explained = winsor()
    found = {
        "mask_batch, one launch (us)": microseconds(
            lambda: kernels.mask_batch(picture, activations, out=out, stream=stream), calls
        ),
        "accumulate_maps, two launches (us)": microseconds(
            lambda: kernels.accumulate_maps(total, scores, activations, stream=stream), calls
        ),
        "winsor_cam, replayed (us)": microseconds(winsor, calls),
        "winsor_cam, waits": waits(winsor),
        "winsor_cam, retune (us)": microseconds(lambda: explained.retune(percentile=60), calls),
        "score_cam_pp of 2048 masks (us)": microseconds(score, max(5, calls // 20)),
        "score_cam_pp of 2048 masks, waits": waits(score),
    }
    assert int(score().details["masked_runs"][0]) == 2048
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--out", type=Path, default=FOLDER / "host_time.json")
    arguments = parser.parse_args()
    path = FOLDER / "resnet50.camrt"
    if "STANDIN" not in os.environ:
        prepare()
        raise SystemExit(subprocess.call([sys.executable, *sys.argv], env=standin.environment(FOLDER, "eager")))
    found = measure(path, arguments.calls)
    for name, value in found.items():
        print(f"{name:40} {value:10.1f}")
    arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
