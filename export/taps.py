"""Which tensors a bundle taps: `layers="conv"`, `"last"`, `"default"` (both), or a list of names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..runtime.errors import ExportError, UnknownLayer, near

ROLES = ("conv", "last", "default")


def choose(
    layers: str | Sequence[str], convolutions: Sequence[str], last: str | None, known: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Names to tap, in the model's order, with their roles.

    UnknownLayer names near misses; ExportError if nothing is left to tap.
    """
    known = list(known)
    check_names(layers, known)
    if isinstance(layers, str):
        wanted = {
            "conv": list(convolutions),
            "last": [last] if last else [],
            "default": [*convolutions, *([last] if last else [])],
        }.get(layers, [layers])
    else:
        wanted = list(layers)
    if not wanted:
        raise ExportError(f"layers={layers!r} finds nothing in this model: name the layers to explain")
    roles = {}
    for name in (n for n in known if n in set(wanted)):
        roles[name] = tuple(role for role, holds in (("conv", name in convolutions), ("last", name == last)) if holds)
    return roles


def check_names(layers: str | Sequence[str], known: Iterable[str]) -> list[str]:
    """The layers that were named, rather than chosen by role. UnknownLayer names near misses."""
    known = list(known)
    named = [layers] if isinstance(layers, str) else list(layers)
    if layers in ROLES:
        return []
    for name in named:
        if name not in known:
            raise UnknownLayer(f"the model has no layer {name!r}{near(name, known)}")
    return named
