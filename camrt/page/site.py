"""Writes the page's folder: the static files, the compiled programs with their weights, and what the page must know."""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import __version__
from ..compiling.api import check_compiler, check_outside
from ..method_choice import MethodChoice, parse_method
from ..runtime.bundle.manifest import Tap
from ..runtime.bundle.reading import Bundle, read_bundle
from ..runtime.cams import method_named
from ..runtime.errors import CamrtError, InputError
from ..runtime.explainer import Explainer, load
from ..runtime.images.colormaps import COLORMAPS, colorize
from ..runtime.images.image_batch import ImageBatch
from ..runtime.images.preprocess import pillow_turns
from ..runtime.layer_choice import chosen_layers
from .web_runtime import FILES, VERSION, web_runtime

STATIC = Path(__file__).parent / "static"
DESCRIPTION = "site.json"
FORMAT = 1
METHODS = (
    *("winsor_cam", "grad_cam", "layer_cam", "integrative_cam"),
    *("grad_cam_pp", "x_grad_cam", "hires_cam", "finer_cam"),
)
LABELS = {
    "winsor_cam": "Winsor-CAM",
    "grad_cam": "Grad-CAM",
    "grad_cam_pp": "Grad-CAM++",
    "layer_cam": "LayerCAM",
    "x_grad_cam": "XGrad-CAM",
    "hires_cam": "HiResCAM",
    "integrative_cam": "Integrative CAM",
    "finer_cam": "Finer-CAM",
    "full_grad": "FullGrad",
    "recipro_cam": "Recipro-CAM",
    "score_cam_pp": "ScoreCAM++",
    "score_cam": "Score-CAM",
}
PERCENTILE = 90.0
MOST_TRIED = 10  # classes, for a map that is not constant
LARGEST_EXAMPLE = 20_000_000  # bytes


def make_page(
    bundle: str | Path,
    out: str | Path,
    methods: Sequence[str] | None = None,
    examples: Sequence[str | Path] = (),
    precision: str | None = None,
    runtime: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Writes a static page that explains pictures with the bundle's network in the reader's browser; returns its path.

    methods: names, or NAME:option=value,..., by default those in METHODS that the bundle has layers for. examples:
    picture files that the page offers. precision: "fp32" or "fp16". runtime: a folder with onnxruntime-web's package;
    by default npm fetches it into the user's cache. A page that is already in `out` is replaced in one step. InputError
    for a bundle without a recipe, or if `out` holds something else; UnknownMethod; CamrtError without npm.
    """
    check_compiler()
    opened, out = read_bundle(bundle), Path(out)
    manifest = opened.manifest
    if manifest.preprocess is None or manifest.input_shape[0] not in (1, 3):
        raise InputError(
            f"{bundle}: a page takes pictures, and this bundle does not say how to preprocess them: set it with camrt "
            "recipe BUNDLE (--resize, --crop, --mean, --std)"
        )
    check_outside(out, opened.path)
    out = out.resolve()  # behind a symbolic link
    if out.exists() and not is_page(out) and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: exists, and is not a page of camrt: choose another folder with --out")
    if Path.cwd().is_relative_to(out):
        raise InputError(f"{out}: is the current folder, which cannot be replaced: choose another with --out")
    chosen_precision = opened.chosen_precision(precision)
    programs = web_runtime(runtime)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            site = Path(temporary) / "site"
            shutil.copytree(STATIC, site)
            (site / "ort").mkdir()
            for name in (name for names in FILES.values() for name in names):
                shutil.copyfile(programs / name, site / "ort" / name)
            described = _describe(opened, chosen_precision)
            described["methods"] = _write_methods(opened, chosen_precision, methods, site, progress)
            described["examples"] = _copy_examples(examples, opened, site)
            (site / DESCRIPTION).write_text(json.dumps(described) + "\n", encoding="utf-8")
            if out.exists():
                out.replace(Path(temporary) / "old")
            site.chmod(0o755)
            site.replace(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from None
    return out


def is_page(folder: Path) -> bool:
    """Whether a folder holds a page."""
    try:
        return "camrt page" in json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _describe(bundle: Bundle, precision: str) -> dict[str, Any]:
    manifest, levels = bundle.manifest, np.arange(256, dtype=np.float32) / 255
    colormaps = {name: base64.b64encode(colorize(levels, name).tobytes()).decode() for name in COLORMAPS}
    assert manifest.preprocess is not None
    return {
        "camrt page": FORMAT,
        "version": __version__,
        "runtime": VERSION,
        "name": manifest.name,
        "input_shape": manifest.input_shape,
        "num_classes": manifest.num_classes,
        "classes": manifest.classes,
        "probability": manifest.probability,
        "precision": precision,
        "preprocess": asdict(manifest.preprocess),
        "turns": pillow_turns(),
        "percentile": PERCENTILE,
        "weights": manifest.weights["bytes"],
        "colormaps": colormaps,
    }


def _write_methods(
    bundle: Bundle, precision: str, methods: Sequence[str] | None, site: Path, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Writes the programs of each method, which share one weights file, and a map to check a browser's own with."""
    import onnx_ir as ir

    from ..compiling.build import Form, compiled_method, describe, finish_part, masks_of, network_part, one_file

    model, written, form = site / "model", [], Form(batch=1, masks=masks_of(bundle.manifest))
    model.mkdir()
    explainer = load(bundle.path, "onnxruntime", precision=precision)
    probe = probe_picture(bundle.manifest.input_shape[1:])
    Image.fromarray(probe).save(site / "check.png")
    for text in dict.fromkeys(METHODS if methods is None else methods):
        choice = parse_method(text)
        progress(f"compiling {choice.name}")
        compiled = compiled_method(choice)
        try:
            names = chosen_layers(bundle.manifest, method_named(choice.name), None)
            chosen = [t for t in bundle.manifest.taps if t.name in names]
            parts = {}
            if compiled.inputs:
                parts["file"] = network_part(bundle, compiled, choice, chosen, precision, form)
                parts["finish"] = finish_part(bundle, compiled, choice, chosen, precision)
            else:
                parts["file"] = one_file(bundle, compiled, choice, chosen, precision, form)
        except CamrtError as error:
            if methods is not None:
                raise
            progress(f"{choice.name} is left out: {error}")
            continue
        row: dict[str, Any] = {"id": text, "label": _label(choice), "layers": [t.name for t in chosen]}
        for part, program in parts.items():
            row[part] = f"model/{len(written)}-{choice.name}{'' if part == 'file' else '-finish'}.onnx"
            describe(program, bundle.manifest, choice, chosen, precision, form)
            ir.save(program, site / row[part])  # large weights stay in the weights file, copied below
        target, expected = _expected(explainer, probe, choice, chosen)
        row["check"] = {"file": f"model/{len(written)}-check.bin", "target": target}
        (site / row["check"]["file"]).write_bytes(expected.tobytes())
        written.append(row)
    if not written:
        raise InputError(f"{bundle.path}: no method of a page fits its layers: name one with --methods")
    weights = bundle.manifest.weights["file"]
    shutil.copyfile(bundle.path / weights, model / "weights.bin")
    return written


def _label(choice: MethodChoice) -> str:
    options = ", ".join(f"{name} {value}" for name, value in choice.options.items())
    return LABELS.get(choice.name, choice.name) + (f" ({options})" if options else "")


def probe_picture(size: tuple[int, int]) -> np.ndarray:
    """A smooth picture, uint8 (H, W, 3), larger than the network's input by half: browsers check themselves with it."""
    coarse = np.random.default_rng(7).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size[1] * 3 // 2, size[0] * 3 // 2), Image.Resampling.BICUBIC))


def _expected(
    explainer: Explainer, probe: np.ndarray, choice: MethodChoice, chosen: Sequence[Tap]
) -> tuple[int, np.ndarray]:
    """(a class, its map of the probe (H, W) float32): the likeliest class whose map is not constant; of many, the first
    if all are.
    """
    options = dict(choice.options) | ({"percentile": PERCENTILE} if choice.name == "winsor_cam" else {})
    layers, found = [t.name for t in chosen] or None, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant map
        for target in explainer.classify(probe)[0].argsort()[::-1][:MOST_TRIED]:
            maps = explainer.explain(probe, choice.name, int(target), layers, **options).maps[0]
            found.append((int(target), maps.astype("<f4")))
            if np.ptp(maps) > 0:
                return found[-1]
    return found[0]


def _copy_examples(examples: Sequence[str | Path], bundle: Bundle, site: Path) -> list[dict[str, str]]:
    """Copies pictures, after trying to read each as `explain` would."""
    copied = []
    for i, example in enumerate(map(Path, examples)):
        ImageBatch(example, bundle.manifest)
        if example.stat().st_size > LARGEST_EXAMPLE:
            raise InputError(f"{example}: {example.stat().st_size / 1e6:.0f} MB is too large for an example of a page")
        (site / "examples").mkdir(exist_ok=True)
        name = f"examples/{i}{example.suffix.lower()}"
        shutil.copyfile(example, site / name)
        copied.append({"file": name, "label": example.stem})
    return copied
