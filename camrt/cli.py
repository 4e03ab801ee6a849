"""The command line: camrt export | recipe | info | build | cache | methods | explain | evaluate | verify | bench |
demo.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .runtime.errors import CamrtError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0 if it succeeded, 1 if a check failed, 2 for a refusal, which is one line on stderr."""
    options = _parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_: print(f"camrt: {message}", file=sys.stderr)
    try:
        module = importlib.import_module(f".commands.{options.module}", __package__)
        return getattr(module, options.command)(options)
    except BrokenPipeError:
        return 0
    except CamrtError as error:
        print(f"camrt: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"camrt: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("camrt: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="camrt", description="Explanations of vision models at production speed.")
    parser.add_argument("--version", action="version", version=f"camrt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    export = commands.add_parser("export", help="turn a trained model into a bundle")
    export.add_argument(
        "source",
        help="package.module:callable, torchvision:NAME[:WEIGHTS], timm:NAME, hf:FOLDER, FILE.pt2 or FILE.onnx",
    )
    export.add_argument("bundle", type=Path, help="folder to write, e.g. resnet50.camrt")
    export.add_argument(
        "--input-shape", type=int, nargs=3, metavar=("C", "H", "W"), help="where the source does not say"
    )
    export.add_argument("--layers", nargs="+", default=["default"], help="conv, last, default (both) or names")
    export.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "fp16"),
        default=["fp32"],
        help="of the programs: one or both (default: fp32)",
    )
    export.add_argument("--classes", type=Path, help="class names: a JSON list, or a text file with one a line")
    _add_recipe(export)
    export.add_argument("--output", help="which output, attribute or key holds the logits, where there are several")
    export.add_argument("--name", help="the model's name in the manifest")
    export.add_argument("--force", action="store_true", help="replace an existing bundle")
    export.set_defaults(module="export", command="export")

    recipe = commands.add_parser(
        "recipe", help="show or set how pictures become a bundle's input, without a new export"
    )
    recipe.add_argument("bundle", type=Path)
    _add_recipe(recipe)
    recipe.set_defaults(module="recipe", command="recipe")

    info = commands.add_parser("info", help="show what a bundle holds, or what can run it here")
    info.add_argument("bundle", type=Path, nargs="?")
    info.add_argument("--json", action="store_true", help="print the manifest")
    info.add_argument("--backends", action="store_true", help="which backends can be used here, and why not the others")
    info.set_defaults(module="info", command="info")

    build = commands.add_parser("build", help="build TensorRT engines, for this GPU or ahead of time for others")
    build.add_argument("bundle", type=Path)
    build.add_argument(
        "--compute-capability",
        nargs="+",
        metavar="X.Y",
        help="GPUs to build for, e.g. 8.6 8.9 12.0 (default: this one's)",
    )
    build.add_argument(
        "--precision", choices=("fp32", "fp16"), help="which programs (default: all that the bundle has)"
    )
    build.add_argument("--max-batch", type=int, default=16, help="images or masks in one run (default: 16)")
    build.add_argument(
        "--shapes",
        nargs="+",
        choices=("single", "batch", "targets"),
        default=["single", "batch"],
        help="one image, several, or several targets of one image (default: single batch)",
    )
    build.add_argument(
        "--programs",
        nargs="+",
        metavar="FILE",
        help="'all', or files as 'camrt info' lists them (default: the leading methods')",
    )
    build.set_defaults(module="engines", command="build")

    cache = commands.add_parser("cache", help="list or clear the engines that were built")
    cache.add_argument("action", choices=("list", "clear"))
    cache.set_defaults(module="engines", command="cache")

    explain = commands.add_parser("explain", help="write overlays and maps of images")
    explain.add_argument("bundle", type=Path)
    explain.add_argument("images", nargs="+", help="files, folders or glob patterns")
    explain.add_argument(
        "--out", type=Path, default=Path("explanations"), help="folder to write (default: explanations)"
    )
    explain.add_argument("--method", default="winsor_cam", help="NAME or NAME:option=value,... (see 'camrt methods')")
    explain.add_argument(
        "--target",
        nargs="+",
        help="class numbers or names, or "
        "'not' for what speaks against a network's single class (default: each image's top class)",
    )
    explain.add_argument("--percentile", type=float, help="Winsor-CAM's percentile, 0..100 (default: 90)")
    explain.add_argument("--layers", nargs="+", help="conv, last or names (default: the method's own)")
    explain.add_argument("--batch", type=int, default=8, help="images in one run (default: 8)")
    explain.add_argument("--backend", default="auto", help="see 'camrt info --backends' (default: auto)")
    explain.add_argument("--precision", choices=("fp32", "fp16"), help="default: the first that the bundle has")
    explain.add_argument("--no-overlay", action="store_true", help="write no PNG")
    explain.add_argument("--no-maps", action="store_true", help="write no .npy")
    explain.set_defaults(module="explain", command="explain")

    methods = commands.add_parser("methods", help="list the CAM methods, their formulas and sources")
    methods.add_argument("name", nargs="?", help="one method, in full")
    methods.set_defaults(module="methods", command="methods")

    evaluate = commands.add_parser("evaluate", help="measure methods over a folder of images")
    evaluate.add_argument("bundle", type=Path)
    evaluate.add_argument("folder", type=Path, help="images")
    evaluate.add_argument("--masks", type=Path, help="folder with object masks named like the images")
    evaluate.add_argument(
        "--methods", nargs="+", default=["winsor_cam", "grad_cam"], help="NAME or NAME:option=value,..."
    )
    evaluate.add_argument("--metrics", nargs="+", help="default: all that apply")
    evaluate.add_argument("--out", type=Path, default=Path("evaluation"), help="folder to write (default: evaluation)")
    evaluate.add_argument("--steps", type=int, default=32, help="of insertion and deletion (default: 32)")
    evaluate.add_argument("--threshold", type=float, default=0.5, help="of the second IoU (default: 0.5)")
    evaluate.add_argument(
        "--void", type=int, help="mask value to leave out (default: 255 in palette pictures, else none)"
    )
    evaluate.add_argument("--backend", default="auto")
    evaluate.set_defaults(module="evaluate", command="evaluate")

    verify = commands.add_parser("verify", help="compare a bundle with PyTorch in float64; exit code 1 if it differs")
    verify.add_argument("bundle", type=Path)
    verify.add_argument("source", nargs="?", help="as for export (default: what the bundle records)")
    verify.add_argument("--images", nargs="+", help="files, folders or patterns (default: two random images)")
    verify.add_argument("--backend", default="auto")
    verify.add_argument("--all", action="store_true", help="print every row, not the worst of each kind")
    verify.set_defaults(module="verify", command="verify")

    bench = commands.add_parser("bench", help="measure latency, throughput, memory and stages of explanations")
    bench.add_argument("bundle", type=Path)
    bench.add_argument("images", nargs="*", help="files, folders or patterns (default: a random picture)")
    bench.add_argument(
        "--methods", nargs="+", default=["winsor_cam"], help="NAME or NAME:option=value,... (default: winsor_cam)"
    )
    bench.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="batch sizes (default: 1 4 16)")
    bench.add_argument("--runs", type=int, default=50, help="calls of each at most (default: 50)")
    bench.add_argument("--seconds", type=float, default=60, help="a batch size at most, roughly (default: 60)")
    bench.add_argument("--backend", default="auto", help="see 'camrt info --backends' (default: auto)")
    bench.add_argument("--precision", choices=("fp32", "fp16"), help="default: the first that the bundle has")
    bench.add_argument("--threads", type=int, help="of a run on the CPU (default: one per core)")
    bench.add_argument("--out", type=Path, help="a JSON file to write")
    bench.add_argument("--plot", type=Path, help="a picture to write (.png, .svg, .pdf); needs matplotlib")
    bench.set_defaults(module="bench", command="bench")

    demo = commands.add_parser("demo", help="explain drawn pictures with the network in the package")
    demo.add_argument("--out", type=Path, default=Path("camrt-demo"), help="folder to write (default: camrt-demo)")
    demo.add_argument("--scenes", type=int, default=6, help="how many pictures (default: 6)")
    demo.add_argument("--seed", type=int, default=0, help="other pictures (default: 0)")
    demo.set_defaults(module="demo", command="demo")
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """How a picture becomes the network's input, and what its scores are."""
    parser.add_argument("--resize", type=int, nargs="+", metavar="N", help="shorter side, or height and width")
    parser.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="centre crop after resizing")
    parser.add_argument("--mean", type=float, nargs="+", help="per channel, of pixels in 0..1")
    parser.add_argument("--std", type=float, nargs="+", help="per channel, of pixels in 0..1")
    parser.add_argument("--interpolation", help="of the resize: bilinear (default), bicubic, nearest, lanczos")
    parser.add_argument(
        "--fit", help="stretch to height and width (default), or letterbox: fit inside and fill the rest"
    )
    parser.add_argument("--fill", type=int, help="shade around a letterboxed picture, 0..255 (default: 114)")
    parser.add_argument("--channels", help="the network's order: RGB (default) or BGR")
    parser.add_argument(
        "--activation", help="what makes probabilities of the logits: softmax, or sigmoid of each class"
    )
