"""camrt methods, and how a method with options is written: score_cam_pp:variant=tanh_mask_only,baseline=zero."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from ..runtime.errors import InputError

LEADING = ("winsor_cam", "score_cam_pp", "integrative_cam")  # listed before the baselines


@dataclass(frozen=True)
class Chosen:
    """A method with options, and how it was written."""

    text: str
    name: str
    options: dict[str, Any]


def parse_method(text: str) -> Chosen:
    """UnknownMethod for a method or option that does not exist, InputError if the text cannot be read."""
    from ..runtime.cams import method_named

    name, _, rest = text.partition(":")
    method = method_named(name)
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"method {text!r}: write options as {name}:option=value,option=value")
        options[key] = _value(value)
    method.check_options(options)
    return Chosen(text, name, options)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def methods(options: argparse.Namespace) -> int:
    """Lists the methods, or explains one."""
    from ..runtime.cams import METHODS, method_named

    if options.name is not None:
        method = method_named(options.name)
        text = (method.function.__doc__ or "").strip().splitlines()
        print(f"{method.name}: {method.source}")
        print("\n".join(line.strip() for line in text))
        print(f"layers: {method.layers or 'the whole network'}; programs: {', '.join(method.needs.kinds)}")
        print(f"options: {', '.join(f'{k}={v}' for k, v in method.options.items()) or 'none'}")
        return 0
    for method in sorted(METHODS.values(), key=lambda m: LEADING.index(m.name) if m.name in LEADING else len(LEADING)):
        formula = (method.function.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        print(f"{method.name:16} {' '.join(formula.split())}")
        print(
            f"{'':16} on {method.layers or 'the whole network'}, from {', '.join(method.needs.kinds)}; {method.source}"
        )
    return 0
