"""camrt methods."""

from __future__ import annotations

import argparse

LEADING = ("winsor_cam", "score_cam_pp", "integrative_cam")  # listed before the baselines


HELP = "list the CAM methods, their formulas and sources"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="shows everything about this method")


def run(options: argparse.Namespace) -> int:
    """Lists the methods, or explains one."""
    from ..runtime.cams import all_methods, method_named

    if options.name is not None:
        method = method_named(options.name)
        text = (method.function.__doc__ or "").strip().splitlines()
        print(f"{method.name}: {method.source}")
        print("\n".join(line.strip() for line in text))
        print(f"layers: {method.layers or 'the whole network'}; programs: {', '.join(method.data({}).kinds)}")
        print(f"options: {', '.join(f'{k}={v}' for k, v in method.options.items()) or 'none'}")
        return 0
    methods = all_methods()
    for name in [*LEADING, *(n for n in methods if n not in LEADING)]:
        method = methods[name]
        formula = (method.function.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        print(f"{method.name:16} {' '.join(formula.split())}")
        programs = ", ".join(method.data({}).kinds)
        print(f"{'':16} on {method.layers or 'the whole network'}, from {programs}; {method.source}")
    return 0
