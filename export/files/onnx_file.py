"""A user's ONNX file -> a model in opset 18 or later, float32, without functions. Sizes are settled later, in
prepare.py.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from ...runtime.errors import ExportError, first_line
from ..graph import run_passes
from ..tape import attribute, constant_of
from .evaluation import unknown_operator
from .facts import label
from .quantised import to_qdq
from .shapes import RANDOM

OPSET = 18  # the oldest opset whose forms the gradient rules read; older models are converted to it
OLDEST = 9  # the oldest opset that is converted
_LARGE = 1024  # bytes; larger constants are set aside while a model is converted

_WIDE = (ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_WORDS = {ir.DataType.DOUBLE: "float64", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


def read_model(path: Path) -> ir.Model:
    """Reads a file, its weights from beside it, whichever the current folder is. ExportError if it is not a usable
    model.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    try:
        with _quiet_logs():
            model = ir.load(path)
    except Exception as error:
        raise ExportError(_unreadable(path, error)) from error
    _check_versions(path, model)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            _check_beside(path, str(tensor.location))
        try:
            assert tensor is not None
            tensor.numpy()
        except Exception as error:
            raise ExportError(
                f"{path}: its tensor {value.name!r:.100} is damaged ({first_line(error)[:100]})"
            ) from error
    return model


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keeps remarks on attributes that nothing reads from a user who can do nothing about them."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _unreadable(path: Path, error: Exception) -> str:
    """Why a file cannot be read: what its outputs are, or what the reader says."""
    try:
        outputs = onnx.load(str(path), load_external_data=False).graph.output
    except Exception:
        outputs = []
    listed = [v.name for v in outputs if v.type.WhichOneof("value") not in ("tensor_type", None)]
    if listed:
        return (
            f"{path}: its outputs {', '.join(listed)} are sequences or maps: camrt needs the scores as a tensor; "
            "export the model without the step that makes lists of them (zipmap=False)"
        )
    return f"{path}: not readable as ONNX ({first_line(error)[:200]})"


def _check_versions(path: Path, model: ir.Model) -> None:
    if model.ir_version > onnx.IR_VERSION:
        raise ExportError(
            f"{path}: IR version {model.ir_version}, the installed onnx {onnx.__version__} knows {onnx.IR_VERSION}: "
            "install a newer onnx, or write the file with an older one"
        )
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    newest = onnx.defs.onnx_opset_version()
    if opset is None:
        raise ExportError(f"{path}: imports no ONNX operators (only {', '.join(model.opset_imports) or 'none'})")
    if opset > newest:
        raise ExportError(
            f"{path}: opset {opset}, the installed onnx {onnx.__version__} knows {newest}: install a newer onnx, or "
            f"export the model with opset {newest}"
        )
    if opset < OLDEST:
        raise ExportError(f"{path}: opset {opset}, camrt reads opset {OLDEST} and later: export the model again")


def _check_beside(path: Path, location: str) -> None:
    """ExportError unless weights lie in a file beside the ONNX file, or below."""
    place = Path(location)
    if place.is_absolute() or ".." in place.parts:
        raise ExportError(f"{path}: its weights lie in {location!r}, outside its folder: move them beside it")
    if not (path.parent / place).is_file():
        raise ExportError(f"{path}: its weights lie in {location!r}, which is missing beside it")


def modernise(model: ir.Model) -> ir.Model:
    """The same model in opset 18 or later and float32, without local functions, Constant nodes, initializers among the
    inputs, or imports that nothing uses. Integer arithmetic becomes QuantizeLinear and DequantizeLinear where that is
    exact.

    ExportError names an operator that camrt cannot read.
    """
    _with_short_domain(model)
    run_passes(
        model,
        passes.ClearMetadataAndDocStringPass(),
        passes.InlinePass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.RemoveInitializersFromInputsPass(),
        passes.RemoveUnusedNodesPass(),
        passes.TopologicalSortPass(),
    )
    to_qdq(model)
    _unlist(model.graph)
    _refuse_foreign(model)
    for domain in [d for d in model.opset_imports if d]:
        del model.opset_imports[domain]
    version = model.opset_imports.get("", 0)
    _as_evaluated(model.graph)
    if version < OPSET:
        model = _converted(model, version)
        run_passes(model, passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0))
    as_float32(model)
    run_passes(model, passes.IdentityEliminationPass(), passes.RemoveUnusedNodesPass(), passes.NameFixPass())
    return model


def _with_short_domain(model: ir.Model) -> None:
    """Replaces the domain "ai.onnx" by its short name, the empty string."""
    version = model.opset_imports.pop("ai.onnx", None)
    if version is not None:
        model.opset_imports.setdefault("", version)
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            node.domain = "" if node.domain == "ai.onnx" else node.domain


def _as_evaluated(graph: ir.Graph) -> None:
    """Switches active Dropout off, with a warning. ExportError for random numbers and for batch norms in training mode.

    Dropout and batch norms count only if they depend on the image: a weight that a batch norm in training mode
    standardises is a constant.
    """
    active, of_image = [], set(graph.inputs)
    for node in graph:
        if node.op_type in RANDOM:
            raise ExportError(
                f"{label(node)} draws random numbers, so that no two runs score an image alike: export the model in "
                "evaluation mode (model.eval(), training=False)"
            )
        if not any(x in of_image for x in node.inputs):
            continue
        of_image.update(node.outputs)
        if node.op_type == "BatchNormalization" and (attribute(node, "training_mode", 0) or len(node.outputs) > 1):
            raise ExportError(
                f"{label(node)} normalises with the statistics of its batch, as in training: export the model in "
                "evaluation mode (model.eval(), training=False)"
            )
        training = node.inputs[2] if node.op_type == "Dropout" and len(node.inputs) > 2 else None
        if training is not None:
            chosen = constant_of(training)
            if chosen is None or chosen.any():
                active.append(label(node))
            node.resize_inputs(1)
    if active:
        warnings.warn(f"{', '.join(active)} drops units at random, as in training: removed", stacklevel=5)


def _refuse_foreign(model: ir.Model) -> None:
    """ExportError for the first operator that is not ONNX's own."""
    version = model.opset_imports.get("", 0)
    for node in model.graph.all_nodes():
        is_mark = (node.domain, node.op_type) == ("camrt", "StopGradient")
        if not is_mark and not (not node.domain and onnx.defs.has(node.op_type, version, "")):
            raise ExportError(unknown_operator(node))
        if node.op_type in ("Loop", "Scan"):
            raise ExportError(
                f"control flow: {label(node)} repeats a part of the graph: camrt needs a fixed graph; export the model "
                "without loops"
            )
        if node.op_type.startswith(("Sequence", "SplitToSequence", "ConcatFromSequence", "Optional")):
            raise ExportError(
                f"a sequence: {label(node)} works on a list of tensors: camrt needs single tensors; export the model "
                "without"
            )


def _unlist(graph: ir.Graph) -> None:
    """Replaces SplitToSequence by Split where its parts have known sizes and are read at constant positions."""
    for node in list(graph):
        takers = node.outputs[0].consumers()
        places = [constant_of(n.inputs[1]) for n in takers if n.op_type == "SequenceAt"]
        if node.op_type != "SplitToSequence" or len(places) != len(takers) or any(p is None for p in places):
            continue
        sizes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
        if not attribute(node, "keepdims", 1) or sizes is None or sizes.ndim != 1:
            continue
        split = ir.node(
            "Split", list(node.inputs), {"axis": attribute(node, "axis", 0)}, num_outputs=len(sizes), name=node.name
        )
        for i, y in enumerate(split.outputs):
            y.name = f"{node.outputs[0].name}_{i}"
        graph.insert_before(node, [split])
        for taker, place in zip(takers, places, strict=True):
            taker.outputs[0].replace_all_uses_with(split.outputs[int(place.reshape(-1)[0])], replace_graph_outputs=True)  # type: ignore[union-attr]
            graph.remove(taker, safe=False)
        graph.remove(node, safe=False)


def _converted(model: ir.Model, version: int) -> ir.Model:
    """The model in opset 18, by onnx's converter. Large constants are set aside meanwhile: the converter does not copy
    them or look for their files.
    """
    graph, aside = model.graph, {}
    for name, value in list(graph.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes > _LARGE:
            aside[name] = value.const_value
            value.type, value.shape = ir.TensorType(value.const_value.dtype), value.const_value.shape  # type: ignore[assignment]
            value.const_value = None
            del graph.initializers[name]
            graph.inputs.append(value)
    model.ir_version = max(model.ir_version, 4)
    proto = ir.to_proto(model)
    for tensor in proto.graph.initializer:
        if tensor.external_data:  # a small one that lies beside the file
            const_value = graph.initializers[tensor.name].const_value
            assert const_value is not None
            tensor.CopyFrom(onnx.numpy_helper.from_array(const_value.numpy(), tensor.name))
    try:
        model = ir.from_proto(onnx.version_converter.convert_version(proto, OPSET))
    except Exception as error:
        raise ExportError(
            f"opset {version} could not be converted to {OPSET}: {first_line(error)[:200]}; export the model with "
            f"opset {OPSET}"
        ) from error
    graph = model.graph
    for node in graph:
        if version < 11 and node.op_type == "Resize":  # the converter does not write the modes that came later
            node.attributes["coordinate_transformation_mode"] = ir.AttrString(
                "coordinate_transformation_mode", "asymmetric"
            )
            node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "floor")
    for value in [v for v in graph.inputs if v.name in aside]:
        graph.inputs.remove(value)
        value.const_value = aside[value.name]
        graph.register_initializer(value)
    return model


def computes_in_half(model: ir.Model) -> bool:
    """Whether weights or values are in float16 or bfloat16."""
    kinds = {v.const_value.dtype for v in model.graph.initializers.values() if v.const_value is not None}
    kinds |= {ir.DataType(attribute(n, "to")) for n in model.graph.all_nodes() if n.op_type == "Cast"}
    return bool(kinds & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def as_float32(model: ir.Model) -> None:
    """Makes every float16, bfloat16 and float64 tensor float32, the image and the logits included; warns once."""
    wide_types = set()
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype in _WIDE:
                wide_types.add(value.const_value.dtype)
                value.const_value = ir.tensor(to_float32(value.const_value.numpy()), name=value.name)
                value.type = ir.TensorType(ir.DataType.FLOAT)
        for value in (*graph.inputs, *graph.outputs, *(y for node in graph for y in node.outputs)):
            if value.dtype in _WIDE:
                wide_types.add(value.dtype)
                value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in model.graph.all_nodes():
        _attributes_as_float32(node, wide_types)
    if wide_types:
        kinds = " and ".join(sorted(_WORDS[k] for k in wide_types))
        warnings.warn(f"the model computes in {kinds}: it is read as float32", stacklevel=5)


def _attributes_as_float32(node: ir.Node, wide_types: set[ir.DataType]) -> None:
    if node.op_type in ("Cast", "RandomNormal", "RandomUniform", "EyeLike", "QuantizeLinear", "DequantizeLinear"):
        for name in ("to", "dtype", "output_dtype"):
            if attribute(node, name) in _WIDE:
                wide_types.add(ir.DataType(attribute(node, name)))
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
    tensor = attribute(node, "value") if node.op_type in ("ConstantOfShape", "Constant") else None
    if tensor is not None and tensor.dtype in _WIDE:
        wide_types.add(tensor.dtype)
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(to_float32(tensor.numpy())))


def to_float32(array: np.ndarray) -> np.ndarray:
    """An array of any floating type as float32; finite numbers outside float32's range are clipped to it."""
    largest = np.finfo(np.float32).max
    wide = array.astype(np.float32 if array.dtype.itemsize <= 2 else np.float64)
    finite = np.isfinite(wide)
    return np.where(finite, np.clip(wide, -largest, largest), wide).astype(np.float32)
