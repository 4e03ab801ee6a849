"""The open inference protocol, version 2, as Triton's and KServe's clients speak it: JSON, then binary tensors."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import Refused

HEADER = "inference-header-content-length"
INPUTS = 8
TYPES = {
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "INT64": np.dtype("<i8"),
    "INT32": np.dtype("<i4"),
    "UINT8": np.dtype("u1"),
}


def read_request(
    body: bytes, header: str | None, most: int
) -> tuple[dict[str, np.ndarray | list[bytes]], dict[str, Any]]:
    """(inputs by name, the request without them). BYTES tensors are lists. header: the length of the JSON part, where
    binary tensors follow; most: strings of a BYTES tensor. Refused (400, 413) for what does not fit.
    """
    length = len(body) if header is None else int(header) if header.isdecimal() and len(header) < 12 else -1
    if not 0 <= length <= len(body):
        raise Refused(400, f"{HEADER}: it is no length within the body")
    try:
        request = json.loads(body[:length])
        declared = request.pop("inputs")
        if len(declared) > INPUTS:
            raise Refused(400, f"{len(declared)} inputs, there are no more than {INPUTS}")
        _check_rest(request)
        rest, inputs = memoryview(body)[length:], {}
        for tensor in declared:
            parameters = tensor.get("parameters") or {}
            size = parameters.get("binary_data_size")
            raw = None
            if size is not None:
                if not isinstance(size, int) or not 0 <= size <= len(rest):
                    raise Refused(400, f"input {tensor['name']!r}: binary_data_size is not within the body")
                raw, rest = rest[:size], rest[size:]
            inputs[str(tensor["name"])] = _array(tensor, raw, most)
    except Refused:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise Refused(400, f"not a request of the inference protocol ({type(error).__name__}: {error})"[:300]) from None
    return inputs, request


def _check_rest(request: Mapping[str, Any]) -> None:
    """The parameters, and the outputs that are asked for. Refused (400)."""
    outputs = request.get("outputs") or []
    if not isinstance(outputs, list) or not all(isinstance(o, dict) and "name" in o for o in outputs):
        raise Refused(400, "outputs: a list of objects with a name")
    for part in (request, *outputs):
        if not isinstance(part.get("parameters") or {}, dict):
            raise Refused(400, "parameters: an object")


def _array(tensor: Mapping[str, Any], raw: memoryview | None, most: int) -> np.ndarray | list[bytes]:
    kind, shape, name = tensor["datatype"], tensor["shape"], tensor["name"]
    if not isinstance(shape, list) or len(shape) > 8 or not all(isinstance(n, int) and 0 <= n < 2**31 for n in shape):
        raise Refused(400, f"input {name!r}: its shape is none of up to 8 sizes")
    count = math.prod(shape)
    if kind == "BYTES":
        if count > most:
            raise Refused(413, f"{count} images in one request, at most {most} are allowed")
        items = _strings(bytes(raw), count) if raw is not None else [str(t).encode() for t in _flat(tensor["data"])]
    elif kind not in TYPES:
        raise Refused(400, f"input {name!r}: datatype {kind!r}, use {', '.join(TYPES)} or BYTES")
    elif raw is not None:
        items = np.frombuffer(raw, TYPES[kind]) if len(raw) % TYPES[kind].itemsize == 0 else np.empty(0)
    else:
        items = np.asarray(_flat(tensor["data"]), TYPES[kind])
    if len(items) != count:
        raise Refused(400, f"input {name!r}: shape {shape} is of {count} elements, and there are {len(items)}")
    return items if isinstance(items, list) else items.reshape(shape)


def _flat(data: Any) -> list[Any]:
    return [x for part in data for x in (_flat(part) if isinstance(part, list) else [part])]


def _strings(raw: bytes, most: int) -> list[bytes]:
    """Each after its length, four bytes; no more than one beyond `most`."""
    found, at = [], 0
    while at < len(raw) and len(found) <= most:
        (length,) = struct.unpack_from("<I", raw.ljust(at + 4, b"\xff"), at)
        if at + 4 + length > len(raw):
            raise Refused(400, "a BYTES tensor ends within a string")
        found.append(raw[at + 4 : at + 4 + length])
        at += 4 + length
    return found


def write_response(
    model: str, outputs: Mapping[str, np.ndarray], request: Mapping[str, Any]
) -> tuple[bytes, dict[str, str]]:
    """(the body, its headers): the outputs that were asked for, binary where that was asked."""
    asked = request.get("outputs")
    everywhere = bool((request.get("parameters") or {}).get("binary_data_output", False))
    names = list(outputs) if not asked else [str(o["name"]) for o in asked]
    binary = {str(o["name"]): (o.get("parameters") or {}).get("binary_data", everywhere) for o in asked or []}
    said, tail = [], []
    for name in names:
        if name not in outputs:
            raise Refused(400, f"no output {name!r}: there are {', '.join(outputs)}")
        array = np.ascontiguousarray(outputs[name])
        kind = next(k for k, dtype in TYPES.items() if dtype == array.dtype)
        tensor: dict[str, Any] = {"name": name, "datatype": kind, "shape": list(array.shape)}
        if binary.get(name, everywhere):
            data = array.tobytes()
            tensor["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        else:
            tensor["data"] = array.ravel().tolist()
        said.append(tensor)
    answer: dict[str, Any] = {"model_name": model, "model_version": "1", "outputs": said}
    if "id" in request:
        answer["id"] = str(request["id"])
    head = json.dumps(answer).encode()
    if not tail:
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *tail]), {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }


def metadata(model: str, shape: Sequence[int], classes: int) -> dict[str, Any]:
    """Of a model: its tensors. -1: any size."""

    def tensor(name: str, kind: str, *sizes: int) -> dict[str, Any]:
        return {"name": name, "datatype": kind, "shape": [-1, *sizes]}

    return {
        "name": model,
        "versions": ["1"],
        "platform": "camrt",
        "inputs": [
            tensor("image", "FP32", *shape),
            tensor("picture", "BYTES"),
            tensor("target", "INT64"),
            tensor("percentile", "FP32"),
        ],
        "outputs": [
            tensor("map", "FP32", *shape[1:]),
            tensor("logits", "FP32", classes),
            tensor("layer_weights", "FP32", -1),
            tensor("class", "INT64"),
        ],
    }
