"""Where the network's input lies in the photo that it was made from, and maps brought back there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """The way from a photo to the network's input: resized, then cropped or letterboxed.

    photo (H, W): the photo's size, upright; resized (h, w): what it was resized to; top, left: where the input begins
    in that, negative in a letterbox; size (h', w'): the input's size. Coordinates are those of pixel centres.
    """

    photo: Size
    resized: Size
    top: int
    left: int
    size: Size

    @classmethod
    def whole(cls, size: Size) -> Placement:
        """An input that is the photo itself."""
        return cls(size, size, 0, 0, size)

    @property
    def is_whole(self) -> bool:
        return self == Placement.whole(self.size)

    def seen(self) -> np.ndarray:
        """(H, W) bool: the photo's pixels whose centres lie inside the network's input."""
        rows, columns = (_inside(at, size) for at, size, _ in self._axes())
        return rows[:, None] & columns

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Matrices (H, h'), (w', W): rows @ map @ columns is the map on the photo's grid."""
        rows, columns = (_weights(at, size, scale) for at, size, scale in self._axes())
        return rows, columns.T

    def to_photo(self, scaled: np.ndarray) -> np.ndarray:
        """A map (h', w') on the photo's grid, (H, W) float32: bilinear, half-pixel centres, averaged where the photo is
        the smaller one; NaN where the network did not see the photo.
        """
        if self.is_whole:
            return scaled.astype(np.float32)
        rows, columns = self.weights()
        out = rows @ scaled.astype(np.float32) @ columns
        out[~self.seen()] = np.nan
        return out

    def _axes(self) -> list[tuple[np.ndarray, int, float]]:
        """Of rows and of columns: where those of the photo lie in the input, in its pixels; the input's size; pixels of
        the input for one of the photo.
        """
        sizes = zip(self.photo, self.resized, (self.top, self.left), self.size, strict=True)
        return [
            ((np.arange(photo) + 0.5) * (resized / photo) - 0.5 - offset, size, resized / photo)
            for photo, resized, offset, size in sizes
        ]


def _inside(at: np.ndarray, size: int) -> np.ndarray:
    return (at >= -0.5) & (at <= size - 0.5)


def _weights(at: np.ndarray, size: int, scale: float) -> np.ndarray:
    """(len(at), size) float32: the triangle filter around each position, as wide as a step but at least 1; rows sum to
    1.
    """
    near = np.clip(at, 0, size - 1)[:, None]
    weights = np.maximum(0, 1 - np.abs(near - np.arange(size)) / max(1.0, scale))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
