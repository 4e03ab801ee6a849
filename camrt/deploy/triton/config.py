"""Text of a model's config.pbtxt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_LARGEST_WARM_UP = 64  # images
DATA_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "string": "TYPE_STRING"}


@dataclass(frozen=True)
class Tensor:
    """dims: without the batch; -1 for any size. A tensor with one number for each image has none."""

    name: str
    kind: str
    dims: tuple[int, ...]
    optional: bool = False

    def text(self) -> str:
        parts = [f"name: {_quoted(self.name)}", f"data_type: {DATA_TYPES[self.kind]}"]
        parts.append(f"dims: [{', '.join(map(str, self.dims or (1,)))}]")
        if not self.dims:
            parts.append("reshape { shape: [] }")
        if self.optional:
            parts.append("optional: true")
        return f"  {{ {', '.join(parts)} }}"


@dataclass(frozen=True)
class ModelConfig:
    """What Triton must know of a model. batch: the most images in one execution; delay: milliseconds that one waits for
    more requests; gpu: instances on GPUs; parameters: for the Python backend. warm: inputs that warm-up requests have.
    """

    name: str
    backend: str
    batch: int
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    warm: Sequence[str]
    delay: float = 2.0
    gpu: bool = False
    instances: int = 1
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The whole file."""
        kind = "KIND_GPU" if self.gpu else "KIND_CPU"
        lines = [
            f"name: {_quoted(self.name)}",
            f"backend: {_quoted(self.backend)}",
            f"max_batch_size: {self.batch}",
            *_listed("input", [t.text() for t in self.inputs]),
            *_listed("output", [t.text() for t in self.outputs]),
            f"instance_group [ {{ kind: {kind}, count: {self.instances} }} ]",
        ]
        if self.batch > 1:
            lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {round(self.delay * 1000)} }}")
        for name, value in self.parameters.items():
            lines.append(f"parameters {{ key: {_quoted(name)}, value {{ string_value: {_quoted(str(value))} }} }}")
        for size in sorted({1, min(self.batch, _LARGEST_WARM_UP)}):
            lines += self._warm_up(size)
        return "\n".join(lines) + "\n"

    def _warm_up(self, size: int) -> list[str]:
        inputs = []
        for tensor in (t for t in self.inputs if t.name in self.warm):
            dims = ", ".join(map(str, tensor.dims or (1,)))
            value = f"data_type: {DATA_TYPES[tensor.kind]}, dims: [{dims}], zero_data: true"
            inputs.append(f"  inputs {{ key: {_quoted(tensor.name)}, value {{ {value} }} }}")
        return ["model_warmup {", f'  name: "batch of {size}", batch_size: {size}', *inputs, "}"]


def _listed(name: str, items: list[str]) -> list[str]:
    return [f"{name} [", ",\n".join(items), "]"]


def _quoted(text: str) -> str:
    return json.dumps(text)
