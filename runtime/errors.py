"""The errors of camrt. A message is one line: what is wrong, where, and what to do next."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Sequence


class CamrtError(Exception):
    """Base of all errors that a caller can act on."""


class ExportError(CamrtError):
    """The model cannot be turned into a bundle."""


class UnsupportedOperator(ExportError):
    """An operator between a tap and the logits has no gradient rule."""


class UnknownLayer(CamrtError):
    """A layer name that the model or the bundle does not have."""


class BundleError(CamrtError):
    """A bundle is missing, damaged, or of another format."""


class InputError(CamrtError):
    """Images, targets or parameters do not fit."""


class NotFinite(CamrtError):
    """The network or a method gives NaN or infinity for an image."""


class UnknownName(CamrtError):
    """A name that does not exist: of a backend, a program, a metric."""


class UnknownMethod(UnknownName):
    """A method, or an option of a method, that does not exist."""


class BackendUnavailable(CamrtError):
    """The package or device that a backend needs is not there."""


class EngineError(CamrtError):
    """An engine cannot be built, kept or run."""


def warn(message: str) -> None:
    """A UserWarning at the line outside camrt that called it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "camrt":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def near(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: close matches, else some of the known names."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return ": did you mean " + " or ".join(repr(c) for c in close) + "?"
    examples = ", ".join(repr(k) for k in list(known)[:5])
    return f": it has {examples}" + (", ..." if len(known) > 5 else "")
