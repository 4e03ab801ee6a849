"""Checks of the kernels' arguments, the same for NumPy and GPU arrays. They raise ValueError, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def expect(
    kernel: str, name: str, array: Any, shape: Sequence[int | str], dtypes: Sequence[str] = ("float32",)
) -> None:
    """ValueError if the array has another shape or dtype. shape: a number for a fixed length, a letter for any."""
    if not hasattr(array, "shape") or not isinstance(array.dtype, np.dtype):
        raise ValueError(f"{kernel}: {name} is a {type(array).__name__}, needed a NumPy or GPU array")
    fits = len(array.shape) == len(shape)
    for want, got in zip(shape, array.shape, strict=False):
        fits = fits and (isinstance(want, str) or want == got)
    if not fits:
        raise ValueError(f"{kernel}: {name} is {tuple(array.shape)}, needed ({', '.join(map(str, shape))})")
    if array.dtype not in dtypes:
        raise ValueError(f"{kernel}: {name} {tuple(array.shape)} is {array.dtype}, needed {' or '.join(dtypes)}")


def expect_choice(kernel: str, what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{kernel}: {what} {value!r}: use {', '.join(choices)}")


def expect_sides(kernel: str, **sides: Sequence[int]) -> None:
    for name, (height, width) in sides.items():
        if height < 1 or width < 1:
            raise ValueError(f"{kernel}: {name} is {height} x {width}, needed at least 1 x 1")
