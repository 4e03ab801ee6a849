"""camrt evaluate."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings

from ..runtime.errors import InputError
from .explain import find_images
from .methods import parse_method


def evaluate(options: argparse.Namespace) -> int:
    """Prints and writes a table; 1 if images could not be used."""
    from tqdm import tqdm

    from ..evaluate import as_markdown, tabulate
    from ..evaluate import evaluate as measure
    from ..runtime.explainer import load

    explainer = load(options.bundle, options.backend)
    inside = [folder.resolve() for folder in (options.masks, options.out) if folder is not None]
    found = find_images([str(options.folder)])
    images = [p for p in found if not any(p.resolve().is_relative_to(folder) for folder in inside)]
    if not images:
        raise InputError(f"{options.folder}: no images there besides masks and results")
    methods = [parse_method(text) for text in dict.fromkeys(options.methods)]
    problems: list[str] = []
    with tqdm(total=len(images) * len(methods), unit="map", disable=None) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a map of zeros is measured as what it is

        def advance() -> None:
            bar.update()

        def problem(line: str) -> None:
            problems.append(line)
            tqdm.write(f"camrt: {line}", file=sys.stderr)

        records = measure(
            explainer,
            images,
            methods,
            options.out,
            options.masks,
            options.metrics,
            options.steps,
            options.threshold,
            options.void,
            progress=advance,
            problem=problem,
        )
    if not records:
        raise InputError(f"{options.folder}: none of its {len(images)} images could be used")
    table = tabulate(records, methods)
    text = as_markdown(table)
    report = {method: {n: dataclasses.asdict(c) for n, c in cells.items()} for method, cells in table.items()}
    try:
        (options.out / "table.md").write_text(text, encoding="utf-8")
        (options.out / "table.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{options.out}: cannot be written ({error.strerror})") from None
    print(text, end="")
    used = len({r["image"] for r in records})
    print(f"{used} of {len(images)} images; means with half of a 95 % bootstrap interval; best in bold: {options.out}")
    return 1 if problems else 0
