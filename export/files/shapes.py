"""Finds every shape of a graph, and the contents of computed sizes, from constants, fixed sizes and a free batch.

The graph is walked once with three batch sizes side by side: the one that the file was written for, and the next two.
A size that is equal in all three is static; a size that grows with the batch is a multiple of the batch; a size of 1
alone is never taken as evidence of the batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from ...runtime.errors import ExportError, first_line
from ..tape import constant_of, initializer, is_float
from .branches import inline_branch
from .evaluation import NodeInference, evaluate_node, has_subgraph
from .facts import BatchPinned, Facts, Multiple, Shape, label
from .shape_rules import RULES

MOST_NUMBERS = 1 << 22  # largest contents that are kept for each batch size, in numbers
MOST_CONSTANT = 1 << 27  # largest contents that are kept if they are equal at all batch sizes, in numbers
# contents are not computed for these: weights stay quantised as deployed, and what is slow is left to the engine
_LEFT = {
    "DequantizeLinear",
    "QuantizeLinear",
    "Conv",
    "ConvTranspose",
    "Resize",
    "GridSample",
    "Einsum",
    "ImageDecoder",
}
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}


class ShapeWalk:
    """Facts about every value of a graph whose image is (batch, C, H, W).

    batches: the batch sizes that are walked; a single one if the batch is fixed. `edits`: functions that replace
    literals which fix the batch; `apply` calls them. Before `apply` only an If with a known condition and a CastLike
    are replaced. literal: whether literal sizes are used as they are written, as in a file with a free batch; else a
    literal 1 may be the batch of the traced run.

    ExportError if sizes do not fit, or depend on pixel values; BatchPinned if the batch cannot be free.
    """

    def __init__(self, model: ir.Model, batches: Sequence[int], literal: bool = False) -> None:
        self.literal = literal
        self.graph = model.graph
        self.opset = model.opset_imports.get("", 1)
        self.ir_version = model.ir_version
        self.batches = tuple(batches)
        self.facts: dict[ir.Value, Facts] = {}
        self.inner: set[ir.Value] = set()  # values with the batch innermost in a merged size
        self.edits: list[Callable[[], None]] = []
        self.squeezed: ir.Node | None = None  # a Squeeze without axes, which would remove a batch of 1
        self._mixing: list[ir.Node] = []  # nodes that mix the images of a batch
        image = self.graph.inputs[0]
        assert image.shape is not None
        sizes = tuple(d for d in image.shape[1:] if isinstance(d, int))
        self.facts[image] = Facts(tuple((b, *sizes) for b in self.batches), None, True)
        for value in self.graph.initializers.values():
            self._note_constant(value)
        pending = deque(self.graph)
        while pending:
            node = pending.popleft()
            if node.op_type == "If":
                pending.extendleft(reversed(self._resolved(node)))
            else:
                self.walk(node)
        live = self._live()
        for node in self._mixing:
            if node in live:
                raise BatchPinned(node, "mixes the images of a batch")

    def _live(self) -> set[ir.Node]:
        """Nodes that the outputs need. Others are left over from branches that were not taken."""
        live: set[ir.Node] = set()
        pending = [v.producer() for v in self.graph.outputs]
        while pending:
            node = pending.pop()
            if node is not None and node not in live:
                live.add(node)
                pending += [x.producer() for x in node.inputs if x is not None]
        return live

    def note(self, nodes: Sequence[ir.Node]) -> None:
        """Facts about nodes that were put into the graph after the walk."""
        for node in nodes:
            self.walk(node)

    # ---- one node

    def walk(self, node: ir.Node) -> None:
        """Finds the facts about a node's outputs. ExportError, BatchPinned."""
        for x in node.inputs:
            if x is not None and x not in self.facts:
                self._note_constant(x)
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None or not rule(self, node):
            if self._contents_known(node):
                self._compute(node)
            else:
                self._infer(node)
        self._check(node)

    def _check(self, node: ir.Node) -> None:
        """Notes nodes that mix images. BatchPinned if a size is not a multiple of the batch, or the number of axes
        changes.
        """
        inputs = [self.facts[x] for x in node.inputs if x is not None]  # after handlers that leave inputs out
        of_image = any(f.of_image for f in inputs) and node.op_type not in ("Shape", "Size")
        varies = any(f.of_image and f.varies for f in inputs)
        for y in node.outputs:
            facts = self.facts.get(y)
            if facts is None:
                continue
            if of_image and not facts.of_image:
                facts = self.facts[y] = Facts(facts.shapes, facts.contents, True)  # so far only its sizes were noted
            if len({len(s) for s in facts.shapes}) > 1:
                raise BatchPinned(node, "gives a number of axes that changes with the batch")
            if any(self.form(y, axis) is None for axis in range(len(facts.shapes[0]))):
                raise BatchPinned(node, "has a size that is no multiple of the batch")
            if varies and not facts.varies and is_float(y):
                self._mixing.append(node)
        if any(x in self.inner for x in node.inputs if x is not None) and node.op_type not in ("Reshape", "Flatten"):
            inner_sizes = {self._varying_size(x) for x in node.inputs if x in self.inner}
            self.inner.update(y for y in node.outputs if y in self.facts and self._varying_size(y) in inner_sizes)

    def _varying_size(self, value: ir.Value) -> int | None:
        shapes = self.facts[value].shapes
        changing = [sizes[0] for sizes in zip(*shapes, strict=True) if len(set(sizes)) > 1]
        return changing[0] if len(changing) == 1 else None

    def form(self, value: ir.Value, axis: int) -> int | Multiple | None:
        """A size: a number, a multiple of the batch, or None for anything else."""
        sizes = [s[axis] for s in self.facts[value].shapes]
        if len(set(sizes)) == 1:
            return sizes[0]
        times = sizes[0] // self.batches[0]
        return Multiple(times) if [times * b for b in self.batches] == sizes else None

    def _note_constant(self, value: ir.Value) -> None:
        array = value.const_value
        if array is None:
            raise ExportError(f"the model reads {value.name!r}, which nothing computes")
        shape = tuple(int(n) for n in array.shape.numpy())
        contents = None
        if math.prod(shape) <= MOST_CONSTANT:
            contents = (array.numpy(),) * len(self.batches)
        self.facts[value] = Facts((shape,) * len(self.batches), contents)

    def _contents_known(self, node: ir.Node) -> bool:
        left = node.op_type in _LEFT | RANDOM
        if node.op_type == "DequantizeLinear":  # only products take integer weights; a batch norm needs floats
            left = any(n.op_type in _PRODUCTS for n in node.outputs[0].consumers())
        if left or has_subgraph(node) or node.domain not in ("", "ai.onnx"):
            return False
        return all(x is None or self.facts[x].contents is not None for x in node.inputs) and any(
            x is not None for x in node.inputs
        )

    def _compute(self, node: ir.Node) -> None:
        """The contents of a node's outputs, by ONNX's reference evaluator; large results keep their shape alone."""
        facts = [None if x is None else self.facts[x] for x in node.inputs]
        runs: list[list[np.ndarray]] = []
        for i in range(len(self.batches)):
            feeds = [None if f is None else f.contents[i] for f in facts]  # type: ignore[index]
            earlier = next(
                (j for j in range(i) if all(f is None or f.contents[i] is f.contents[j] for f in facts)),  # type: ignore[index]
                None,
            )
            runs.append(runs[earlier] if earlier is not None else self._evaluate(node, feeds))
        for k, y in enumerate(node.outputs):
            contents = tuple(run[k] for run in runs)
            same = all(c is contents[0] for c in contents)
            limit = MOST_CONSTANT if same else MOST_NUMBERS
            small_contents = contents if contents[0].size <= limit else None
            self.facts[y] = Facts(tuple(tuple(c.shape) for c in contents), small_contents)
            if y.type is None:
                y.type = ir.TensorType(ir.DataType.from_numpy(contents[0].dtype))

    def _evaluate(self, node: ir.Node, feeds: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        names = ["" if f is None else f"x{i}" for i, f in enumerate(feeds)]
        inputs = {n: f for n, f in zip(names, feeds, strict=True) if n}
        oldest = 19 if node.op_type == "DequantizeLinear" else 1  # that the evaluator knows
        opset = max(self.opset, oldest)
        return evaluate_node(node, names, inputs, opset, self.ir_version)

    def _infer(self, node: ir.Node) -> None:
        """Shapes and types by ONNX's shape inference, which is given the contents that are known."""
        infer = NodeInference(node, self.opset, self.ir_version)
        facts = [None if x is None else self.facts[x] for x in node.inputs]
        outputs_by_batch: list[list[tuple[int, Shape | None] | None]] = []
        for i, batch in enumerate(self.batches):
            try:
                contents = [None if f is None or f.contents is None else f.contents[i] for f in facts]
                outputs_by_batch.append(infer([None if f is None else f.shapes[i] for f in facts], contents))
            except Exception as error:
                message = first_line(error).removeprefix("[ShapeInferenceError] ")[:160]
                if i == 0 and self.squeezed is not None:
                    reason = "removes the batch axis of a single image, which later nodes need"
                    raise BatchPinned(self.squeezed, reason) from None
                if (i == 0 and len(set(self.batches)) > 1) or len(self.batches) == 1:
                    raise ExportError(f"the input sizes of {label(node)} do not fit together ({message})") from None
                raise BatchPinned(node, f"is written for batch {self.batches[0]}, not {batch} ({message})") from None
        for k, y in enumerate(node.outputs):
            if not y.name:
                continue
            results = [outputs[k] for outputs in outputs_by_batch]
            shapes = [None if r is None else r[1] for r in results]
            if any(s is None for s in shapes):
                raise ExportError(
                    f"the sizes of {y.name!r}, which {label(node)} computes, depend on the image's pixel values: camrt "
                    "needs sizes that depend only on the input's size"
                )
            self.facts[y] = Facts(tuple(s for s in shapes if s is not None))
            assert results[0] is not None
            y.type = ir.TensorType(ir.DataType(results[0][0]))

    def _resolved(self, node: ir.Node) -> list[ir.Node]:
        """Replaces an If by the branch that it takes and returns its nodes. ExportError if the condition depends on
        pixel values, BatchPinned if it depends on the batch.
        """
        condition = node.inputs[0]
        assert condition is not None
        if condition not in self.facts:
            self._note_constant(condition)
        contents = self.facts[condition].contents
        if contents is not None and len({bool(c.reshape(-1)[0]) for c in contents}) > 1:
            raise BatchPinned(node, "chooses its branch by the number of images")
        if contents is None:
            raise ExportError(
                f"control flow: {label(node)} chooses its branch by the image's pixel values: camrt needs a fixed graph"
            )
        return inline_branch(self.graph, node, bool(contents[0].reshape(-1)[0]))

    # ---- what was found, written into the graph

    def apply(self) -> None:
        """Applies `edits`, replaces values with known contents by constants, and gives every value its shape."""
        for edit in self.edits:
            edit()
        for node in list(self.graph):
            self._fold(node)
        for node in self.graph:
            for y in node.outputs:
                if y in self.facts:
                    y.shape = self.shape(y)
        for node in self.graph:
            if node.op_type == "Reshape":
                self._settle_target(node)

    def shape(self, value: ir.Value) -> ir.Shape:
        forms = [self.form(value, axis) for axis in range(len(self.facts[value].shapes[0]))]
        return ir.Shape([f if isinstance(f, int) else str(f) for f in forms])

    def _fold(self, node: ir.Node) -> None:
        arrays = [self.facts[y].constant if y in self.facts else None for y in node.outputs]
        if any(array is None for array, y in zip(arrays, node.outputs, strict=True) if y.uses() or y.is_graph_output()):
            return
        if any(y.is_graph_output() for y in node.outputs):
            return
        for y, array in zip(node.outputs, arrays, strict=True):
            if array is not None and y.uses():
                value = initializer(self.graph, f"{y.name}_value", array)
                self.facts[value] = Facts((tuple(array.shape),) * len(self.batches), (array,) * len(self.batches))
                y.replace_all_uses_with(value)
        self.graph.remove(node, safe=False)

    def _settle_target(self, node: ir.Node) -> None:
        """Makes a Reshape's target a constant if every size except the batch is known."""
        target, y = node.inputs[1], node.outputs[0]
        forms = [self.form(y, axis) for axis in range(len(self.facts[y].shapes[0]))] if y in self.facts else [None] * 2
        if constant_of(target) is None and sum(not isinstance(f, int) for f in forms) <= 1:
            literal = np.array([f if isinstance(f, int) else -1 for f in forms], np.int64)
            node.replace_input_with(1, initializer(self.graph, f"{y.name}_sizes", literal))
