"""camrt explain."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..image_files import find_images
from ..method_choice import parse_method
from ..runtime.errors import InputError

if TYPE_CHECKING:
    from ..runtime.explainer import Explainer
    from ..runtime.explanation import Explanation

HELP = "write overlays and maps of images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", nargs="+", help="files, folders or glob patterns")
    parser.add_argument(
        "--out", type=Path, default=Path("explanations"), help="folder to write (default: explanations)"
    )
    parser.add_argument("--method", default="winsor_cam", help="NAME or NAME:option=value,... (see 'camrt methods')")
    parser.add_argument(
        "--target",
        nargs="+",
        help="class numbers or names, or "
        "'not' for what lowers the score of a network with a single class (default: each image's top class)",
    )
    parser.add_argument("--percentile", type=float, help="Winsor-CAM's percentile, 0..100 (default: 90)")
    parser.add_argument("--layers", nargs="+", help="conv, last or names (default: the method's own)")
    parser.add_argument("--batch", type=int, default=8, help="images in one run (default: 8)")
    parser.add_argument("--backend", default="auto", help="see 'camrt info --backends' (default: auto)")
    parser.add_argument("--precision", choices=("fp32", "fp16"), help="default: the first that the bundle has")
    parser.add_argument("--no-overlay", action="store_true", help="write no PNG")
    parser.add_argument("--no-maps", action="store_true", help="write no .npy")


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..runtime.explainer import load

    explainer = load(options.bundle, options.backend, max_batch=options.batch, precision=options.precision)
    files = find_images(options.images)
    target: Any = None
    if options.target == ["not"]:
        target = "not"
        explainer.targets(target, 1)  # fails before any image is read
    elif options.target is not None:
        target = [_class_index(explainer, t) for t in options.target]
    method = parse_method(options.method)
    arguments: dict[str, Any] = dict(method.options)
    if options.percentile is not None:
        arguments["percentile"] = options.percentile
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
        part = options.out / "explanations.jsonl.part"
        lines = part.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{options.out}: cannot be written ({error.strerror})") from None
    failures = 0
    with _kept(part), lines, tqdm(total=len(files), unit="image", disable=None) as bar:
        for start in range(0, len(files), options.batch):
            for group in _explained(
                files[start : start + options.batch], explainer, method.name, target, layers, arguments
            ):
                if isinstance(group, InputError):
                    failures += 1
                    tqdm.write(f"camrt: {group}", file=sys.stderr)
                else:
                    paths, result = group
                    for i, path in enumerate(paths):
                        stem = names[path]
                        _write_maps(options, result, i, stem)
                        record = _record(explainer, result, i, path)
                        record |= {"target": "not"} if target == "not" else {}
                        lines.write(json.dumps(record) + "\n")
            bar.update(len(files[start : start + options.batch]))
    print(f"{len(files) - failures} of {len(files)} images explained with {options.method}: {options.out}")
    return 1 if failures else 0


@contextlib.contextmanager
def _kept(part: Path) -> Iterator[None]:
    """On exit, gives the written file its final name; if nothing was written, an earlier file stays as it was."""
    try:
        yield
    finally:
        if part.stat().st_size:
            part.replace(part.with_suffix(""))
        else:
            part.unlink()


def _explained(
    files: list[Path],
    explainer: Explainer,
    method: str,
    target: Any,
    layers: Any,
    arguments: dict[str, Any],
) -> Iterator[tuple[list[Path], Explanation] | InputError]:
    """Yields an error for each image that cannot be read, then the others with their explanation, in one batch."""
    from PIL import Image

    from ..runtime.images.preprocess import open_image

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
        wanted = target
        if isinstance(target, list):
            wanted = [target] * len(kept) if len(target) > 1 else target[0]
        yield kept, explainer.explain(pictures, method, wanted, layers, **arguments)


def _class_index(explainer: Explainer, text: str) -> int:
    manifest = explainer.manifest
    if text.removeprefix("-").isdecimal():
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

    from ..runtime.scores import probabilities

    logits = result.logits[index]
    scores = probabilities(logits[None], explainer.manifest)[0]
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
