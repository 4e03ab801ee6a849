"""Parses a method with options, e.g. score_cam_pp:variant=tanh_mask_only,baseline=zero; and the names of layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .runtime.errors import InputError


@dataclass(frozen=True)
class MethodChoice:
    """A method with options. text: as the user wrote it."""

    text: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)


def parse_method(text: str) -> MethodChoice:
    """Parses "NAME" or "NAME:option=value,...". Values become int, float, bool or stay text.

    UnknownMethod for a method or option that does not exist; InputError if an option has no value.
    """
    from .runtime.cams import method_named

    name, _, rest = text.partition(":")
    method = method_named(name)
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"method {text!r}: write options as {name}:option=value,option=value")
        options[key] = _value(value)
    method.check_options(options)
    return MethodChoice(text, name, options)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


ROLES = ("conv", "last", "default")


def layers_of(words: list[str] | None) -> list[str] | str | None:
    """A role, if it stands alone; else names; None where the option was not given."""
    return words[0] if words is not None and len(words) == 1 and words[0] in ROLES else words
