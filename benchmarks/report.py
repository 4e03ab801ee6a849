"""Writes docs/benchmarks.md, docs/reliability.md and docs/models.md from the JSON files beside them, which peers.py,
reliability.py and zoo/measure.py write.

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
    text = """# camrt beside the public implementations

Made by `make peers`, which installs the other implementations into an environment of their own, runs
`benchmarks/peers.py` and writes this page from `docs/benchmarks.json`.

The same network, images and machine, in one run. Before anything is timed, every implementation's map is compared with
camrt's, both scaled by min-max; where the definition is the same they must agree within 1e-3 on every image, and the
table says how near they are. Winsor-CAM reads the gradients of all convolutions, and in a deep network with random
weights some rectifier's input is always within rounding of zero: there the limit is twice the distance of PyTorch's
own float32 maps, of images that differ in their last bits, from its float64 map, if that is more, and the table has
that distance as well. Then the contenders take turns on the same image, one image a call, from the preprocessed array
to the map in the image's size. Times are medians over the turns, in milliseconds, with quartiles; the last column is
the median of each turn's ratio, more than 1 where camrt is faster. Everything is float32.

Each implementation is used as its documentation shows it. OpenVINO XAI adds its branch to the same ONNX file that
camrt's bundle is made from, asked for float32 and for low latency; its branch computes the maps of all classes at
once. ScoreCAM++ stands in Score-CAM's table because no other package has it. `resnet50` and `mobilenet_v3_small` are
torchvision's with random weights and warmed-up batch norm, which changes no arithmetic; `mobilenet` is a MobileNet v1
of width 0.25 with its ImageNet weights, on photographs. Layers: all convolutions for Winsor-CAM, the last block for
the rest.

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
                text += f"\n{row['library']}'s {row['name']} is another definition: it {row['differs']}.\n"
    if found["left_out"]:
        text += "\n## Left out\n\n" + "".join(f"- {reason}\n" for reason in found["left_out"])
    return text


def _row(row: dict[str, Any]) -> list[str]:
    times = ["", "", row.get("problem", "")]
    if "median_ms" in row:
        low, high = row["quartiles_ms"]
        times = [f"{row['median_ms']:.1f}", f"{low:.1f} to {high:.1f}", f"{row['times_camrt']:.2f}"]
    distance = f"{row['distance']:.0e}" if "distance" in row else ""
    if row.get("spread", 0) > 1e-3 / 2:
        distance += f" (PyTorch from itself: {row['spread']:.0e})"
    return [f"{row['library']} `{row['name']}`", *times[:2], distance, times[2]]


def reliability(found: dict[str, Any]) -> str:
    """docs/reliability.md."""
    fuzz, soak, kill, networks = (found[part] for part in ("fuzz", "soak", "kill", "networks"))
    text = """# What was done to break camrt

Each part is one command of `benchmarks/reliability.py`, which writes its numbers into `docs/reliability.json`; this
page is made of that file by `python benchmarks/report.py`. All of it ran on the CPU.

"""
    text += "## Random networks\n\n"
    text += f"`python benchmarks/reliability.py networks --examples {networks['examples']}`\n\n"
    text += f"""Hypothesis draws small networks of all operators that have a gradient rule. Each is exported, and its
    gradient program is compared with PyTorch's autograd, both in float64, within 1e-4 (each operator alone is held to
    1e-9 by tests/test_vjp.py), and run by ONNX Runtime. {networks["examples"]} networks in {_time(networks)}:
    {_said(networks)}.

## Damaged files

`python benchmarks/reliability.py fuzz --inputs {fuzz["inputs"]}`

Bytes of manifests, of programs, of ONNX models and of pictures in ten formats are changed, put in, taken out or
doubled; values of manifests are exchanged for others, and models changed in ways that leave them readable: operators,
attributes, wiring, shapes, types, weights' places, versions, nested graphs. A changed program has its hash in the
manifest, as whoever means harm would write it. Every input runs in a child process. It must be refused by a one-line
message, or be explained by maps without NaN or infinity. The death of the process, 20 seconds without an end, 6 GiB of
address space, or any other exception is a finding.

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

{soak["processes"]} processes of {soak["threads_each"]} threads share the work, the threads of a process one explainer:
eight methods, one picture or two, retuned and drawn. Every map is compared with that of the same call when the process
had one thread: the largest difference was {soak["largest_difference"]:.0e}. Memory is noted 40 times; between the
second and the last quarter the processes' medians changed by {
        " and ".join(f"{100 * g:+.1f} %" for g in soak["growth"])
    }, at {" and ".join(f"{m[-1]:.0f} MB" for m in soak["memory_mb"])}. {soak["explanations"]} explanations
in {_time(soak)}: {_said(soak)}.

## Killed and run again

`python benchmarks/reliability.py kill --rounds {kill["rounds"]}`

`kill -9` at random moments; half of them follow within 30 ms on the moment when the command begins to write. After
each kill of an export the bundle that was there, or the new one, must load and give the same logits, and after each
kill of a build no engine may be damaged. At the end each command must run through, and leave what it leaves
undisturbed: one bundle and no other folder, all engines, the same records once each.

"""
    text += table(
        ["", "kills", "of them while it wrote"],
        [
            [name, str(n["kills"]), str(n["of_them_while_writing"])] if "kills" in n else [name, n["left_out"], ""]
            for name, n in kill["commands"].items()
        ],
    )
    text += f"\n{_said(kill).capitalize()}.\n"
    text += """
## Hostile bundles

`python -m pytest tests/test_hostile.py`: weights outside the folder, absolute paths, links and pipes, gigantic shapes,
operators of other domains, nested subgraphs and functions, manifests that contradict themselves or trap their reader.
Each is refused before an engine reads it. What is not: a chain of operators that computes something huge from
something small.

## Determinism

`python -m pytest tests/test_determinism.py`: on the CPU backend the same input gives the same bits, in any batch it
travels in maps within 1e-6, and on any number of threads within 1e-5, for every method on the demo's network.

## Coverage

"""
    covered = found["coverage"]
    text += f"""`make coverage`: the tests run {covered["percent"]:.1f} % of the {covered["statements"]} statements of
    the packages. Without what only a GPU runs, the side of the kernels that calls PyCUDA, it is
    {covered["percent_without_gpu"]:.1f} %.

"""
    text += f"{machine(found['fuzz'] | {'threads': 2})}.\n"
    return text


def _said(part: dict[str, Any]) -> str:
    return f"{len(part['findings'])} findings" if part["findings"] else "nothing was found"


def _time(part: dict[str, Any]) -> str:
    return f"{part['seconds']} seconds" if part["seconds"] < 120 else f"{part['seconds'] / 60:.0f} minutes"


def models(found: list[dict[str, Any]]) -> str:
    """docs/models.md."""
    text = """# Which models get in

Made by `make models`, which writes the networks below with the exporters that users have, exports each with camrt,
verifies the bundle, and writes this page from `docs/models.json`. Weights are random; networks are small
configurations where the family has them. *Passes* means that every comparison of `camrt verify` passed: logits of the
untouched file in ONNX Runtime, and activations, gradients and maps beside float64 autograd.

## What is read

- **ONNX files** from opset 9 on, of any exporter: a network in ONNX's own operators, with one image in and one score
  for each class out. What the constants, the image's size and a free batch determine is computed at export. A batch
  that was traced as 1 (or another fixed number) is freed; where it cannot be, or where the images of a batch change
  one another, the bundle says batch 1 and a warning names the node. Free height and width need `--input-shape`.
- **PyTorch modules** that `torch.export` traces, in float32 or any other precision; wrapped by DataParallel or
  torch.compile; returning a tensor, or a dict, tuple or dataclass with `--output`. Hugging Face image classifiers by
  `hf:FOLDER`.
- **Precisions**: float16, bfloat16 and float64 are read as float32, with a warning. Quantised files compute their
  forward pass as deployed; gradients pass straight through the rounding and are zero where the range clips, as
  PyTorch's fake_quantize has them. Integer operators become QuantizeLinear and DequantizeLinear; dynamic quantisation
  takes its scales from all images of a batch, and so has batch 1.
- **Heads**: (N, C), (N, C, 1, 1), (N,) and (N, 1). A final Softmax, Sigmoid or LogSoftmax is set aside, also where it
  is written out. What merely looks like probabilities is exported with a warning that says what it does to maps.
  Without any of these a softmax is assumed and said; `--activation sigmoid` says otherwise.
- **Preprocessing inside the graph** keeps its layers. Masks multiply what the first layer reads, not raw pixels:
  `camrt info` says where that is.

## What is refused, by name

Custom operators, those that ONNX Runtime's optimiser wrote, what a converter left over, control flow that depends on
the image's numbers, sequences, several image inputs, outputs that are not one score for each class, integer operators
without an exact form, TorchScript, files in training mode, networks that pad or crop their picture by more than a
twentieth before they read it (a map of the padded canvas would not lie over the picture: let the recipe pad or crop),
and PyTorch models that write through `detach()` or change gradients by hooks.

## What a graph cannot know

Stop-gradient (`detach`, straight-through estimators) is part of PyTorch's gradient and absent from an ONNX file:
exported from PyTorch it is honoured, with a warning; from an ONNX file the gradient is that of the forward pass. A
`torch.autograd.Function` with a backward pass of its own is differentiated through its forward pass, with a warning
that names it.

Which of several equal elements is the largest: `max_pool2d`, `adaptive_max_pool2d` and `max(dim)` give the gradient to
the first, `amax` shares it. From PyTorch each is kept; an ONNX file writes `max(dim)` and `amax` alike (ReduceMax),
and there it is shared.

## The last layer

The role "last" belongs to the last tensor on a spatial grid that the logits read before the grid is pooled or
flattened, behind its batch norm and activation; of tokens that only a class token reads, the norm before the last
attention. It is found in the graph, so that PyTorch and ONNX give the same. All that the logits read of the image
passes it: a gate beside the trunk is no last layer. Where there is no such tensor, or a later tensor's positions
cannot be followed, no layer takes the role, and a warning says so. Of a head that reads two levels of the trunk the
shallower carries all, and a warning names the deeper. Tokens may lie behind the batch or before it, as CLIP's do.

"""
    text += table(["torchvision", "camrt's default", "pytorch-grad-cam's documentation"], LAST_LAYERS)
    text += "\n## The networks\n\n"
    good = [r for r in found if "refused" not in r and not r["failed"]]
    free = [r for r in good if r["batch"] == "dynamic"]
    text += (
        f"{len(good)} of {len(found)} get in and pass, {len(free)} of them with a free batch. A comparison that fails "
        "is listed "
    )
    text += (
        "with its distance from float64 and that of PyTorch's own float32: maps of a network with random weights may "
        "cancel out.\n\n"
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


# of the networks in tests/families.py, whose tests hold camrt's side
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
PAGES: dict[str, Callable[[Any], str]] = {"benchmarks": benchmarks, "reliability": reliability, "models": models}


def pages() -> dict[Path, str]:
    """What each page must say, by its file."""
    return {
        DOCS / f"{name}.md": write(json.loads((DOCS / f"{name}.json").read_text())) for name, write in PAGES.items()
    }


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text)
