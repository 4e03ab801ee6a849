"""Asks a running server for maps, and compares them with those of the bundle explained here."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
from ...runtime.explanation import Explanation
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


@dataclass(frozen=True)
class _Case:
    """A request. images: what it asks to explain, as arrays; inputs: as they are sent."""

    what: str
    images: np.ndarray
    inputs: dict[str, np.ndarray]
    parameters: dict[str, Any] = field(default_factory=dict)

    def wanted(self, explainer: Explainer) -> Iterator[Explanation]:
        """Of each image, explained here."""
        method = self.parameters.get("method", "winsor_cam")
        for i, image in enumerate(self.images):
            target = int(self.inputs["target"][i, 0]) if "target" in self.inputs else None
            options: dict[str, Any] = {}
            if method == "winsor_cam":
                options["percentile"] = self.parameters.get("percentile", 90)
            if "percentile" in self.inputs:
                options["percentile"] = float(self.inputs["percentile"][i, 0])
            yield explainer.explain(image[None], method, target, **options)


def check_server(bundle: str | Path, url: str, name: str, precision: str | None = None) -> list[Row]:
    """Sends the demo's pictures by several clients at once, and one wrong request.

    url: http://HOST:8000 or grpc://HOST:8001; name: the model's. CamrtError without the triton extra, or if no server
    answers there or its model is not ready.
    """
    explainer, client = load(bundle, "onnxruntime", precision=precision), _Client(url, name)
    cases = _cases(explainer)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda case: _compared(explainer, client, case), cases))
    return [*rows, _refused(client, cases[0].images, explainer.manifest.num_classes)]


def _cases(explainer: Explainer) -> list[_Case]:
    manifest = explainer.manifest
    cases = []
    if manifest.preprocess is None:
        arrays = np.random.default_rng(0).standard_normal((_PICTURES, *manifest.input_shape), np.float32)
    else:
        pictures = [_png(draw_scene(seed)[0]) for seed in range(_PICTURES)]
        arrays = np.concatenate([ImageBatch(p, manifest).on_host() for p in pictures])
        for i, picture in enumerate(pictures):
            cases.append(_Case(f"picture {i}", arrays[i : i + 1], {"picture": np.array([[picture]], object)}))
    cases += [_Case(f"image {i}", arrays[i : i + 1], {"image": arrays[i : i + 1]}) for i in range(_PICTURES)]
    several = arrays if manifest.batch == "dynamic" else arrays[:1]
    classes = np.full((len(several), 1), manifest.num_classes - 1, np.int64)
    percentiles = np.linspace(0, 99, len(several), dtype=np.float32)[:, None]
    return [
        *cases,
        _Case("a batch", several, {"image": several}),
        _Case("class and percentile", several, {"image": several, "target": classes}, {"percentile": 50}),
        _Case("percentiles", several, {"image": several, "percentile": percentiles}),
        _Case("grad_cam", several, {"image": several}, {"method": "grad_cam"}),
    ]


def _compared(explainer: Explainer, client: _Client, case: _Case) -> Row:
    try:
        answer = client.infer(case.inputs, {"method": "winsor_cam"} | case.parameters)
    except Exception as error:
        return Row(case.what, problem=first_line(error))
    maps, classes = answer.as_numpy("map"), answer.as_numpy("class")
    if maps is None or classes is None or len(maps) != len(case.images):
        return Row(case.what, problem="the answer is not of camrt's model: it has no map or no class of each image")
    worst = 0.0
    for got, explained, want in zip(maps, classes.ravel(), case.wanted(explainer), strict=True):
        assert want.target is not None
        if explained != want.target[0]:
            return Row(case.what, problem=f"explains class {explained}, here {want.target[0]}")
        worst = max(worst, float(np.abs(minmax(got) - minmax(want.maps[0])).max()))
    return Row(case.what, worst)


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
