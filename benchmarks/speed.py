"""What a map of Winsor-CAM costs beside a forward pass of the same network, on this CPU. Writes docs/speed.md.

python benchmarks/speed.py [--networks resnet50,...] [--threads 1,2] [--blocks 9] [--beside CHECKOUT] [--page]

--beside: a checkout of an earlier commit, measured in turns with this one. --page: writes docs/speed.json and the page
from it. Needs the test extra; with all networks beside a checkout it takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
NETWORKS = (
    "resnet50", "resnet18", "vgg16", "densenet121", "inception_v3", "mobilenet_v2", "efficientnet_b0",
)  # fmt: skip
METHODS = {"Winsor-CAM": ("winsor_cam", "conv"), "Grad-CAM": ("grad_cam", "last")}
SECONDS = 0.4  # of one loop
PAGE = """# What a map costs on a CPU

`python benchmarks/speed.py --page` writes this page. The networks are torchvision's with random weights and batch norm
statistics of random images, which does not change the amount of arithmetic; 224 x 224, Inception v3 299 x 299, batch 1,
every convolution a layer. A process of its own loads the bundle and has nothing else in it; in a block it loops over
`classify`, then over `explain`, {seconds} seconds each, float array in, map out. Times are the medians of the loops'
medians over {blocks} blocks, in milliseconds; a ratio is the median over the blocks of explain over classify, and in
brackets that of the quietest quarter of the blocks, those whose `classify` was quickest.

{machine}.

"""
BESIDE = """Before: commit {commit}, measured in the same run; processes of the two take turns, block after block. The
last column is the largest difference of their maps after min-max.

"""
OPERATORS = """
## Where the time goes

Operators of the program that gives all layers' maps, one thread, as ONNX Runtime's profile counts them, in percent of
its time. *masks* are depthwise 1 x 1 convolutions that stand for comparisons, so that maps stay in the blocked layout
of the convolutions; *layout* is what enters and leaves it. The last column is the time of the convolutions alone over
that of the whole forward program: a floor for the ratio of this program.

"""


def size_of(network: str) -> int:
    return 299 if network == "inception_v3" else 224


@contextmanager
def package(checkout: Path) -> Iterator[Path]:
    """A folder with the package `camrt` of a checkout, to go before the installed one."""
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder, "camrt")
        inside.mkdir()
        parts = [checkout / name for name in ("export", "runtime", "kernels")]
        for part in (*(checkout / "camrt").iterdir(), *parts):
            (inside / part.name).symlink_to(part)
        yield Path(folder)


class Process:
    """This file in a process of its own, with one checkout's package, that measures block after block."""

    def __init__(self, folder: Path, bundle: Path, network: str, threads: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-W", "ignore", __file__, "--inside", str(bundle), network, str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, question: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        while (answer := self._process.stdout.readline()) and not answer.startswith("answer "):
            pass
        if not answer:
            raise SystemExit(f"a process ended at {question!r}")
        return json.loads(answer.removeprefix("answer "))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def export(folder: Path, bundle: Path, network: str) -> None:
    """In a process of its own, whose memory goes with it."""
    shape = 3, size_of(network), size_of(network)
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}]
import torch
from support import import_torchvision, warmed_up
import camrt
torch.manual_seed(0)
model = import_torchvision().models.get_model({network!r}, weights=None)
camrt.export_model(warmed_up(model, {shape}), {str(bundle)!r}, {shape})
"""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(command, check=True, cwd=folder, env=environment, stderr=subprocess.DEVNULL)


def inside(bundle: str, network: str, threads: int) -> None:
    """Answers questions: "map": the map; "METHOD": seconds of classify and of explain; "operators": their times."""
    import camrt

    explainer = camrt.load(bundle, "onnxruntime", threads=threads)
    image = np.random.default_rng(0).random((1, 3, size_of(network), size_of(network)), np.float32)
    target = int(explainer.classify(image).argmax())
    for question in map(str.strip, sys.stdin):
        if question == "map":
            answer: Any = explainer.explain(image, "winsor_cam", target).normalized().tolist()
        elif question == "operators":
            answer = operators(explainer, image)
        else:
            method, layers = METHODS[question]
            answer = [
                timed(lambda: explainer.classify(image)),
                timed(lambda m=method, names=layers: explainer.explain(image, m, target, names)),
            ]
        print("answer " + json.dumps(answer), flush=True)


def timed(work: Callable[[], Any]) -> float:
    """The median of the calls in a loop."""
    work()
    times, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 3:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def operators(explainer: Any, image: np.ndarray) -> dict[str, dict[str, float]]:
    """Seconds of each operator in a run of the classify and the layer_maps program, by program, on one thread."""
    import onnxruntime

    from camrt.runtime.backends.ort import OrtBackend

    class Profiling:
        __version__ = onnxruntime.__version__
        InferenceSession = onnxruntime.InferenceSession

        @staticmethod
        def SessionOptions() -> Any:
            options = onnxruntime.SessionOptions()
            options.enable_profiling = True
            options.profile_file_prefix = str(explainer.bundle.path / "profile")
            return options

    bundle, found = explainer.bundle, {}
    names = [t.name for t in explainer.manifest.taps if "conv" in t.roles]
    for program in (bundle.program("classify"), bundle.program("layer_maps", names)):
        session = OrtBackend(Profiling, 1).session(bundle.file(program), single=True)
        feeds = {"image": image, "seed": np.zeros((1, explainer.manifest.num_classes), np.float32)}
        for _ in range(20):
            session.run(None, {name: feeds[name] for name in program.inputs})
        profile = Path(session.end_profiling())
        found[program.kind] = _by_group(json.loads(profile.read_text()))
        profile.unlink()
    return found


def _by_group(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of each node the median of its runs, summed by group of operators."""
    nodes: dict[str, list[float]] = {}
    groups: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes.setdefault(event["name"], []).append(event["dur"] / 1e6)
            groups[event["name"]] = _group(event["args"])
    found: dict[str, float] = {}
    for name, times in nodes.items():
        found[groups[name]] = found.get(groups[name], 0) + float(np.median(times))
    return found


def _group(arguments: dict[str, Any]) -> str:
    kind = arguments["op_name"]
    if kind == "Conv":
        shapes = [next(iter(tensor.values())) for tensor in arguments["input_type_shape"]]
        return "masks" if shapes[1][1:] == [1, 1, 1] else "convolutions"
    if kind in ("ReorderInput", "ReorderOutput", "Transpose", "Reshape", "Concat", "Split", "Slice", "Pad", "Expand"):
        return "layout"
    if kind in ("MatMul", "Gemm", "FusedGemm", "GlobalAveragePool"):
        return "products and means"
    return "elementwise"


def measure(network: str, threads: Sequence[int], blocks: int, checkouts: dict[str, Path]) -> dict[str, Any]:
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = {name: stack.enter_context(package(path)) for name, path in checkouts.items()}
        for name, folder in folders.items():
            export(folder, scratch / name, network)
        result: dict[str, Any] = {"network": network, "rows": []}
        for count in threads:
            processes = {name: Process(f, scratch / name, network, count) for name, f in folders.items()}
            maps = [np.array(process("map")) for process in processes.values()]
            result["difference"] = float(np.abs(maps[0] - maps[-1]).max())
            for method in METHODS:
                times: dict[str, list[list[float]]] = {name: [] for name in processes}
                for _ in range(blocks):
                    for name, process in processes.items():
                        times[name].append(process(method))
                row = {name: summary(np.array(found)) for name, found in times.items()}
                result["rows"].append({"threads": count, "method": method, **row})
                print(network, count, method, json.dumps(row), flush=True)
            if count == 1:
                result["operators"] = processes["now"]("operators")
            for process in processes.values():
                process.close()
    return result


def summary(times: np.ndarray) -> dict[str, float]:
    """times (blocks, 2): of classify and explain."""
    ratios = times[:, 1] / times[:, 0]
    quiet = np.argsort(times[:, 0])[: max(1, len(times) // 4)]
    return {
        "classify_ms": round(float(np.median(times[:, 0])) * 1e3, 2),
        "explain_ms": round(float(np.median(times[:, 1])) * 1e3, 2),
        "ratio": round(float(np.median(ratios)), 2),
        "quietest": round(float(np.median(ratios[quiet])), 2),
    }


def page(found: dict[str, Any]) -> str:
    """docs/speed.md."""
    from report import table

    text = PAGE.format(seconds=SECONDS, blocks=found["blocks"], machine=found["machine"])
    beside = "before" in found["results"][0]["rows"][0]
    text += BESIDE.format(commit=found["commit"]) if beside else ""
    for method in METHODS:
        head = ["network", "threads", "classify", "explain", "ratio"]
        head += ["explain before", "ratio before", "difference"] if beside else []
        rows = []
        for result in found["results"]:
            for row in (r for r in result["rows"] if r["method"] == method):
                now, before = row["now"], row.get("before")
                cells = [
                    result["network"],
                    str(row["threads"]),
                    f"{now['classify_ms']:.1f}",
                    f"{now['explain_ms']:.1f}",
                ]
                cells.append(f"{now['ratio']:.2f} ({now['quietest']:.2f})")
                if before is not None:
                    cells += [f"{before['explain_ms']:.1f}", f"{before['ratio']:.2f} ({before['quietest']:.2f})"]
                    cells.append(f"{result['difference']:.0e}")
                rows.append(cells)
        text += f"## {method}\n\n" + table(head, rows) + "\n"
    groups = ["convolutions", "masks", "layout", "elementwise", "products and means"]
    rows = []
    for result in found["results"]:
        classify, maps = (result["operators"][kind] for kind in ("classify", "layer_maps"))
        total = sum(maps.values())
        shares = [f"{100 * maps.get(group, 0) / total:.0f}" for group in groups]
        rows.append([result["network"], *shares, f"{maps['convolutions'] / sum(classify.values()):.2f}"])
    return text.rstrip("\n") + "\n" + OPERATORS + table(["network", *groups, "convolutions / forward"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times explanations beside forward passes.")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    from common import machine, versions

    checkouts = {"now": ROOT} | ({"before": arguments.beside.resolve()} if arguments.beside is not None else {})
    threads = [int(n) for n in arguments.threads.split(",")]
    results = [measure(n, threads, arguments.blocks, checkouts) for n in arguments.networks.split(",")]
    software = ", ".join(f"{name} {version}" for name, version in versions().items() if name != "torch")
    found: dict[str, Any] = {"blocks": arguments.blocks, "results": results}
    found["machine"] = f"{machine()['cpu']}, {os.cpu_count()} cores, Python {machine()['python']}, {software}"
    if arguments.beside is not None:
        command = ["git", "-C", str(arguments.beside), "rev-parse", "--short", "HEAD"]
        found["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if arguments.page:
        (ROOT / "docs" / "speed.json").write_text(json.dumps(found, indent=1) + "\n")
        (ROOT / "docs" / "speed.md").write_text(page(found))
    else:
        print(page(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
