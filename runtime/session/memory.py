"""Array operations for host or GPU memory, so that a method's code is the same for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...kernels import DeviceArray, GpuStream, take_channels


@dataclass(frozen=True)
class Memory:
    """Host or GPU memory. stream: the stream of the GPU that the arrays are on, None for the host."""

    stream: GpuStream | None = None

    def put(self, array: np.ndarray) -> Any:
        return array if self.stream is None else self.stream.upload(array)

    def get(self, *arrays: Any) -> list[np.ndarray]:
        """The arrays as NumPy arrays. For GPU arrays it waits once for all queued work."""
        on_gpu = [a for a in arrays if isinstance(a, DeviceArray)]
        fetched = iter(self.stream.download_all(on_gpu) if self.stream is not None and on_gpu else ())
        return [next(fetched) if isinstance(a, DeviceArray) else a for a in arrays]

    def empty(self, shape: Sequence[int], dtype: str = "float32") -> Any:
        return np.empty(shape, dtype) if self.stream is None else self.stream.empty(shape, dtype)

    def zeros(self, shape: Sequence[int]) -> Any:
        return self.put(np.zeros(shape, np.float32))

    def copied(self, array: Any) -> Any:
        """A copy of the array, in the same memory."""
        if self.stream is None:
            return array.copy()
        copy = self.stream.empty(array.shape, array.dtype)
        self.stream.copy(array, copy)
        return copy

    def side_by_side(self, arrays: Sequence[Any]) -> Any:
        """Flattens arrays (S, ...) to (S, N_i) and concatenates them: (S, sum N_i)."""
        flat = [a.reshape(len(a), -1) for a in arrays]
        if len(flat) == 1:
            return flat[0]
        if self.stream is None:
            return np.concatenate(flat, axis=1)
        rows, widths = len(flat[0]), [a.shape[1] for a in flat]
        joined = self.stream.empty((rows * sum(widths),))
        start = 0
        for row in range(rows):
            for array, width in zip(flat, widths, strict=True):
                self.stream.copy(array[row : row + 1].reshape(width), joined[start : start + width])
                start += width
        return joined.reshape(rows, sum(widths))

    def columns(self, array: Any, index: np.ndarray) -> Any:
        """Some of the columns of (S, N): (S, len(index)). index: in ascending order."""
        if self.stream is None:
            together = len(index) > 0 and index[-1] - index[0] + 1 == len(index)
            return array[:, index[0] : index[-1] + 1] if together else array[:, index]
        rows, width = array.shape
        table = (np.arange(rows)[:, None] * width + index).astype(np.int32)
        numbers = array.reshape(rows * width, 1, 1)
        taken = take_channels(numbers, self.stream.constant(table.ravel()), stream=self.stream)
        return taken.reshape(rows, len(index))

    def repeated(self, array: Any, rows: int) -> Any:
        """An array (1, ...) repeated to (rows, ...)."""
        if self.stream is None:
            return np.repeat(array, rows, axis=0)
        copies = self.stream.empty((rows, *array.shape[1:]))
        for row in range(rows):
            self.stream.copy(array, copies[row : row + 1])
        return copies


HOST = Memory()
