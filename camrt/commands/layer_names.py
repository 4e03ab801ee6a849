"""The words behind --layers."""

from __future__ import annotations

ROLES = ("conv", "last", "default")


def layers_of(words: list[str] | None) -> list[str] | str | None:
    """A role, if it stands alone; else names; None where the option was not given."""
    return words[0] if words is not None and len(words) == 1 and words[0] in ROLES else words
