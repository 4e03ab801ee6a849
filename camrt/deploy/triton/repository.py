"""Writes a model repository for Triton Inference Server."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compiling.api import check_compiler, check_outside
from ...method_choice import parse_method
from ...questions import check_percentile
from ...runtime.backends import BACKENDS
from ...runtime.bundle.manifest import Manifest
from ...runtime.bundle.reading import read_bundle
from ...runtime.errors import CamrtError, InputError, UnknownName
from ...tensors import PIXELS
from .config import ModelConfig, Tensor

IMAGE = "nvcr.io/nvidia/tritonserver:25.08-py3"  # Python 3.12, CUDA 13.0, TensorRT 10.13
ENGINES = ("onnxruntime", "tensorrt")
MOST = 1024  # instances, images in a run, threads

_MODEL = '''\
"""Triton's Python backend runs this. The model itself is in camrt."""

import os
import site

for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
    site.addsitedir(folder)  # some builds of the backend do not read PYTHONPATH

from camrt.deploy.triton.served import TritonPythonModel  # noqa: E402, F401
'''

_OURS = (
    "# Triton with camrt and the models of this folder. camrt deploy writes this file anew as long as it has this line."
)
_DOCKERFILE = """\
{ours}
# It needs camrt's wheel beside this file, made in camrt's checkout by
#   pip wheel --no-deps -w {folder} .
#   docker build -t camrt-triton {folder}
#   docker run --rm {run}-p 8000:8000 -p 8001:8001 -p 8002:8002 camrt-triton
FROM {image}
COPY camrt-*.whl /tmp/
{install}
COPY . /models/
USER triton-server
EXPOSE 8000 8001 8002
CMD ["tritonserver", "--model-repository=/models", "--exit-on-error=true", "--http-max-input-size=33554432"]
"""

_ON_CPU = "RUN pip install --no-cache-dir /tmp/camrt-*.whl {pins} && rm /tmp/camrt-*.whl"
_ON_GPU = (
    "RUN apt-get update && apt-get install --yes --no-install-recommends g++ cuda-nvcc-13-0 cuda-cudart-dev-13-0 "
    "cuda-profiler-api-13-0 \\\n    && rm -rf /var/lib/apt/lists/*  # PyCUDA is built from source\n"
    "RUN CUDA_ROOT=/usr/local/cuda pip install --no-cache-dir /tmp/camrt-*.whl {pins} && rm /tmp/camrt-*.whl"
)


@dataclass(frozen=True)
class Deployment:
    """How a bundle is to be served.

    backend: the runtime's, by default onnxruntime, and on GPUs "auto". instances: on each GPU, or on the CPU; threads:
    of one run on the CPU. method: "NAME or NAME:option=value,...", where a request names none. max_batch: the most
    images in one run; delay: milliseconds that a run waits for more requests. compiled: also one ONNX file of the
    method, for Triton's "onnxruntime" or "tensorrt" backend.
    """

    name: str | None = None
    gpu: bool = False
    backend: str | None = None
    precision: str | None = None
    instances: int = 1
    threads: int | None = None
    method: str = "winsor_cam"
    max_batch: int = 16
    delay: float = 2.0
    compiled: str | None = None


def write_repository(
    bundle: str | Path, repository: str | Path, how: Deployment | None = None, overwrite: bool = False
) -> list[Path]:
    """Adds the models of a bundle to a model repository, and a Dockerfile. Returns the models' folders.

    The bundle is copied into the repository. BundleError, InputError, UnknownName, UnknownMethod; CamrtError where
    `compiled` lacks the compile extra.
    """
    how = how or Deployment()
    opened, folder = read_bundle(bundle), Path(repository)
    manifest = opened.manifest
    name = model_name(bundle, how.name)
    _check(how)
    check_outside(folder, opened.path)
    most = how.max_batch if manifest.batch == "dynamic" else 1
    choice, precision = parse_method(how.method), opened.chosen_precision(how.precision)
    config = _explainers_config(name, manifest, how, most, precision)
    places = [folder / name]
    if how.compiled is not None:
        places.append(folder / f"{name}_{choice.name}")
    for place in places:
        if place.exists() and not overwrite:
            raise InputError(f"{place}: exists: pass another name, or overwrite (--overwrite)")
    if how.compiled is not None:
        check_compiler()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder")
    folder.mkdir(parents=True, exist_ok=True)

    def explainer(version: Path) -> str:
        shutil.copytree(opened.path, version / "bundle.camrt")
        (version / "model.py").write_text(_MODEL)
        return config.text()

    def compiled(version: Path) -> str:
        return _compiled(opened.path, version, places[1].name, how, most, precision)

    for place, fill in zip(places, (explainer, compiled), strict=False):
        _write_model(place, fill)
    _write_dockerfile(folder / "Dockerfile", how.gpu)
    return places


def _explainers_config(name: str, manifest: Manifest, how: Deployment, most: int, precision: str) -> ModelConfig:
    """Of the model that the Python backend runs."""
    image = Tensor("image", "float32", manifest.input_shape, optional=True)
    picture = [Tensor("picture", "string", (1,), optional=True)] if manifest.preprocess is not None else []
    return ModelConfig(
        name,
        "python",
        most,
        inputs=[
            image,
            *picture,
            Tensor("target", "int64", (1,), optional=True),
            Tensor("percentile", "float32", (1,), optional=True),
        ],
        outputs=[
            Tensor("map", "float32", manifest.input_shape[1:]),
            Tensor("logits", "float32", (manifest.num_classes,)),
            Tensor("layer_weights", "float32", (-1,)),
            Tensor("class", "int64", ()),
        ],
        warm=["image"],
        delay=how.delay,
        gpu=how.gpu,
        instances=how.instances,
        parameters={
            "bundle": "bundle.camrt",
            "backend": how.backend or ("auto" if how.gpu else "onnxruntime"),
            "precision": precision,
            "threads": how.threads or "",
            "method": how.method,
            "pixels": PIXELS,
        },
    )


def model_name(bundle: str | Path, name: str | None = None) -> str:
    """The name of the model: the given one, or that of the bundle's folder. InputError if Triton cannot have it."""
    found = Path(bundle).resolve().name.removesuffix(".camrt") if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,99}", found, re.ASCII) or found == "Dockerfile":
        raise InputError(f"the name {found!r} cannot be a model's: pass one (--name) of letters, digits, - _ and .")
    return found


def _check(how: Deployment) -> None:
    for what, value in (("instances", how.instances), ("max_batch", how.max_batch), ("threads", how.threads)):
        if value is not None and not 1 <= value <= MOST:
            raise InputError(f"{what} {value}: use 1 to {MOST}")
    if not 0 <= how.delay <= 60_000:
        raise InputError(f"delay {how.delay}: use 0 to 60000 milliseconds")
    if how.backend not in (None, "auto", *BACKENDS):
        raise UnknownName(f"no backend {how.backend!r}: use 'auto', {', '.join(map(repr, BACKENDS))}")
    if how.method.partition(":")[0] == "winsor_cam":
        check_percentile(parse_method(how.method).options.get("percentile", 90))
    if how.compiled not in (None, *ENGINES):
        raise UnknownName(f"no backend of Triton's {how.compiled!r}: use {', '.join(ENGINES)}")


def _write_model(place: Path, fill: Any) -> None:
    """In a folder beside it, which then takes its place, so that a server that watches sees it whole."""
    beside = place.with_name(f".{place.name}.new")
    before = place.with_name(f".{place.name}.old")
    for folder in (beside, before):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        (beside / "1").mkdir(parents=True)
        (beside / "config.pbtxt").write_text(fill(beside / "1"))
        if place.exists():
            place.rename(before)
        beside.rename(place)
    finally:
        for folder in (beside, before):
            shutil.rmtree(folder, ignore_errors=True)


def _compiled(bundle: Path, version: Path, name: str, how: Deployment, most: int, precision: str) -> str:
    """Compiles the file, and for TensorRT writes the command that builds its engine. Returns the config's text."""
    from ...compiling.api import compile

    compile(bundle, version / "model.onnx", how.method, precision=precision)
    import onnx

    graph = onnx.load(version / "model.onnx", load_external_data=False).graph
    kinds = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}

    def tensors(values: Any) -> list[Tensor]:
        return [
            Tensor(
                v.name,
                kinds[v.type.tensor_type.elem_type],
                tuple(d.dim_value or -1 for d in v.type.tensor_type.shape.dim[1:]),
            )
            for v in values
        ]

    inputs, outputs = tensors(graph.input), tensors(graph.output)
    assert how.compiled is not None
    if how.compiled == "tensorrt":
        (version / "build_engine.sh").write_text(_build_engine(inputs, most, precision))
    return ModelConfig(
        name, how.compiled, most, inputs, outputs, [t.name for t in inputs], how.delay, how.gpu, how.instances
    ).text()


def _build_engine(inputs: list[Tensor], most: int, precision: str) -> str:
    def shapes(size: int) -> str:
        return ",".join(f"{t.name}:{'x'.join(map(str, (size, *t.dims)))}" for t in inputs)

    ranges = [f"--{kind}Shapes={shapes(size)}" for kind, size in (("min", 1), ("opt", most), ("max", most))]
    typed = "" if precision == "fp32" else " --stronglyTyped"
    return (
        "# Run this in the folder of the version, in the server's image, on the GPU that will serve it.\n"
        f"trtexec --onnx=model.onnx --saveEngine=model.plan --noTF32{typed} {' '.join(ranges)}\n"
    )


def _write_dockerfile(file: Path, gpu: bool) -> None:
    """With the versions that are installed now, unless it is the user's own. One for GPUs serves on the CPU as well."""
    before = file.read_text() if file.exists() else _OURS
    if before.startswith(_OURS):
        file.write_text(_dockerfile(file.parent, gpu or "--gpus all" in before))


def _dockerfile(folder: Path, gpu: bool) -> str:
    extras = ("onnxruntime-gpu[cuda,cudnn]", "pycuda") if gpu else ("onnxruntime",)
    pins = [_pinned(package) for package in ("numpy", "pillow", "tqdm", *extras)]
    install = (_ON_GPU if gpu else _ON_CPU).format(pins=" ".join(pins))
    run = "--gpus all " if gpu else ""
    return _DOCKERFILE.format(ours=_OURS, folder=folder, image=IMAGE, install=install, run=run)


def _pinned(package: str) -> str:
    """The version that is installed here; of the GPU's packages, the one that was tested."""
    plain = package.partition("[")[0]
    tested = {"onnxruntime-gpu": "1.31.1", "pycuda": "2026.1"}
    try:
        version = tested.get(plain) or importlib.metadata.version(plain)
    except importlib.metadata.PackageNotFoundError:
        raise CamrtError(f"deploy pins the packages of the image: {plain} is not installed here") from None
    return f"'{package}=={version}'"
