"""camrt info."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.errors import BackendUnavailable, InputError
from .recipe import said_of_scores

if TYPE_CHECKING:
    from ..runtime.bundle.manifest import Manifest

HELP = "show what a bundle holds, or what can run it here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--json", action="store_true", help="print the manifest (or, with --programs, those) as JSON")
    parser.add_argument(
        "--programs", action="store_true", help="what each program takes and gives, to run it without camrt"
    )
    parser.add_argument(
        "--backends", action="store_true", help="which backends can be used here, and why not the others"
    )


def run(options: argparse.Namespace) -> int:
    if options.backends:
        return _backends()
    if options.bundle is None:
        raise InputError("name a bundle, or ask for --backends")
    from ..runtime.bundle.reading import read_bundle

    manifest = read_bundle(options.bundle).manifest
    if options.programs:
        _print_programs(manifest, options.json)
        return 0
    if options.json:
        print(manifest.to_json(), end="")
        return 0
    print(f"{manifest.name}: {' x '.join(map(str, manifest.input_shape))} -> {manifest.num_classes} classes")
    spec = manifest.source.get("spec")
    print(f"from {manifest.source['kind']}{f' {spec}' if spec else ''}, {_versions(manifest.tools)}")
    if manifest.final_activation:
        print(f"logits are taken before the final {manifest.final_activation}")
    print(f"probabilities: {said_of_scores(manifest)}")
    if manifest.normalized is not None:
        print(f"masks multiply {manifest.normalized.tensor!r}, the image after the network's own normalisation")
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


def _print_programs(manifest: Manifest, as_json: bool) -> None:
    from ..runtime.bundle.contracts import contract, contracts_as_text

    if as_json:
        print(json.dumps([contract(p) for p in manifest.programs], indent=1))
    else:
        print(contracts_as_text(manifest), end="")


def _versions(tools: dict[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in tools.items())


def _backends() -> int:
    """Prints every backend, the best first; "auto" takes the first that works. Exit code 1 if none does."""
    from ..runtime.backends import survey

    taken = False
    for name, backend in survey():
        usable = not isinstance(backend, BackendUnavailable)
        print(f"{'auto ->' if usable and not taken else '':8}{name:18}{'' if usable else 'not here: '}{backend}")
        taken = taken or usable
    return 0 if taken else 1
