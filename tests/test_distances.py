"""Comparisons fail on shape, dtype, NaN and emptiness before they look at values."""

from __future__ import annotations

import numpy as np
import pytest

from camrt.verification.distances import cosine_distance, largest_difference, relative_l2

ONES = np.ones((2, 3))


@pytest.mark.parametrize("measure", [relative_l2, largest_difference, cosine_distance])
@pytest.mark.parametrize(
    ("got", "want", "said"),
    [
        (ONES[:1], ONES, r"shape \(1, 3\) instead of \(2, 3\)"),
        (ONES.astype(np.float32), ONES, "dtype float32 instead of float64"),
        (ONES[:0], ONES[:0], "nothing to compare"),
        (ONES, ONES * np.nan, "the reference holds NaN or infinity"),
        (ONES * np.inf, ONES, "NaN or infinity"),
    ],
    ids=["shape", "dtype", "empty", "reference", "nan"],
)
def test_what_cannot_be_compared(measure, got: np.ndarray, want: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        measure(got, want)


def test_distances() -> None:
    a, b = np.array([[3.0, 4.0], [0, 0]]), np.array([[3.0, 0], [0, 0]])
    assert relative_l2(a, b) == 4 / 3 and relative_l2(a, np.zeros((2, 2))) == 5
    assert largest_difference(a, b) == 4
    assert np.isclose(cosine_distance(a, b), 0.4)
    assert cosine_distance(b, b * 0) == 1
