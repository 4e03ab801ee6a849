"""Makes damaged inputs from a random generator: the same generator always gives the same input."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Callable
from typing import Any

import onnx
from onnx import TensorProto, helper
from PIL import Image

NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        "",
        "image",
        "../../etc/passwd",
        "/etc/passwd",
        "a" * 5000,
        "\x00",
        "\ud800",
        [],
        {},
        [[]],
        {"": {}},
    ),
    *(0, -1, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, 1e-320),
)
INTEGERS = (0, 1, -1, 2, 3, 5, 7, 64, 1000, 65536, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63))


def bytes_of(data: bytes, rng: random.Random) -> bytes:
    """The data with some bytes changed, inserted, removed or repeated, or with its end cut off."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        at = rng.randrange(len(found) + 1)
        how = rng.randrange(6)
        if how == 0 and at < len(found):
            found[at] = rng.randrange(256)
        elif how == 1 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            found[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif how == 3:
            del found[at : at + rng.randrange(1, 64)]
        elif how == 4:
            found[at:at] = found[at : at + rng.randrange(1, 64)]
        elif rng.random() < 0.2:
            del found[at:]
    return bytes(found)


def json_of(text: str, rng: random.Random) -> str:
    """A JSON document with one to three of its values changed, removed, doubled or exchanged."""
    tree = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        holder, key = rng.choice(places)
        how = rng.randrange(5)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), holder[key])
        elif how == 1:
            holder[str(rng.choice(NASTY))] = holder[key]
        elif how == 2:
            other, at = rng.choice(places)
            if (isinstance(other, dict) and at in other) or (isinstance(other, list) and at < len(other)):
                holder[key] = other[at]
        elif how == 3 and isinstance(holder[key], int | float):
            holder[key] = rng.choice((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2, holder[key] / 2))
        else:
            holder[key] = rng.choice(NASTY)
        if not tree:
            break
    try:
        return json.dumps(tree)
    except (ValueError, RecursionError):  # a part was put inside itself
        return text[: rng.randrange(len(text))]


def _places(tree: Any, depth: int = 0) -> Any:
    """Every (holder, key) of a JSON tree."""
    if depth > 20:
        return
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key], depth + 1)


def model_of(data: bytes, rng: random.Random) -> bytes:
    """A serialized ONNX model with its bytes damaged, or with one to three of its parts changed and the rest
    well-formed.
    """
    if rng.random() < 0.4:
        return bytes_of(data, rng)
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(_CHANGES)(model, rng)
    return model.SerializeToString()


def _name(model: onnx.ModelProto, rng: random.Random) -> str:
    names = [o for n in model.graph.node for o in n.output] + [t.name for t in model.graph.initializer]
    return rng.choice([*names, "", "nothing", "image"])


def _operator(model: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice(model.graph.node).op_type = rng.choice(
        [
            rng.choice(model.graph.node).op_type,
            "If",
            "Loop",
            "Tile",
            "Expand",
            "Resize",
            "ConstantOfShape",
            "Nothing",
            "Div",
            "Gather",
        ]
    )


def _attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice([n for n in model.graph.node if n.attribute] or [model.graph.node[0]])
    if not node.attribute or rng.random() < 0.2:
        name = rng.choice(("group", "axis", "kernel_shape", "strides", "pads", "keepdims", "to", "perm", "epsilon"))
        value = rng.choice((rng.choice(INTEGERS), [rng.choice(INTEGERS)] * rng.randrange(1, 5), 1e30, "x"))
        node.attribute.append(helper.make_attribute(name, value))
        return
    attribute = rng.choice(node.attribute)
    if attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(INTEGERS)
        if rng.random() < 0.2:
            del attribute.ints[0]
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = rng.choice(INTEGERS)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
    elif attribute.type == onnx.AttributeProto.TENSOR:
        _tensor(attribute.t, rng)
    else:
        attribute.type = rng.randrange(15)  # type: ignore[assignment]


def _wiring(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    names = rng.choice((node.input, node.output))
    if names and rng.random() < 0.7:
        names[rng.randrange(len(names))] = _name(model, rng)
    elif names and rng.random() < 0.5:
        del names[rng.randrange(len(names))]
    else:
        names.append(_name(model, rng))


def _nodes(model: onnx.ModelProto, rng: random.Random) -> None:
    at = rng.randrange(len(model.graph.node))
    if rng.random() < 0.5:
        del model.graph.node[at]
    else:
        model.graph.node.append(model.graph.node[at])


def _tensor(tensor: onnx.TensorProto, rng: random.Random) -> None:
    how = rng.randrange(5)
    if how == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(INTEGERS)
    elif how == 1:
        tensor.dims.append(rng.choice(INTEGERS))
    elif how == 2:
        tensor.data_type = rng.randrange(25)
    elif how == 3 and tensor.external_data:
        entry = rng.choice(tensor.external_data)
        entry.value = rng.choice(("/etc/passwd", "../weights.bin", "manifest.json", "", "x", *map(str, INTEGERS)))
    elif tensor.raw_data:
        tensor.raw_data = bytes_of(tensor.raw_data, rng)
    else:
        tensor.data_location = TensorProto.EXTERNAL


def _initializer(model: onnx.ModelProto, rng: random.Random) -> None:
    if model.graph.initializer:
        _tensor(rng.choice(model.graph.initializer), rng)


def _interface(model: onnx.ModelProto, rng: random.Random) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output, *model.graph.value_info])
    kind = value.type.tensor_type
    if kind.shape.dim and rng.random() < 0.8:
        dim = rng.choice(kind.shape.dim)
        if rng.random() < 0.7:
            dim.dim_value = rng.choice(INTEGERS)
        else:
            dim.dim_param = rng.choice(("batch", "seeds", "x", ""))
    elif rng.random() < 0.5:
        kind.elem_type = rng.randrange(25)
    else:
        value.name = _name(model, rng)


def _versions(model: onnx.ModelProto, rng: random.Random) -> None:
    if model.opset_import and rng.random() < 0.7:
        chosen = rng.choice(model.opset_import)
        chosen.version = rng.choice(INTEGERS)
        if rng.random() < 0.3:
            chosen.domain = rng.choice(("com.microsoft", "ai.onnx.ml", "x"))
    else:
        model.ir_version = rng.choice(INTEGERS)


def _nested(model: onnx.ModelProto, rng: random.Random) -> None:
    leaf = graph = helper.make_graph([], "leaf", [], [])
    for _ in range(rng.choice((0, 3, 25))):
        branch = helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=leaf)
        graph = helper.make_graph([branch], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=leaf))


_CHANGES: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    *(_operator, _attribute, _attribute, _wiring, _wiring, _nodes),
    *(_initializer, _initializer, _interface, _interface, _versions, _nested),
)


def manifest_of(text: str, rng: random.Random) -> bytes:
    return bytes_of(text.encode(), rng) if rng.random() < 0.4 else json_of(text, rng).encode("utf-8", "surrogatepass")


def hashed(manifest: str, file: str, data: bytes) -> str:
    """The manifest with the hash of the changed file, as an attacker would write it."""
    tree = json.loads(manifest)
    for program in tree["programs"]:
        if program["file"] == file:
            program["sha256"] = hashlib.sha256(data).hexdigest()
    return json.dumps(tree)


FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "JPEG2000")


def encoded(picture: Image.Image, format: str) -> bytes:
    into = io.BytesIO()
    picture.save(into, format)
    return into.getvalue()


def small_model() -> bytes:
    """A classifier of 16 x 16 pictures, whole in one ONNX file."""
    import numpy as np

    rng = np.random.default_rng(0)
    weights = {
        "conv.w": rng.standard_normal((4, 3, 3, 3)),
        "conv.b": rng.standard_normal(4),
        "fc.w": rng.standard_normal((5, 4)),
        "fc.b": rng.standard_normal(5),
    }
    nodes = [
        helper.make_node("Conv", ["image", "conv.w", "conv.b"], ["a"], "conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("MaxPool", ["b"], ["c"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], "mean"),
        helper.make_node("Flatten", ["d"], ["e"], "flatten", axis=1),
        helper.make_node("Gemm", ["e", "fc.w", "fc.b"], ["logits"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
        [onnx.numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
