"""Which tensors of a graph hold a feature map, in which layout, and how one leaves the graph as NCHW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from ...runtime.bundle.manifest import Tap
from ..tape import Tape, dims
from .axes import BATCH, Axes, grid_of
from .follow import follow


@dataclass(frozen=True)
class Layout:
    """How a tensor holds a feature map of a grid (height, width), one row of the batch for each image.

    kind: NCHW; NHWC; tokens: (batch, prefix + height * width, channels), the prefix being class and register tokens;
    or LND, tokens with the batch on the second axis, as PyTorch's transformers hold them unless told otherwise.
    """

    kind: str
    grid: tuple[int, int]
    prefix: int = 0

    @property
    def channel_axis(self) -> int:
        return {"NCHW": 1, "NHWC": 3, "tokens": 2, "LND": 2}[self.kind]

    @property
    def batch_axis(self) -> int:
        return 1 if self.kind == "LND" else 0

    @property
    def token_axis(self) -> int | None:
        """The axis of the tokens; None for maps with rows and columns of their own."""
        return {"tokens": 1, "LND": 0}.get(self.kind)

    @property
    def rank(self) -> int:
        return 4 if self.token_axis is None else 3


def layouts(graph: ir.Graph) -> dict[ir.Value, Layout]:
    """The values that hold feature maps, found by following the image's axes through the graph, not by shapes.

    An operator that mixes or exchanges positions (a roll, a product over positions) ends this; a sum with a known map
    of the same shape (a residual connection) starts it again.
    """
    return named_layouts(follow(graph))


def named_layouts(found: Mapping[ir.Value, Axes]) -> dict[ir.Value, Layout]:
    """The values whose axes make one of the layouts, on a grid that lies over the image."""
    named = {value: _layout(axes) for value, axes in found.items() if axes.lies_over_image}
    return {value: layout for value, layout in named.items() if layout is not None}


def _layout(axes: Axes) -> Layout | None:
    """The layout that a tensor's axes make; None where they make none."""
    kinds = {4: (("NCHW", 0, 1, 2, 3), ("NHWC", 0, 3, 1, 2)), 3: (("tokens", 0, 2, 1, 1), ("LND", 1, 2, 0, 0))}
    for kind, batch, channel, rows, columns in kinds.get(len(axes.axes), ()):
        if axes.axes[batch] != (BATCH,) or (axes.prefix and (rows != columns or axes.token_axis != rows)):
            continue
        grid = grid_of(axes, channel, rows, columns)
        if grid is not None:
            return Layout(kind, grid, axes.prefix)
    return None


def tap_at(name: str, roles: tuple[str, ...], value: ir.Value, layout: Layout, batch_norm: str) -> Tap:
    """The manifest's entry for a tapped value."""
    channels = dims(value)[layout.channel_axis]
    assert channels is not None
    return Tap(name, roles, channels, layout.grid, batch_norm, layout.kind, layout.prefix)


def to_maps(tape: Tape, value: ir.Value, tap: Tap) -> ir.Value:
    """A tapped value, or its cotangent, as (batch, channels, height, width)."""
    if tap.layout == "NCHW":
        return value
    if tap.layout == "NHWC":
        return tape.Transpose(value, perm=[0, 3, 1, 2])
    value = _batch_first(tape, value, tap)
    if tap.prefix:
        value = tape.Slice(value, [tap.prefix], [2**31], [1])
    return tape.Reshape(tape.Transpose(value, perm=[0, 2, 1]), [-1, tap.channels, *tap.grid])


def from_maps(tape: Tape, maps: ir.Value, tap: Tap, prefix: ir.Value | None) -> ir.Value:
    """The inverse of `to_maps`; prefix (batch, prefix, channels), for tokens that have one."""
    if tap.layout == "NCHW":
        return maps
    if tap.layout == "NHWC":
        return tape.Transpose(maps, perm=[0, 2, 3, 1])
    tokens = tape.Transpose(tape.Reshape(maps, [-1, tap.channels, math.prod(tap.grid)]), perm=[0, 2, 1])
    return _batch_first(tape, tokens if prefix is None else tape.Concat(prefix, tokens, axis=1), tap)


def prefix_of(tape: Tape, value: ir.Value, tap: Tap) -> ir.Value:
    """The tokens (batch, prefix, channels) before the grid's."""
    return tape.Slice(_batch_first(tape, value, tap), [0], [tap.prefix], [1])


def _batch_first(tape: Tape, value: ir.Value, tap: Tap) -> ir.Value:
    """LND as tokens, and tokens as LND."""
    return tape.Transpose(value, perm=[1, 0, 2]) if tap.layout == "LND" else value
