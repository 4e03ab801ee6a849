"""Puts programs of a bundle into one graph."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir


class Inliner:
    """Copies programs into one graph, or into the body of a loop in it. A weight that several programs read is kept
    once.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._shared = {key: v for v in graph.initializers.values() if (key := _place(v)) is not None}
        self._copies = 0

    def __call__(self, model: ir.Model, feeds: Mapping[str, ir.Value], into: ir.Graph) -> dict[str, ir.Value]:
        """Moves a model's nodes to the end of `into`, and returns its outputs by name. feeds: what its inputs become.

        The model is empty afterwards. Weights stay in the main graph, where the body of a loop reads them as well.
        """
        source, self._copies = model.graph, self._copies + 1
        for value in source.inputs:
            value.replace_all_uses_with(feeds[str(value.name)])
        outputs = {str(v.name): v for v in source.outputs}
        source.outputs.clear()
        for name, value in list(source.initializers.items()):
            del source.initializers[name]
            key = _place(value)
            if key is not None and key in self._shared:
                value.replace_all_uses_with(self._shared[key])
                continue
            value.name = f"{name}.{self._copies}"
            self._graph.register_initializer(value)
            if key is not None:
                self._shared[key] = value
        nodes = list(source)
        for node in nodes:
            for y in node.outputs:
                y.name = f"{y.name}.{self._copies}"
        source.remove(nodes)
        into.extend(nodes)
        return outputs


def _place(value: ir.Value) -> tuple | None:
    """Where a weight lies in the bundle's weights file; None for one that lies in the program."""
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        return None
    return tensor.location, tensor.offset, tensor.length, tensor.dtype, tuple(tensor.shape)
