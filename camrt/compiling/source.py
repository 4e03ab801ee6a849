"""What the arithmetic of a method starts from: tensors of the bundle's programs, inside the file's graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from ..export.tape import Tape
from ..runtime.bundle.kinds import Kind
from ..runtime.bundle.manifest import Manifest, Tap
from .maps import Size, split

Finished = tuple[ir.Value, ir.Value | None]  # map (batch, H, W), layer weights (batch, layers)
Run = Callable[..., dict[str, ir.Value]]


def _without_network(*arguments: object, **named: object) -> dict[str, ir.Value]:
    raise AssertionError("what follows a network runs no other program")


@dataclass(frozen=True)
class Source:
    """What a method continues. outputs: of the program that the file starts with, by name; taps: its layers; chosen:
    those that the method explains, in the same order; precision: "float32" or "float16"; inputs: the file's, by name;
    explained (batch, classes): one-hot, the class of each image, its top class where the target is -1; masks: of one
    run of the network. run(kind, feeds, layers, into): the outputs of another program, run in the same graph, or in
    the body of a loop, on these inputs. What follows a network alone has neither `explained` nor `run`.
    """

    tape: Tape
    manifest: Manifest
    outputs: Mapping[str, ir.Value]
    taps: Sequence[Tap]
    chosen: Sequence[Tap]
    precision: str
    inputs: Mapping[str, ir.Value]
    explained: ir.Value | None = None
    masks: int = 1
    run: Run = _without_network

    @property
    def size(self) -> Size:
        """Of the network's input."""
        return self.manifest.input_shape[1:]

    def layers(self, name: str) -> list[ir.Value]:
        """The columns of an output that holds all layers side by side: (batch, width) per chosen layer."""
        of_maps = name == "maps"
        widths = [t.grid[0] * t.grid[1] if of_maps else t.channels for t in self.taps]
        parts = split(self.tape, self.outputs[name], widths)
        return [p for p, t in zip(parts, self.taps, strict=True) if t in self.chosen]

    def maps(self) -> list[tuple[ir.Value, Size]]:
        """(batch, h, w) per chosen layer, with its grid."""
        parts = zip(self.layers("maps"), self.chosen, strict=True)
        return [(self.tape.Reshape(m, [-1, *t.grid]), t.grid) for m, t in parts]

    def pairs(self) -> list[tuple[ir.Value, ir.Value, Size]]:
        """Activation and gradient (batch, K, h, w) per chosen layer, with its grid."""
        return [(self.outputs[f"activation:{t.name}"], self.outputs[f"gradient:{t.name}"], t.grid) for t in self.chosen]

    def full(self, value: float, *sizes: int) -> ir.Value:
        """(batch, *sizes) of one number."""
        tape = self.tape
        batch = tape.Slice(tape.Shape(self.outputs["logits"]), [0], [1])
        return tape.Expand(tape.floats(value), tape.Concat(batch, tape.value(list(sizes)), axis=0))

    def even(self) -> ir.Value | None:
        """Equal weights (batch, layers); None for a method without layers."""
        count = len(self.chosen)
        return None if count == 0 else self.full(1 / count, count)

    def scores(self, tape: Tape, logits: ir.Value, groups: tuple[int, int]) -> ir.Value:
        """Probabilities of the images' classes: logits of several runs for each image -> (runs, batch), or
        (batch, runs), in the order of the logits. groups: these two sizes, -1 for the batch.
        """
        probability = self.manifest.probability
        of_all = tape.Softmax(logits, axis=-1) if probability == "softmax" else tape.Sigmoid(logits)
        apart = tape.Reshape(of_all, [*groups, self.manifest.num_classes])
        own = tape.Unsqueeze(self.explained, [1 if groups[0] == -1 else 0])
        return tape.ReduceSum(tape.Mul(apart, own), [2], keepdims=0)


@dataclass(frozen=True)
class Compiled:
    """kind: the program that the file starts with. build: Source, options -> (map (batch, H, W), layer weights
    (batch, layers)). inputs: further inputs of the file, one number for each image; options: names that the file fixes;
    values: those that an option may have, where not all; feeds: Source, options -> the program's inputs by name, beside
    the image and the class as its seed.
    """

    kind: Kind
    build: Callable[..., Finished]
    inputs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    feeds: Callable[..., dict[str, ir.Value]] | None = None


def top_class(tape: Tape, logits: ir.Value, classes: int) -> ir.Value:
    """One-hot (batch, classes) of each image's top class, the first in a tie."""
    top = tape.Equal(tape.value(list(range(classes))), tape.ArgMax(logits, axis=1, keepdims=1))
    return tape.Cast(top, to=ir.DataType.FLOAT)
