"""Asks a running server for maps, and compares them with those of the bundle explained here."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from ... import install
from ...demo.scenes import draw_scene
from ...kernels import minmax
from ...runtime.errors import CamrtError, InputError, first_line
from ...runtime.explainer import Explainer, load
from ...runtime.images.image_batch import ImageBatch

LIMIT = 1e-5  # largest difference of maps after min-max, where engine and precision are the same
_KINDS = {"float32": "FP32", "int64": "INT64", "object": "BYTES"}
_PICTURES = 4


@dataclass(frozen=True)
class Row:
    """A comparison: the largest difference of maps after min-max, or what went wrong instead."""

    what: str
    difference: float = float("nan")
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.difference <= LIMIT


class _Client:
    """tritonclient, over HTTP or gRPC."""

    def __init__(self, url: str, model: str) -> None:
        parts = urlsplit(url)
        try:
            _ = parts.port
        except ValueError:
            raise InputError(f"{url}: its port is no number up to 65535") from None
        if parts.scheme not in ("http", "https", "grpc", "grpcs") or not parts.netloc:
            raise InputError(f"{url}: use http://HOST:8000 or grpc://HOST:8001")
        kind = parts.scheme.removesuffix("s") if parts.scheme.startswith("grpc") else "http"
        try:
            self._library = importlib.import_module(f"tritonclient.{kind}")
        except ImportError as error:
            raise CamrtError(install.repair("--check", "tritonclient", "triton", error)) from None
        self._model, self._secure = model, parts.scheme in ("https", "grpcs")
        self._netloc = parts.netloc
        try:
            if not self.connected().is_model_ready(model):
                raise CamrtError(f"{url}: no model {model!r} is ready there: the log of the server may say why")
        except CamrtError:
            raise
        except Exception as error:
            raise CamrtError(f"{url}: no Triton server answers there ({first_line(error)})") from None

    def connected(self) -> Any:
        """A client of its own: those of HTTP are for one thread."""
        return self._library.InferenceServerClient(self._netloc, ssl=self._secure)

    def infer(self, inputs: Mapping[str, np.ndarray], parameters: Mapping[str, Any]) -> Any:
        given = []
        for name, array in inputs.items():
            tensor = self._library.InferInput(name, list(array.shape), _KINDS[array.dtype.name])
            tensor.set_data_from_numpy(array)
            given.append(tensor)
        with self.connected() as client:
            return client.infer(self._model, given, parameters=dict(parameters) or None)


def check_server(bundle: str | Path, url: str, name: str, precision: str | None = None) -> list[Row]:
    """Sends the demo's pictures by several clients at once, and one wrong request.

    url: http://HOST:8000 or grpc://HOST:8001; name: the model's. CamrtError without the triton extra, or if no server
    answers there or its model is not ready.
    """
    explainer, client = load(bundle, "onnxruntime", precision=precision), _Client(url, name)
    rng = np.random.default_rng(0)
    manifest = explainer.manifest
    if manifest.preprocess is None:
        arrays = rng.standard_normal((_PICTURES, *manifest.input_shape), np.float32)
        pictures = None
    else:
        pictures = [_png(draw_scene(seed)[0]) for seed in range(_PICTURES)]
        arrays = np.concatenate([ImageBatch(p, manifest).on_host() for p in pictures])
    last = manifest.num_classes - 1
    cases: list[tuple[str, dict[str, np.ndarray], dict[str, Any]]] = []
    for i in range(_PICTURES):
        cases.append((f"image {i}", {"image": arrays[i : i + 1]}, {}))
        if pictures is not None:
            cases.append((f"picture {i}", {"picture": np.array([[pictures[i]]], object)}, {}))
    ones = np.ones((_PICTURES, 1))
    cases += [
        ("a batch" if manifest.batch == "dynamic" else "", {"image": arrays}, {}),
        ("class and percentile", {"image": arrays, "target": (ones * last).astype(np.int64)}, {"percentile": 50}),
        ("percentiles", {"image": arrays, "percentile": (ones * [[0], [30], [60], [99]]).astype(np.float32)}, {}),
        ("grad_cam", {"image": arrays}, {"method": "grad_cam"}),
    ]
    if manifest.batch != "dynamic":
        cases = [(w, {k: v[:1] for k, v in inputs.items()}, p) for w, inputs, p in cases if w]
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda case: _compared(explainer, client, arrays, *case), cases))
    return [*rows, _refused(client, arrays[:1], last + 1)]


def _compared(
    explainer: Explainer,
    client: _Client,
    arrays: np.ndarray,
    what: str,
    inputs: dict[str, np.ndarray],
    parameters: dict[str, Any],
) -> Row:
    try:
        answer = client.infer(inputs, {"method": "winsor_cam"} | parameters)
    except Exception as error:
        return Row(what, problem=first_line(error))
    which = slice(int(what.split()[1]), int(what.split()[1]) + 1) if what[-1].isdigit() else slice(len(arrays))
    images = inputs.get("image", arrays[which])
    targets = inputs["target"][:, 0].tolist() if "target" in inputs else None
    method = parameters.get("method", "winsor_cam")
    percentiles = np.full(len(images), parameters.get("percentile", 90), np.float64)
    if "percentile" in inputs:
        percentiles = inputs["percentile"][:, 0].astype(np.float64)
    worst = 0.0
    maps, classes = answer.as_numpy("map"), answer.as_numpy("class")
    if maps is None or classes is None or len(maps) != len(images):
        return Row(what, problem="the answer is not of camrt's model: it has no map or no class of each image")
    for i, percentile in enumerate(percentiles):
        options: dict[str, Any] = {"percentile": float(percentile)} if method == "winsor_cam" else {}
        want = explainer.explain(images[i : i + 1], method, None if targets is None else targets[i], **options)
        explained = int(classes.ravel()[i])
        assert want.target is not None
        if explained != int(want.target[0]):
            return Row(what, problem=f"explains class {explained}, here {want.target[0]}")
        worst = max(worst, float(np.abs(minmax(maps[i]) - minmax(want.maps[0])).max()))
    return Row(what, worst)


def _refused(client: _Client, image: np.ndarray, number: int) -> Row:
    """A class that does not exist must be refused in words."""
    try:
        client.infer({"image": image, "target": np.array([[number]])}, {})
    except Exception as error:
        said = "out of range" in str(error)
        return Row("a class out of range", 0.0) if said else Row("a class out of range", problem=first_line(error))
    return Row("a class out of range", problem="was explained")


def _png(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()
