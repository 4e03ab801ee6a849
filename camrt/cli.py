"""The command line: camrt export | info | explain | verify | demo."""

from __future__ import annotations

import argparse
import glob
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .runtime.errors import CamrtError, InputError

if TYPE_CHECKING:
    from .runtime.explainer import Explainer
    from .runtime.explanation import Explanation
    from .runtime.manifest import Preprocess

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0 if it succeeded, 1 if a check failed, 2 for a refusal, which is one line on stderr."""
    options = _parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_: print(f"camrt: {message}", file=sys.stderr)
    try:
        return options.run(options)
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
        "source", help="package.module:callable, torchvision:NAME[:WEIGHTS], timm:NAME, FILE.pt2 or FILE.onnx"
    )
    export.add_argument("bundle", type=Path, help="folder to write, e.g. resnet50.camrt")
    export.add_argument(
        "--input-shape", type=int, nargs=3, metavar=("C", "H", "W"), help="where the source does not say"
    )
    export.add_argument("--layers", nargs="+", default=["default"], help="conv, last, default (both) or names")
    export.add_argument("--classes", type=Path, help="class names: a JSON list, or a text file with one a line")
    export.add_argument("--resize", type=int, nargs="+", metavar="N", help="shorter side, or height and width")
    export.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="centre crop after resizing")
    export.add_argument("--mean", type=float, nargs="+", help="per channel, of pixels in 0..1")
    export.add_argument("--std", type=float, nargs="+", help="per channel, of pixels in 0..1")
    export.add_argument("--interpolation", help="of the resize: bilinear (default), bicubic, nearest, lanczos")
    export.add_argument("--output", help="which output of an ONNX file holds the logits")
    export.add_argument("--name", help="the model's name in the manifest")
    export.add_argument("--force", action="store_true", help="replace an existing bundle")
    export.set_defaults(run=_export)

    info = commands.add_parser("info", help="show what a bundle holds")
    info.add_argument("bundle", type=Path)
    info.add_argument("--json", action="store_true", help="print the manifest")
    info.set_defaults(run=_info)

    explain = commands.add_parser("explain", help="write overlays and maps of images")
    explain.add_argument("bundle", type=Path)
    explain.add_argument("images", nargs="+", help="files, folders or glob patterns")
    explain.add_argument(
        "--out", type=Path, default=Path("explanations"), help="folder to write (default: explanations)"
    )
    explain.add_argument("--method", default="winsor_cam")
    explain.add_argument("--target", nargs="+", help="class numbers or names (default: each image's top class)")
    explain.add_argument("--percentile", type=float, help="Winsor-CAM's percentile, 0..100 (default: 90)")
    explain.add_argument("--layers", nargs="+", help="conv, last or names (default: the method's own)")
    explain.add_argument("--batch", type=int, default=8, help="images in one run (default: 8)")
    explain.add_argument("--backend", default="auto")
    explain.add_argument("--no-overlay", action="store_true", help="write no PNG")
    explain.add_argument("--no-maps", action="store_true", help="write no .npy")
    explain.set_defaults(run=_explain)

    verify = commands.add_parser("verify", help="compare a bundle with PyTorch in float64; exit code 1 if it differs")
    verify.add_argument("bundle", type=Path)
    verify.add_argument("source", nargs="?", help="as for export (default: what the bundle records)")
    verify.add_argument("--images", nargs="+", help="files, folders or patterns (default: two random images)")
    verify.add_argument("--backend", default="auto")
    verify.add_argument("--all", action="store_true", help="print every row, not the worst of each kind")
    verify.set_defaults(run=_verify)

    demo = commands.add_parser("demo", help="explain drawn pictures with the network in the package")
    demo.add_argument("--out", type=Path, default=Path("camrt-demo"), help="folder to write (default: camrt-demo)")
    demo.add_argument("--scenes", type=int, default=6, help="how many pictures (default: 6)")
    demo.add_argument("--seed", type=int, default=0, help="other pictures (default: 0)")
    demo.set_defaults(run=_demo)
    return parser


# ---- export and info


def _export(options: argparse.Namespace) -> int:
    layers: Any = options.layers[0] if options.layers in (["conv"], ["last"], ["default"]) else options.layers
    common: dict[str, Any] = {
        "layers": layers,
        "name": options.name,
        "classes": None if options.classes is None else _class_names(options.classes),
        "overwrite": options.force,
    }
    if options.source.lower().endswith(".onnx"):
        from .export.api import export_onnx

        with _Stages() as stages:
            path = export_onnx(
                options.source,
                options.bundle,
                input_shape=options.input_shape,
                output=options.output,
                preprocess=_preprocess(options, None, options.input_shape),
                progress=stages,
                **common,
            )
    else:
        path = _export_torch(options, common)
    _print_written(path)
    return 0


def _export_torch(options: argparse.Namespace, common: dict[str, Any]) -> Path:
    from .export.api import check_packages, export_model

    check_packages("torch", "onnx", "onnxscript")
    from .export.sources import open_source

    with _Stages() as stages:
        stages(f"opening {options.source}")
        source = open_source(options.source)
        shape = options.input_shape or source.input_shape
        if shape is None:
            raise InputError(f"{options.source} does not say its input's size: pass --input-shape 3 224 224")
        same = source.input_shape is None or tuple(shape) == tuple(source.input_shape)
        common["name"] = common["name"] or source.name
        common["classes"] = common["classes"] or source.classes
        return export_model(
            source.model,
            options.bundle,
            shape,
            preprocess=_preprocess(options, source.preprocess if same else None, shape),
            source=source.spec,
            progress=stages,
            **common,
        )


def _print_written(path: Path) -> None:
    from .runtime.bundle import read_bundle

    manifest = read_bundle(path).manifest
    size = sum(f.stat().st_size for f in path.iterdir()) / 1e6
    print(f"{path}: {len(manifest.taps)} layers, {len(manifest.programs)} programs, {size:.1f} MB")
    if manifest.preprocess is None:
        print("It records no preprocessing, so it takes float32 arrays only: see --resize, --crop, --mean, --std.")
    print(f"Next: camrt verify {path}, camrt explain {path} IMAGE ...")


class _Stages:
    """Shows the stage that is running and how long it has taken."""

    def __enter__(self) -> _Stages:
        from tqdm import tqdm

        self._bar = tqdm(bar_format="{elapsed} {desc}", leave=False, disable=None)
        return self

    def __call__(self, stage: str) -> None:
        if self._bar.disable:
            print(stage, file=sys.stderr)
        self._bar.set_description_str(stage)

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _class_names(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no class names ({error})") from None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InputError(f"{path}: expected a JSON list of names, or a text file with one a line")
    return names


def _preprocess(
    options: argparse.Namespace, known: Preprocess | None, shape: Sequence[int] | None
) -> Preprocess | None:
    """The recipe that the options give, completed by what the source knows; None if neither says anything."""
    from .runtime.manifest import Preprocess

    given = [options.resize, options.crop, options.mean, options.std, options.interpolation]
    if all(g is None for g in given):
        return known
    if (options.mean is None or options.std is None) and known is None:
        raise InputError(
            "preprocessing needs both --mean and --std, e.g. --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
        )
    if options.resize is not None and len(options.resize) > 2:
        raise InputError(f"--resize {options.resize}: one number for the shorter side, or height and width")
    resize: Any = options.resize
    if resize is None:
        resize = known.resize if known is not None else (tuple(shape[1:]) if shape is not None else None)
    elif len(resize) == 1:
        resize = resize[0]
    if resize is None:
        raise InputError("preprocessing needs --resize HEIGHT WIDTH")
    return Preprocess(
        resize=resize if isinstance(resize, int) else tuple(resize),
        mean=tuple(options.mean or known.mean),  # type: ignore[union-attr]
        std=tuple(options.std or known.std),  # type: ignore[union-attr]
        crop=tuple(options.crop) if options.crop else (known.crop if known and options.resize is None else None),
        interpolation=options.interpolation or (known.interpolation if known else "bilinear"),
    )


def _info(options: argparse.Namespace) -> int:
    from .runtime.bundle import read_bundle

    manifest = read_bundle(options.bundle).manifest
    if options.json:
        print(manifest.to_json(), end="")
        return 0
    print(f"{manifest.name}: {' x '.join(map(str, manifest.input_shape))} -> {manifest.num_classes} classes")
    spec = manifest.source.get("spec")
    print(f"from {manifest.source['kind']}{f' {spec}' if spec else ''}, {_versions(manifest.tools)}")
    if manifest.final_activation:
        print(f"logits are taken before the final {manifest.final_activation}")
    print(f"preprocessing: {manifest.preprocess or 'none recorded, it takes float32 arrays'}")
    print(f"batch: {manifest.batch}; weights: {manifest.weights['bytes'] / 1e6:.1f} MB")
    print("programs:")
    for program in manifest.programs:
        print(f"  {program.file:24} {program.precision}, {len(program.taps)} layers")
    print("layers:")
    for tap in manifest.taps:
        grid = f"{tap.grid[0]} x {tap.grid[1]}"
        norm = ", before batch norm" if tap.batch_norm == "after" else ""
        print(f"  {tap.name:32} {tap.channels:5} channels, {grid:9} {' '.join(tap.roles)}{norm}")
    return 0


def _versions(tools: dict[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in tools.items())


# ---- explain


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Image files named by files, folders (searched through) and glob patterns, each once. InputError if one names none."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
        if not files:
            raise InputError(f"{pattern}: no images there" if path.is_dir() else f"{pattern}: no such file")
        found.update(dict.fromkeys(files))
    return list(found)


def _explain(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .runtime.explainer import load

    explainer = load(options.bundle, options.backend, max_batch=options.batch)
    files = find_images(options.images)
    target = None if options.target is None else [_class_index(explainer, t) for t in options.target]
    arguments: dict[str, Any] = {} if options.percentile is None else {"percentile": options.percentile}
    layers: Any = options.layers
    if layers in (["conv"], ["last"]):
        layers = layers[0]
    names = _output_names(files)
    taken = {(options.out / f"{stem}{kind}").resolve() for stem in names.values() for kind in (".png", ".npy")}
    for file in files:
        if file.resolve() in taken:
            raise InputError(f"{file}: its explanation would overwrite an image: choose another --out")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        lines = (options.out / "explanations.jsonl").open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{options.out}: cannot be written ({error.strerror})") from None
    failures = 0
    with lines, tqdm(total=len(files), unit="image", disable=None) as bar:
        for start in range(0, len(files), options.batch):
            for group in _explained(
                files[start : start + options.batch], explainer, options, target, layers, arguments
            ):
                if isinstance(group, InputError):
                    failures += 1
                    tqdm.write(f"camrt: {group}", file=sys.stderr)
                else:
                    paths, result = group
                    for i, path in enumerate(paths):
                        stem = names[path]
                        _write_maps(options, result, i, stem)
                        lines.write(json.dumps(_record(explainer, result, i, path)) + "\n")
            bar.update(len(files[start : start + options.batch]))
    print(f"{len(files) - failures} of {len(files)} images explained with {options.method}: {options.out}")
    return 1 if failures else 0


def _explained(
    files: list[Path],
    explainer: Explainer,
    options: argparse.Namespace,
    target: Any,
    layers: Any,
    arguments: dict[str, Any],
) -> Iterator[tuple[list[Path], Explanation] | InputError]:
    """The images that could not be read, as errors, and the others explained in one batch."""
    from PIL import Image

    from .runtime.preprocess import open_image

    pictures, kept = [], []
    for path in files:
        try:
            picture: Image.Image = open_image(path, explainer.manifest.input_shape[0], str(path))
        except InputError as error:
            yield error
            continue
        pictures.append(picture)
        kept.append(path)
    if kept:
        wanted = None if target is None else [target] * len(kept) if len(target) > 1 else target[0]
        yield kept, explainer.explain(pictures, options.method, wanted, layers, **arguments)


def _class_index(explainer: Explainer, text: str) -> int:
    manifest = explainer.manifest
    if text.lstrip("-").isdecimal():
        return int(text)
    names = manifest.classes or ()
    matches = [i for i, n in enumerate(names) if text.lower() in [part.strip().lower() for part in n.split(",")]]
    if len(matches) != 1:
        problem = "is ambiguous" if matches else "is no class"
        raise InputError(f"{text!r} {problem} of this bundle: pass a number 0..{manifest.num_classes - 1}")
    return matches[0]


def _output_names(files: Sequence[Path]) -> dict[Path, str]:
    """A distinct stem for each file's results."""
    names: dict[Path, str] = {}
    for path in files:
        stem, n = path.stem, 2
        while stem in names.values():
            stem, n = f"{path.stem}-{n}", n + 1
        names[path] = stem
    return names


def _write_maps(options: argparse.Namespace, result: Explanation, index: int, stem: str) -> None:
    import numpy as np
    from PIL import Image

    if not options.no_maps:
        np.save(options.out / f"{stem}.npy", result.maps[index])
    if not options.no_overlay:
        pictures = (
            [result.overlay(index)]
            if result.maps.ndim == 3
            else [result.overlay((index, k)) for k in range(result.maps.shape[1])]
        )
        Image.fromarray(np.concatenate(pictures, axis=1)).save(options.out / f"{stem}.png")


def _record(explainer: Explainer, result: Explanation, index: int, path: Path) -> dict[str, Any]:
    """One line of explanations.jsonl."""
    import numpy as np

    logits = result.logits[index].astype(np.float64)
    sigmoid = explainer.manifest.final_activation == "Sigmoid"
    scores = (
        1 / (1 + np.exp(-logits)) if sigmoid else np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    )
    names = explainer.manifest.classes
    top = [
        {"class": int(c), **({"name": names[c]} if names else {}), "probability": round(float(scores[c]), 6)}
        for c in (-logits).argsort(kind="stable")[:5]
    ]
    weights = result.layer_weights[index]
    return {
        "image": str(path),
        "method": result.method,
        "options": result.options,
        "target": None if result.target is None else result.target[index].tolist(),
        "top": top,
        "layer_weights": dict(zip(result.layers, np.round(weights.T, 6).tolist(), strict=True)),
    }


# ---- verify and demo


def _verify(options: argparse.Namespace) -> int:
    from .export.api import check_packages

    check_packages("torch", "onnx", "onnxscript")
    from .runtime.bundle import read_bundle
    from .runtime.preprocess import as_batch
    from .verify import verify

    images = None
    if options.images is not None:
        images, _ = as_batch([str(p) for p in find_images(options.images)], read_bundle(options.bundle).manifest)
    with _Stages() as stages:
        report = verify(options.bundle, options.source, images, options.backend, stages)
    rows = report.rows if options.all else _worst(report.rows)
    print(f"reference: {report.oracle}, in float64")
    print(f"{'':5}{'program':24}{'compared':40}{'distance':>10}{'PyTorch':>10}{'limit':>10}")
    for row in rows:
        mark = "ok" if row.passed else "FAIL"
        figures = row.problem or f"{row.distance:10.1e}{row.torch_float32:10.1e}{row.limit:10.1e}"
        print(f"{mark:5}{row.program:24}{row.subject:40}{figures}")
    failed = sum(not r.passed for r in report.rows)
    print(f"{len(report.rows) - failed} of {len(report.rows)} comparisons passed")
    return 0 if report.passed else 1


def _worst(rows: Sequence[Any]) -> list[Any]:
    """Failures, and for each program and kind of comparison the row nearest its limit."""
    worst: dict[tuple[str, str], Any] = {}
    for row in rows:
        key = (row.program, row.subject.split()[0])
        if row.passed and (key not in worst or row.distance / row.limit > worst[key].distance / worst[key].limit):
            worst[key] = row
    return [*(r for r in rows if not r.passed), *worst.values()]


def _demo(options: argparse.Namespace) -> int:
    from .demo.run import run

    run(options.out, options.scenes, options.seed)
    return 0
