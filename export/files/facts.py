"""What is known of one value while shapes are walked, and the batch that could not be freed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Facts:
    """Of one value: its shape at each batch size, and its contents where they are known; of_image: whether it is
    computed from the image's numbers, not merely from its sizes.
    """

    shapes: tuple[Shape, ...]
    contents: tuple[np.ndarray, ...] | None = None
    of_image: bool = False

    @property
    def varies(self) -> bool:
        return any(s != self.shapes[0] for s in self.shapes)

    @property
    def constant(self) -> np.ndarray | None:
        """The contents, if they are known and the same at every batch size."""
        if self.contents is None:
            return None
        first = self.contents[0]
        same = all(c is first or (c.shape == first.shape and np.array_equal(c, first)) for c in self.contents[1:])
        return first if same else None


class BatchPinned(Exception):
    """The batch cannot be freed. node: where; reason: why, as a clause."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(f"{label(node)} {reason}")
        self.node = node


def label(node: ir.Node) -> str:
    return f"{node.op_type} (node {node.name!r})" if node.name else f"{node.op_type} of {node.outputs[0].name!r}"


@dataclass(frozen=True)
class Multiple:
    """A size that is `times` the batch."""

    times: int

    def __str__(self) -> str:
        return "batch" if self.times == 1 else f"{self.times}*batch"


def changing(shapes: Sequence[Shape]) -> int | None:
    """The one axis whose size changes with the batch; None if there is none, or several."""
    changing = [a for a, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    return changing[0] if len(changing) == 1 else None
