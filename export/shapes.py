"""What a file's constants, its fixed sizes and a free batch determine: every shape, and the contents of computed sizes.

The graph is walked once with three batch sizes side by side: the one that the file was written for, and the next two. What is the
same in all three is static; a size that grows as the batch does is a multiple of the batch; nothing is guessed from a size of 1.
Contents are computed by ONNX's reference evaluator, shapes by ONNX's shape inference, node by node.

A file that was traced with a fixed batch holds literals, such as a Reshape to (1, 256), which would refuse or misread any other
batch. They are freed where the order of the elements says which size the batch belongs to.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import infer_node_outputs

from ..runtime.errors import ExportError, first_line
from .tape import attribute, constant_of, initializer, is_float

MOST_NUMBERS = 1 << 22  # of contents that are kept for each batch size
MOST_CONSTANT = 1 << 27  # of a constant that is computed
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
_AS_INPUT = {"GroupNormalization", "MeanVarianceNormalization", "Celu", "ThresholdedRelu", "LpNormalization"}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Facts:
    """Of one value: its shape at each batch size, and its contents where they are known; of_image: whether it is computed from
    the image's numbers, not merely from its sizes.
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


class ShapeWalk:
    """Facts about every value of a graph whose image is (batch, C, H, W).

    batches: the batch sizes that are walked; one alone where the batch is fixed. `edits` free pinned literals; nothing of the
    graph is changed before `apply`, but conditions that are known are resolved. literal: sizes that hold for every batch mean what
    they say, as in a file whose batch is free; else a 1 may be the batch that was traced.
    """

    def __init__(self, model: ir.Model, batches: Sequence[int], literal: bool = False) -> None:
        self._literal = literal
        self.graph = model.graph
        self.opset = model.opset_imports.get("", 1)
        self.ir_version = model.ir_version
        self.batches = tuple(batches)
        self.facts: dict[ir.Value, Facts] = {}
        self.inner: set[ir.Value] = set()  # values with the batch innermost in a merged size
        self.edits: list[Callable[[], None]] = []
        self._squeezed: ir.Node | None = None  # a Squeeze that would take out the batch of one image
        self._mixing: list[ir.Node] = []  # nodes that take the images of a batch together
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
                self._walk(node)
        live = self._live()
        for node in self._mixing:
            if node in live:
                raise BatchPinned(node, "takes the images of a batch together")

    def _live(self) -> set[ir.Node]:
        """Nodes that the outputs need: a branch that is not taken leaves others behind."""
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
            self._walk(node)

    # ---- one node

    def _walk(self, node: ir.Node) -> None:
        for x in node.inputs:
            if x is not None and x not in self.facts:
                self._note_constant(x)
        handler = getattr(self, f"_{node.op_type.lower()}", None) if node.domain in ("", "ai.onnx") else None
        if handler is None or not handler(node):
            if self._contents_known(node):
                self._compute(node)
            else:
                self._infer(node)
        self._check(node)

    def _check(self, node: ir.Node) -> None:
        """BatchPinned where rows are mixed, or a size is no multiple of the batch."""
        inputs = [self.facts[x] for x in node.inputs if x is not None]  # after handlers that leave inputs out
        of_image = any(f.of_image for f in inputs) and node.op_type not in ("Shape", "Size")
        varies = any(f.of_image and f.varies for f in inputs)
        for y in node.outputs:
            facts = self.facts.get(y)
            if facts is None:
                continue
            if of_image and not facts.of_image:
                facts = self.facts[y] = Facts(facts.shapes, facts.contents, True)  # its sizes alone are known
            if len({len(s) for s in facts.shapes}) > 1:
                raise BatchPinned(node, "gives another number of axes for another batch")
            if any(self.form(y, axis) is None for axis in range(len(facts.shapes[0]))):
                raise BatchPinned(node, "has a size that is no multiple of the batch")
            if varies and not facts.varies and is_float(y):
                self._mixing.append(node)
        if any(x in self.inner for x in node.inputs if x is not None) and node.op_type not in ("Reshape", "Flatten"):
            kept = {self._varying_size(x) for x in node.inputs if x in self.inner}
            self.inner.update(y for y in node.outputs if y in self.facts and self._varying_size(y) in kept)

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
        known = None
        if math.prod(shape) <= MOST_CONSTANT:
            known = (array.numpy(),) * len(self.batches)
        self.facts[value] = Facts((shape,) * len(self.batches), known)

    def _contents_known(self, node: ir.Node) -> bool:
        left = node.op_type in _LEFT | RANDOM
        if node.op_type == "DequantizeLinear":  # of a batch norm, say, whose numbers no engine takes as integers
            left = any(n.op_type in _PRODUCTS for n in node.outputs[0].consumers())
        if left or _has_subgraph(node) or node.domain not in ("", "ai.onnx"):
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
            kept = contents if contents[0].size <= limit else None
            self.facts[y] = Facts(tuple(tuple(c.shape) for c in contents), kept)
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
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, "" if node.domain == "ai.onnx" else node.domain)
        except Exception:
            raise ExportError(unknown_operator(node)) from None
        proto = ir.serde.serialize_node(node)
        del proto.output[:]
        proto.output.extend(f"y{i}" if y.name else "" for i, y in enumerate(node.outputs))
        del proto.input[:]
        proto.input.extend("" if x is None else f"x{i}" for i, x in enumerate(node.inputs))
        found: list[dict[str, tuple[int, Shape | None]]] = []
        for i, batch in enumerate(self.batches):
            try:
                found.append(self._inferred(schema, proto, node, i))
            except Exception as error:
                said = first_line(error).removeprefix("[ShapeInferenceError] ")[:160]
                if i == 0 and self._squeezed is not None:
                    reason = "takes out the batch axis of one image, and what follows needs that"
                    raise BatchPinned(self._squeezed, reason) from None
                if (i == 0 and len(set(self.batches)) > 1) or len(self.batches) == 1:
                    raise ExportError(f"the sizes that meet in {label(node)} do not fit ({said})") from None
                raise BatchPinned(node, f"is written for batch {self.batches[0]}, not {batch} ({said})") from None
        for k, y in enumerate(node.outputs):
            if not y.name:
                continue
            results = [f.get(f"y{k}") for f in found]
            shapes = [None if r is None else r[1] for r in results]
            if any(s is None for s in shapes):
                raise ExportError(
                    f"the sizes of {y.name!r}, which {label(node)} computes, depend on the image's numbers: "
                    "camrt needs sizes that the input's size determines"
                )
            self.facts[y] = Facts(tuple(s for s in shapes if s is not None))
            assert results[0] is not None
            y.type = ir.TensorType(ir.DataType(results[0][0]))

    def _inferred(self, schema, proto, node: ir.Node, i: int) -> dict[str, tuple[int, Shape | None]]:
        types, data = {}, {}
        for k, x in enumerate(node.inputs):
            if x is None:
                continue
            facts, kind = self.facts[x], x.dtype
            assert kind is not None, x.name
            types[f"x{k}"] = onnx.helper.make_tensor_type_proto(int(kind), facts.shapes[i])
            if facts.contents is not None and facts.contents[i].size <= 4096:
                data[f"x{k}"] = onnx.numpy_helper.from_array(facts.contents[i], f"x{k}")
        imports = [onnx.helper.make_opsetid("", self.opset)]
        result = infer_node_outputs(schema, proto, types, data, {}, imports, self.ir_version)
        found: dict[str, tuple[int, Shape | None]] = {}
        for name, kind in result.items():
            tensor = kind.tensor_type
            sizes = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
            known = tensor.HasField("shape") and None not in sizes
            found[name] = (tensor.elem_type, tuple(sizes) if known else None)  # type: ignore[arg-type]
        first = next((x for x in node.inputs if x is not None), None)
        if node.op_type in _AS_INPUT and first is not None and found.get("y0", (0, None))[1] is None:
            found["y0"] = (int(first.dtype), self.facts[first].shapes[i])  # type: ignore[arg-type]
        return found

    # ---- nodes of which inference knows less than we do; True where the handler settled the node

    def _shape(self, node: ir.Node) -> bool:
        x = node.inputs[0]
        assert x is not None
        start, end = attribute(node, "start", 0), attribute(node, "end")
        arrays = [np.array(s[start:end], np.int64) for s in self.facts[x].shapes]
        contents = tuple(arrays[:1] * len(arrays)) if not self.facts[x].varies else tuple(arrays)
        self._settle(node, contents)
        return True

    def _castlike(self, node: ir.Node) -> bool:
        """A Cast to the other's type."""
        x, like = node.inputs[0], node.inputs[1]
        assert x is not None and like is not None and like.dtype is not None
        node.op_type, node.version = "Cast", None
        node.attributes["to"] = ir.AttrInt64("to", like.dtype)
        node.resize_inputs(1)
        return False

    def _stopgradient(self, node: ir.Node) -> bool:
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None
        self.facts[y], y.type = self.facts[x], x.type
        return True

    def _size(self, node: ir.Node) -> bool:
        x = node.inputs[0]
        assert x is not None
        self._settle(node, tuple(np.array(math.prod(s), np.int64) for s in self.facts[x].shapes))
        return True

    def _settle(self, node: ir.Node, contents: tuple[np.ndarray, ...]) -> None:
        y = node.outputs[0]
        self.facts[y] = Facts(tuple(tuple(c.shape) for c in contents), contents)
        y.type = ir.TensorType(ir.DataType.INT64)

    def _squeeze(self, node: ir.Node) -> bool:
        """Without axes it takes out every 1, the batch's among them: the axes are written down."""
        if len(node.inputs) > 1 or attribute(node, "axes") is not None:
            return False
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None
        shapes = self.facts[x].shapes
        axes = [a for a in range(len(shapes[0])) if all(s[a] == 1 for s in shapes)]
        if shapes[0].count(1) > len(axes):
            self._squeezed = node
        contents = self.facts[x].contents
        kept = tuple(tuple(n for a, n in enumerate(s) if a not in axes) for s in shapes)
        new = None if contents is None else tuple(c.reshape(s) for c, s in zip(contents, kept, strict=True))
        self.facts[y], y.type = Facts(kept, new), x.type

        def write() -> None:
            if not axes:
                node.op_type, node.version = "Identity", None
                return
            node.resize_inputs(2)
            node.replace_input_with(1, initializer(self.graph, f"{y.name}_axes", np.array(axes, np.int64)))

        self.edits.append(write)
        return True

    def _gather(self, node: ir.Node) -> bool:
        """Every element of a vector in its order: a Reshape, as PyTorch's exporter writes the as_strided of a pooled map."""
        x, indices, y = node.inputs[0], node.inputs[1], node.outputs[0]
        assert x is not None and indices is not None
        taken, shapes = self.facts[indices], self.facts[x].shapes
        if taken.contents is None or len(shapes[0]) != 1 or not self.facts[x].varies or attribute(node, "axis", 0):
            return False
        for (size,), index in zip(shapes, taken.contents, strict=True):
            if not np.array_equal(index.reshape(-1), np.arange(size)):
                return False
        place = _changing(taken.shapes)
        if place is None:
            return False
        self.facts[y], y.type = Facts(taken.shapes), x.type
        literal = np.array([-1 if a == place else n for a, n in enumerate(taken.shapes[0])], np.int64)

        def write() -> None:
            node.op_type, node.version = "Reshape", None
            node.attributes.pop("axis", None)
            node.replace_input_with(1, initializer(self.graph, f"{y.name}_sizes", literal))

        self.edits.append(write)
        return True

    def _reshape(self, node: ir.Node) -> bool:
        x, target, y = node.inputs[0], node.inputs[1], node.outputs[0]
        assert x is not None and target is not None
        facts, wanted = self.facts[x], self.facts[target]
        if wanted.contents is None:
            raise ExportError(
                f"the sizes that {label(node)} gives depend on the image's numbers: camrt needs sizes that the input's "
                "size determines"
            )
        if facts.contents is not None and not facts.varies and wanted.constant is not None:
            return False  # a constant
        keeps_zero = bool(attribute(node, "allowzero", 0))
        resolved = [_resolve(s, t.tolist(), keeps_zero) for s, t in zip(facts.shapes, wanted.contents, strict=True)]
        if resolved[0] is None:
            sizes = wanted.contents[0].tolist()
            times, rest = divmod(math.prod(sizes), math.prod(facts.shapes[0]))
            held = f": the file holds a batch of {times}; write it with a batch of 1" if times > 1 and not rest else ""
            raise ExportError(f"{label(node)} cannot turn {list(facts.shapes[0])} into {sizes}{held}")
        y.type = x.type
        if not facts.varies or wanted.constant is None:
            if None in resolved:
                raise BatchPinned(node, f"is written for batch {self.batches[0]}")
            self.facts[y] = Facts(tuple(r for r in resolved if r is not None))
            self._note_inner(x, y)
            return True
        places = self._batch_places(x, resolved[0])
        if None not in resolved:
            given = _changing(resolved)  # type: ignore[arg-type]
            if given is not None and (self._literal or given in places[:1] or resolved[0][given] == self.batches[0]):
                self.facts[y] = Facts(tuple(r for r in resolved if r is not None))
                self._note_inner(x, y)
                return True
        if not places:
            raise BatchPinned(node, f"is written for batch {self.batches[0]}")
        place, first = places[0], resolved[0]
        grown = [
            tuple(n * b // self.batches[0] if a == place else n for a, n in enumerate(first)) for b in self.batches
        ]
        self.facts[y] = Facts(tuple(grown))
        self._note_inner(x, y)
        literal = np.array([-1 if a == place else n for a, n in enumerate(first)], np.int64)
        self.edits.append(lambda: node.replace_input_with(1, initializer(self.graph, f"{y.name}_sizes", literal)))
        return True

    def _prefix(self, x: ir.Value) -> int | None:
        """How many elements of x at the first batch size lie, in row-major order, outside the batch's place."""
        shapes = self.facts[x].shapes
        axis = _changing(shapes)
        if axis is None:
            return None
        outside = math.prod(shapes[0][:axis])
        return outside * (shapes[0][axis] // self.batches[0]) if x in self.inner else outside

    def _batch_places(self, x: ir.Value, out: Shape) -> list[int]:
        """The axes of `out`, a reshape of x at the first batch size, that the batch may belong to; the likeliest first.

        A reshape keeps row-major order, so the batch stays at its place in that order: at a boundary between two sizes or
        inside one. At a boundary a size of its own (1, or the batch traced) takes it; else the next size, or where the number
        of axes falls the one before, with which it was merged.
        """
        prefix, axis = self._prefix(x), _changing(self.facts[x].shapes)
        if prefix is None or axis is None:
            return []
        traced = self.batches[0]
        ends = np.cumprod([1, *out]).tolist()
        boundary = [j for j in range(len(out)) if ends[j] == prefix]
        own = [j for j in boundary if out[j] == traced]
        after = [j for j in boundary if out[j] % traced == 0 and j not in own]
        before = [j for j in range(len(out)) if ends[j] < prefix and prefix * traced <= ends[j + 1]]
        falls = len(out) < len(self.facts[x].shapes[0])
        return [*own, *(before + after if falls else after + before)]

    def _note_inner(self, x: ir.Value, y: ir.Value) -> None:
        """Whether y, a reshape of x, has the batch innermost in a merged size."""
        prefix, shapes = self._prefix(x), self.facts[y].shapes
        axis = _changing(shapes)
        if prefix is None or axis is None or shapes[0][axis] == self.batches[0]:
            return
        if math.prod(shapes[0][:axis]) != prefix:
            self.inner.add(y)

    def _expand(self, node: ir.Node) -> bool:
        """A literal that states the traced batch of what varies with the batch becomes a 1, which keeps any."""
        x, target, y = node.inputs[0], node.inputs[1], node.outputs[0]
        assert x is not None and target is not None
        literal = self.facts[target].constant
        if literal is None or not self.facts[x].varies or self.batches[0] == 1:
            return False
        shift = len(literal) - len(self.facts[x].shapes[0])
        axis = _changing(self.facts[x].shapes)
        if axis is None or shift + axis < 0 or literal[shift + axis] != self.facts[x].shapes[0][axis]:
            return False
        changed = literal.copy()
        changed[shift + axis] = 1
        self.facts[y] = Facts(tuple(tuple(np.broadcast_shapes(s, tuple(changed))) for s in self.facts[x].shapes))
        y.type = x.type
        self.edits.append(lambda: node.replace_input_with(1, initializer(self.graph, f"{y.name}_sizes", changed)))
        return True

    def _concat(self, node: ir.Node) -> bool:
        """What has the traced batch's literal size beside what varies is repeated to any batch: class tokens."""
        inputs = [x for x in node.inputs if x is not None]
        facts = [self.facts[x] for x in inputs]
        if all(f.contents is not None for f in facts) or not any(f.varies for f in facts):
            return False
        rank, traced = len(facts[0].shapes[0]), self.batches[0]
        axis = attribute(node, "axis") % rank
        beside = {a for f in facts if f.varies for a in [_changing(f.shapes)] if a is not None and a != axis}
        if len(beside) != 1:
            return False
        (place,) = beside
        like = next(x for x, f in zip(inputs, facts, strict=True) if f.varies)
        if self.facts[like].shapes[0][place] != traced:
            return False
        fixed = [i for i, f in enumerate(facts) if not f.varies]
        if not fixed or any(facts[i].shapes[0][place] != traced for i in fixed):
            return False
        if any(facts[i].of_image for i in fixed):
            raise BatchPinned(node, "joins what varies with the batch with what does not")
        if traced != 1 and any(not _rows_alike(facts[i].constant, place) for i in fixed):
            raise BatchPinned(node, f"joins other numbers for each of {traced} images")
        y = node.outputs[0]
        y.type = inputs[0].type
        joined = sum(f.shapes[0][axis] for f in facts)
        self.facts[y] = Facts(
            tuple(tuple(joined if a == axis else n for a, n in enumerate(s)) for s in self.facts[like].shapes)
        )
        self.edits.append(lambda: self._repeat(node, inputs, fixed, like, place))
        return True

    def _repeat(self, node: ir.Node, inputs: list[ir.Value], fixed: list[int], like: ir.Value, place: int) -> None:
        graph = self.graph
        for i in fixed:
            x = inputs[i]
            given = x.name
            sizes = list(self.facts[x].shapes[0])
            nodes = [ir.node("Shape", [like], {"start": place, "end": place + 1})]
            if sizes[place] != 1:
                bounds = [
                    initializer(graph, f"{given}_row{k}", np.array([n], np.int64)) for k, n in enumerate((0, 1, place))
                ]
                nodes.append(ir.node("Slice", [x, *bounds]))
                x = nodes[-1].outputs[0]
            ones = [np.ones(place, np.int64), np.ones(len(sizes) - 1 - place, np.int64)]
            left, right = ([initializer(graph, f"{given}_ones{k}", a)] if a.size else [] for k, a in enumerate(ones))
            parts = [*left, nodes[0].outputs[0], *right]
            nodes.append(ir.node("Concat", parts, {"axis": 0}))
            nodes.append(ir.node("Expand", [x, nodes[-1].outputs[0]]))
            for k, made in enumerate(nodes):
                made.outputs[0].name = f"{node.outputs[0].name}_{given}_{k}"
                made.name = made.outputs[0].name
            graph.insert_before(node, nodes)
            node.replace_input_with(i, nodes[-1].outputs[0])
            self._settle(nodes[0], tuple(np.array([b], np.int64) for b in self.batches))
            for made in nodes[1:]:
                self._walk(made)

    def _resize(self, node: ir.Node) -> bool:
        """Literal sizes state the traced batch: they become scales where those give the same sizes."""
        x = node.inputs[0]
        sizes = node.inputs[3] if len(node.inputs) > 3 else None
        if x is None or sizes is None or attribute(node, "axes") is not None:
            return False
        known = self.facts[sizes].contents
        if known is None:
            return False
        shapes, first = self.facts[x].shapes, known[0].tolist()
        axis = _changing(shapes)
        if axis is not None and first[axis] != shapes[0][axis]:
            return False
        scales = np.array([f / n for f, n in zip(first, shapes[0], strict=True)], np.float32)
        if any(int(np.float32(n) * s) != f for n, s, f in zip(shapes[0], scales, first, strict=True)):
            return False
        if attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
            return False
        y = node.outputs[0]
        y.type = x.type
        self.facts[y] = Facts(tuple(tuple(s[a] if a == axis else n for a, n in enumerate(first)) for s in shapes))

        def write() -> None:
            node.resize_inputs(3)
            node.replace_input_with(2, initializer(self.graph, f"{y.name}_scales", scales))

        self.edits.append(write)
        return True

    def _resolved(self, node: ir.Node) -> list[ir.Node]:
        """The nodes of the branch that an If takes, put in its place. ExportError where that is not known."""
        condition = node.inputs[0]
        assert condition is not None
        if condition not in self.facts:
            self._note_constant(condition)
        known = self.facts[condition].contents
        if known is not None and len({bool(c.reshape(-1)[0]) for c in known}) > 1:
            raise BatchPinned(node, "chooses by the number of images")
        if known is None:
            raise ExportError(f"control flow: {label(node)} chooses by the image's numbers: camrt needs a fixed graph")
        branch = node.attributes["then_branch" if known[0].reshape(-1)[0] else "else_branch"].as_graph()
        results = list(branch.outputs)
        for name, value in list(branch.initializers.items()):
            assert value.const_value is not None
            copy = initializer(self.graph, f"{node.outputs[0].name}_{name}", value.const_value.numpy())
            value.replace_all_uses_with(copy)
            results = [copy if r is value else r for r in results]
        moved = list(branch)
        branch.outputs.clear()
        branch.remove(moved)
        for inner in moved:
            for y in inner.outputs:
                y.name = f"{node.outputs[0].name}_{y.name}"
        self.graph.insert_before(node, moved)
        passed = []
        for y, result in zip(list(node.outputs), results, strict=True):
            same = ir.node("Identity", [result])
            same.outputs[0].name, same.outputs[0].type = y.name, y.type
            passed.append(same)
        self.graph.insert_before(node, passed)
        for y, same in zip(list(node.outputs), passed, strict=True):
            y.replace_all_uses_with(same.outputs[0], replace_graph_outputs=True)
        self.graph.remove(node, safe=False)
        return [*moved, *passed]

    # ---- what was found, written into the graph

    def apply(self) -> None:
        """Frees pinned literals, makes constants of what is known, and gives every value its shape."""
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
        known = [self.facts[y].constant if y in self.facts else None for y in node.outputs]
        if any(array is None for array, y in zip(known, node.outputs, strict=True) if y.uses() or y.is_graph_output()):
            return
        if any(y.is_graph_output() for y in node.outputs):
            return
        for y, array in zip(node.outputs, known, strict=True):
            if array is not None and y.uses():
                value = initializer(self.graph, f"{y.name}_value", array)
                self.facts[value] = Facts((tuple(array.shape),) * len(self.batches), (array,) * len(self.batches))
                y.replace_all_uses_with(value)
        self.graph.remove(node, safe=False)

    def _settle_target(self, node: ir.Node) -> None:
        """Sizes that are known but for the batch become a constant target."""
        target, y = node.inputs[1], node.outputs[0]
        forms = [self.form(y, axis) for axis in range(len(self.facts[y].shapes[0]))] if y in self.facts else [None] * 2
        if constant_of(target) is None and sum(not isinstance(f, int) for f in forms) <= 1:
            literal = np.array([f if isinstance(f, int) else -1 for f in forms], np.int64)
            node.replace_input_with(1, initializer(self.graph, f"{y.name}_sizes", literal))


def evaluate_node(node: ir.Node, names: Sequence[str], feeds: dict, opset: int, ir_version: int) -> list[np.ndarray]:
    """What ONNX's reference evaluator gives for one node. names: of its inputs, "" for one that is left out. ExportError."""
    proto = ir.serde.serialize_node(node)
    del proto.input[:]
    proto.input.extend(names)
    outputs = [f"y{i}" for i in range(len(node.outputs))]
    del proto.output[:]
    proto.output.extend(outputs)
    make = onnx.helper.make_tensor_value_info
    inputs = [make(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), None) for n, a in feeds.items()]
    graph = onnx.helper.make_graph([proto], "node", inputs, [make(n, 0, None) for n in outputs])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=ir_version)
    try:
        return [np.asarray(a) for a in ReferenceEvaluator(model).run(outputs, feeds)]  # type: ignore[arg-type]
    except Exception as error:
        raise ExportError(f"{label(node)} cannot be computed from its constants ({first_line(error)[:160]})") from None


def unknown_operator(node: ir.Node) -> str:
    """Says which operator is not known, and what to do."""
    where = (
        f"the operator {node.domain + '.' if node.domain not in ('', 'ai.onnx') else ''}{node.op_type} ({label(node)})"
    )
    if node.domain in ("com.microsoft", "com.microsoft.nchwc", "com.microsoft.experimental"):
        return (
            f"{where} is ONNX Runtime's own, written by its optimiser: export the file that the optimiser was given, or one "
            "without fusions"
        )
    if node.domain not in ("", "ai.onnx"):
        return f"{where} is a custom one: camrt differentiates ONNX's own operators; export the model with those"
    return (
        f"{where} is none of ONNX's at this opset, nor of the installed onnx {onnx.__version__}: a converter left it as it was; convert "
        "the model with a newer converter, or with the operator written in others"
    )


def _has_subgraph(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def _changing(shapes: Sequence[Shape]) -> int | None:
    """The one axis whose size changes with the batch; None if there is none, or several."""
    changing = [a for a, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    return changing[0] if len(changing) == 1 else None


def _rows_alike(array: np.ndarray | None, axis: int) -> bool:
    return array is not None and bool((array == array.take([0], axis)).all())


def _resolve(shape: Shape, target: Sequence[int], keeps_zero: bool) -> Shape | None:
    """The sizes that a Reshape gives; None where they do not fit."""
    sizes = [shape[i] if n == 0 and not keeps_zero and i < len(shape) else n for i, n in enumerate(target)]
    count, known = math.prod(shape), math.prod(n for n in sizes if n != -1)
    if -1 in sizes:
        if known == 0 or count % known:
            return None
        sizes[sizes.index(-1)] = count // known
    return tuple(sizes) if math.prod(sizes) == count else None
