"""Writes docs/benchmarks.md, compiled.md, reliability.md and models.md from the JSON files of the same names, which
peers.py, compiled.py, reliability.py and zoo/measure.py write.

python benchmarks/report.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(found: dict[str, Any]) -> str:
    said = [f"{found['machine']['cpu']}, {found['threads']} threads", f"Python {found['machine']['python']}"]
    return ", ".join([*said, *(f"{name} {version}" for name, version in found["versions"].items())])


def benchmarks(found: dict[str, Any]) -> str:
    """docs/benchmarks.md."""
    text = """# camrt and the public implementations

`make peers` installs the other implementations into a separate environment, runs `benchmarks/peers.py` and writes this
page from `docs/benchmarks.json`.

All implementations have the same network, images and machine, in one run. Before anything is timed, every
implementation's map is compared with camrt's, both scaled by min-max. If the definition is the same, they must agree
within 1e-3 on every image, and the table shows the largest difference. Winsor-CAM has another limit, because it reads
the gradients of all convolutions: in a deep network with random weights the input of some rectifier (ReLU) is always
nearly zero, so rounding decides whether it is on or off. Its limit is twice the distance between PyTorch's own float32
maps, of images that differ in their last bits, and its float64 map, if that is more than 1e-3; the table shows that
distance too. Then the implementations take turns on the same image. Each call has one image, and is timed from the
preprocessed array to the map in the image's size. Times are medians over the turns, in milliseconds, with quartiles.
The last column is the median over the turns of the implementation's time divided by camrt's: above 1, camrt is faster.
Before each call there is a tenth of a second without work, as between a service's requests.
Everything is float32.

Each implementation is used as its documentation shows. OpenVINO XAI adds its branch to the same ONNX file that camrt's
bundle is made from, set to float32 and low latency; its branch computes the maps of all classes at once. ScoreCAM++ is
in Score-CAM's table because no other package has it. `resnet50`, `resnet18` and `mobilenet_v3_small` are torchvision's,
with random weights and batch norm statistics of random images; this does not change the amount of arithmetic.
`mobilenet` is a MobileNet v1 of width 0.25 with its ImageNet weights, on photographs. Layers: all convolutions for
Winsor-CAM, the last block for the other methods.

"""
    text += f"{machine(found)}.\n"
    for result in found["results"]:
        text += f"\n## {result['model']}, `{result['method']}`\n\n"
        text += f"{result['images']} images, {result['turns']} turns.\n\n"
        text += table(
            ["implementation", "ms", "quartiles", "largest difference from camrt", "its time / camrt's"],
            [_row(row) for row in result["rows"]],
        )
        for row in result["rows"]:
            if row["library"] != "camrt" and "differs" in row:
                text += f"\n{row['library']}'s {row['name']} has another definition: it {row['differs']}.\n"
    if found["left_out"]:
        text += "\n## Skipped\n\n" + "".join(f"- {reason}\n" for reason in found["left_out"])
    return text


def _row(row: dict[str, Any]) -> list[str]:
    times = ["", "", row.get("problem", "")]
    if "median_ms" in row:
        low, high = row["quartiles_ms"]
        times = [f"{row['median_ms']:.1f}", f"{low:.1f} to {high:.1f}", f"{row['times_camrt']:.2f}"]
    distance = f"{row['distance']:.0e}" if "distance" in row else ""
    if row.get("spread", 0) > 1e-3 / 2:
        distance += f" (PyTorch float32 from float64: {row['spread']:.0e})"
    return [f"{row['library']} `{row['name']}`", *times[:2], distance, times[2]]


def reliability(found: dict[str, Any]) -> str:
    """docs/reliability.md."""
    fuzz, soak, kill, networks = (found[part] for part in ("fuzz", "soak", "kill", "networks"))
    text = """# How we tried to break camrt

Each part is one command of `benchmarks/reliability.py`, which writes its numbers into `docs/reliability.json`;
`python benchmarks/report.py` makes this page from that file. Everything ran on the CPU.

"""
    text += "## Random networks\n\n"
    text += f"`python benchmarks/reliability.py networks --examples {networks['examples']}`\n\n"
    text += f"""Hypothesis makes small random networks of all operators that have a gradient rule. Each is exported; its
    gradient program is compared with PyTorch's autograd, both in float64, with a limit of 1e-4, and ONNX Runtime runs
    it. (tests/test_vjp.py compares each operator alone, with a limit of 1e-9.) {networks["examples"]} networks in
    {_time(networks)}: {_said(networks)}.

## Damaged files

`python benchmarks/reliability.py fuzz --inputs {fuzz["inputs"]}`

In manifests, programs, ONNX models and pictures of ten formats, bytes are changed, inserted, removed or repeated.
Values of manifests are replaced by others. Models are also changed so that they stay readable: operators, attributes,
wiring, shapes, types, places of weights, versions, nested graphs. The manifest gets the hash of a changed program, as
an attacker would write it. Every input runs in a child process. It must be refused with a one-line message, or be
explained with maps without NaN or infinity. A finding is: the process dies, it needs more than 20 seconds or 6 GiB of
address space, or any other exception is raised.

"""
    text += table(
        ["", "inputs", "refused", "explained"],
        [
            [kind, str(sum(n.values())), str(n["refused"]), str(n["explained"])]
            for kind, n in sorted(fuzz["kinds"].items())
        ],
    )
    text += f"\n{fuzz['inputs']} inputs in {_time(fuzz)}: {_said(fuzz)}.\n\n"
    text += f"""## Ten thousand explanations

`python benchmarks/reliability.py soak --explanations {soak["explanations"]}`

{soak["processes"]} processes with {soak["threads_each"]} threads each share the work; the threads of a process use one
explainer. The calls use seven methods and one or two pictures; some are retuned, some are drawn. Every map is compared
with the map of the same call from before the threads started: the largest difference was
{soak["largest_difference"]:.0e}. Each process measures its memory about 40 times; from the second to the last quarter
of the run the median memory of each process changed by {
        " and ".join(f"{100 * g:+.1f} %" for g in soak["growth"])
    }, at {" and ".join(f"{m[-1]:.0f} MB" for m in soak["memory_mb"])}. {soak["explanations"]} explanations
in {_time(soak)}: {_said(soak)}.

## Killed and run again

`python benchmarks/reliability.py kill --rounds {kill["rounds"]}`

Each command gets `kill -9` at random moments; half of the kills come within 30 ms after the command starts to write.
After each kill of an export, the old or the new bundle must load and give the same logits; after each kill of a build,
no engine may be damaged. At the end each command runs without a kill. It must then leave the same as a run that was
never killed: one bundle and no other folder, all engines, each record once.

"""
    text += table(
        ["", "kills", "while it was writing"],
        [
            [name, str(n["kills"]), str(n["of_them_while_writing"])] if "kills" in n else [name, n["left_out"], ""]
            for name, n in kill["commands"].items()
        ],
    )
    text += f"\n{_said(kill).capitalize()}.\n"
    text += """
## Hostile bundles

`python -m pytest tests/test_hostile.py`: weights outside the folder, absolute paths, links and pipes, gigantic shapes,
operators of other domains, nested subgraphs and functions, manifests that contradict themselves or attack the parser.
Each is refused before an engine reads it. One attack is not refused: a chain of operators that computes a huge tensor
from a small one.

## Determinism

`python -m pytest tests/test_determinism.py`, with every method and the demo's network, on the CPU backend: the same
input gives the same bits. In another batch its maps differ by at most 1e-6, and with another number of threads by at
most 1e-5.

## Coverage

"""
    covered = found["coverage"]
    text += f"""`make coverage`: the tests run {covered["percent"]:.1f} % of the {covered["statements"]} statements of
    the packages. Without the files that call PyCUDA, which need a GPU, it is {covered["percent_without_gpu"]:.1f} %.

"""
    text += f"{machine(found['fuzz'] | {'threads': 2})}.\n"
    return text


def _said(part: dict[str, Any]) -> str:
    return f"{len(part['findings'])} findings" if part["findings"] else "nothing was found"


def _time(part: dict[str, Any]) -> str:
    return f"{part['seconds']} seconds" if part["seconds"] < 120 else f"{part['seconds'] / 60:.0f} minutes"


def models(found: list[dict[str, Any]]) -> str:
    """docs/models.md."""
    text = """# Which models camrt can export

`make models` writes the networks below with the exporters that users have, exports each with camrt, verifies the
bundle, and writes this page from `docs/models.json`. Weights are random; networks are small configurations if the
family has them. *Passes* means that every comparison of `camrt verify` passed: the logits are compared with the
original file in ONNX Runtime; activations, gradients and maps with float64 autograd.

## What camrt accepts

- **ONNX files** from opset 9 on, from any exporter: a network of standard ONNX operators, with one image as input and
  one score for each class as output. Everything that depends only on constants and on the image's size is computed at
  export. A batch that was traced as 1 (or another fixed number) is made free. If this is impossible, or if the images
  of a batch influence each other, the bundle has batch 1 and a warning names the node. A free height or width needs
  `--input-shape`.
- **PyTorch modules** that `torch.export` can trace, in float32 or any other precision, also inside DataParallel or
  torch.compile. They return a tensor; or a dict, tuple or dataclass, with `--output`. Hugging Face image classifiers:
  `hf:FOLDER`.
- **Precisions**: float16, bfloat16 and float64 are read as float32, with a warning. A quantised file keeps its
  quantised forward pass. Its gradients ignore the rounding and are zero where a value is clipped, as in PyTorch's
  fake_quantize. Integer operators become QuantizeLinear and DequantizeLinear. Dynamic quantisation computes its scales
  from all images of a batch, so the bundle has batch 1.
- **Heads**: (N, C), (N, C, 1, 1), (N,) and (N, 1). A final Softmax, Sigmoid or LogSoftmax is removed, also if it is
  written as simpler operators. Other outputs that look like probabilities are exported, with a warning about the effect
  on maps. Otherwise camrt assumes a softmax and says so; `--activation sigmoid` changes that.
- **Preprocessing inside the graph** stays there. Masks then multiply the tensor that the first layer reads, not raw
  pixels: `camrt info` names this tensor.

## What camrt refuses, with a reason

Custom operators, operators that ONNX Runtime's optimiser wrote, leftovers of a converter, control flow that depends on
the image's numbers, sequences, several image inputs, outputs that are not one score for each class, integer operators
without an exact float form, TorchScript, files in training mode, networks that pad or crop their picture by more than
5 % before the first layer (their maps would not fit the picture: let the recipe pad or crop), and PyTorch models that
write through `detach()` or change gradients with hooks.

## What an ONNX file does not record

Stop-gradients (`detach`, straight-through estimators) change PyTorch's gradient, but an ONNX file does not contain
them. An export from PyTorch keeps them, with a warning; from an ONNX file, the gradient is the derivative of the
forward pass. A `torch.autograd.Function` with its own backward pass is differentiated through its forward pass, with a
warning that names it.

Ties for the largest element: `max_pool2d`, `adaptive_max_pool2d` and `max(dim)` give the gradient to the first of the
equal elements; `amax` divides it among them. An export from PyTorch keeps this difference. In an ONNX file, `max(dim)`
and `amax` are the same operator (ReduceMax), so the gradient is divided.

## The last layer

The role "last" belongs to the last tensor on a spatial grid, after its batch norm and activation, that the logits read
before the grid is pooled or flattened. If the logits read only a class token, it is the norm before the last attention.
camrt finds it in the graph, so PyTorch and ONNX give the same layer. Everything that the logits read of the image
passes through it: a gate beside the trunk is not the last layer. If there is no such tensor, or camrt cannot follow the
positions of a later tensor, no layer has the role, and a warning says so. If a head reads two levels of the trunk, the
shallower level has the role, and a warning names the deeper one. Tokens may be (batch, token, channel), or (token,
batch, channel) as in CLIP.

"""
    text += table(["torchvision", "camrt's default", "pytorch-grad-cam's documentation"], LAST_LAYERS)
    text += "\n## The networks\n\n"
    good = [r for r in found if "refused" not in r and not r["failed"]]
    free = [r for r in good if r["batch"] == "dynamic"]
    text += (
        f"{len(good)} of {len(found)} are exported and pass, {len(free)} of them with a free batch. A comparison that "
        "fails is listed "
    )
    text += (
        "with its distance from float64 and that of PyTorch's own float32: in a network with random weights, the terms "
        "of a map may cancel out.\n\n"
    )
    text += table(
        ["network", "exporter", "opset", "batch in the file", "batch", "last layer", "result"], map(_model, found)
    )
    return text


def _model(row: dict[str, Any]) -> list[str]:
    if "refused" in row:
        result = row["refused"].replace("|", "/")
    else:
        said = [w for w in row["said"] if "precision" not in w]
        result = (
            f"{row['comparisons']} comparisons, {len(row['failed'])} fail: {', '.join(row['failed'])}"
            if row["failed"]
            else f"passes ({row['comparisons']})"
        )
        result += "".join(f"; {w.replace('|', '/')}" for w in said)
    opset, batch = (str(row.get(key) or "") for key in ("opset", "batch_in_file"))
    given = "free" if row.get("batch") == "dynamic" else str(row.get("batch", ""))
    last = f"`{row['last']}`" if row.get("last") else ""
    return [row["network"], row["exporter"], opset, batch, given, last, result]


# the networks of tests/families.py; tests check camrt's column
LAST_LAYERS = [
    ["AlexNet", "`features` (the last MaxPool)", "not named"],
    ["VGG", "`features` (the last MaxPool)", "`features[-1]`: the same tensor"],
    ["ResNet, ResNeXt, Wide ResNet", "`layer4`'s last block", "`layer4[-1]`: the same tensor"],
    ["DenseNet", "`relu`, the function behind `features`", "`features[-1]`: the batch norm before that rectifier"],
    ["GoogLeNet", "`inception5b`", "not named"],
    ["Inception v3", "`Mixed_7c`", "not named"],
    ["SqueezeNet", "`classifier.2`, a map for each class", "not named"],
    ["ShuffleNet v2", "`conv5`", "not named"],
    ["MobileNet v2 and v3", "the last block of `features`", "`features[-1]`: the same tensor"],
    ["MNASNet", "`layers`", "`layers[-1]`: the same tensor"],
    ["EfficientNet, EfficientNet v2", "the last block of `features`", "not named"],
    ["RegNet", "the last block of `trunk_output`", "not named"],
    ["ConvNeXt", "the last block of `features`", "not named"],
    ["ViT, DeiT", "the last block's first norm", "`blocks[-1].norm1`: the same tensor"],
    [
        "Swin, Swin v2",
        "`norm`, behind the last block",
        "`layers[-1].blocks[-1].norm1`: a norm inside that block, before its attention",
    ],
]


def compiled(found: dict[str, Any]) -> str:
    """docs/compiled.md."""
    text = """# Compiled files and the page, measured

`python benchmarks/compiled.py --out docs/compiled.json` writes these figures, `python benchmarks/report.py` this page.

A compiled file and `explain` take turns on the same image, each on one thread of the same engine, from the preprocessed
array to the map; times are medians. The last column is the file's time divided by `explain`'s: below 1, the file is
faster, since nothing of it runs in Python. ScoreCAM++ is slower in a file: `explain` leaves out channels that are zero
everywhere, a file runs them all. *Engines* are what TensorRT for RTX builds of the file without a GPU, for compute
capability 8.9 and up to 4 images; they have not run. `mobilenet_v3_small` and `resnet50` are torchvision's, with random
weights; `shapes` is the demo's.

"""
    text += f"{machine(found)}.\n\n"
    rows = []
    for result in found["results"]:
        for row in result["rows"]:
            sizes = (f"{p} {_megabytes(n)}" if isinstance(n, int) else f"{p} no" for p, n in row["engines"].items())
            times = (f"{row[name]['median_ms']:.1f}" for name in ("explain", "file"))
            rows.append([result["model"], f"`{row['method']}`", _megabytes(row["bytes"]), ", ".join(sizes)])
            rows[-1] += [f"{row['difference']:.0e}", *times, f"{row['file_by_explain']:.2f}"]
    text += table(
        ["network", "method", "file", "engines", "largest difference", "`explain`, ms", "file, ms", "ratio"], rows
    )
    text += (
        "\n## The page\n\nWinsor-CAM in a browser, with onnxruntime-web. The largest difference is from Python's map, "
    )
    text += "after min-max. In a deep network with random weights (`resnet50`) the input of some rectifier is nearly "
    text += "zero, and the side on which it falls moves the map.\n\n"
    rows = []
    for result in found["results"]:
        page = result["page"]
        threads = f"{page['engine']['provider']}, {page['engine']['threads']} threads"
        times = [f"{page['network_ms']:.0f}", f"{page['retune_ms']:.1f}"]
        rows.append(
            [result["model"], page["browser"], threads, _megabytes(page["bytes"]), f"{page['difference']:.0e}", *times]
        )
    head = ["network", "browser", "engine", "page", "largest difference", "network, ms", "retune, ms"]
    return text + table(head, rows)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


PAGES: dict[str, Callable[[Any], str]] = {
    "benchmarks": benchmarks,
    "compiled": compiled,
    "models": models,
    "reliability": reliability,
}


def pages() -> dict[Path, str]:
    """File of each page -> its text."""
    return {
        DOCS / f"{name}.md": write(json.loads((DOCS / f"{name}.json").read_text())) for name, write in PAGES.items()
    }


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text)
