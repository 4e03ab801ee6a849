"""camrt deploy."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write a bundle for another server, or check one: Triton"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    servers = parser.add_subparsers(required=True, metavar="SERVER", dest="server")
    triton = servers.add_parser("triton", help="a model repository for Triton Inference Server")
    triton.add_argument("bundle", type=Path)
    triton.add_argument("repository", type=Path, nargs="?", help="folder to write; models that are there stay")
    triton.add_argument("--check", metavar="URL", help="compare the maps of http://HOST:8000 or grpc://HOST:8001")
    triton.add_argument("--name", help="the model's (default: the bundle's folder)")
    triton.add_argument("--gpu", action="store_true", help="instances on every GPU (default: on the CPU)")
    triton.add_argument("--backend", help="the runtime's (default: onnxruntime; on GPUs auto)")
    triton.add_argument("--precision", choices=("fp32", "fp16"), help="default: the first that the bundle has")
    triton.add_argument("--instances", type=int, default=1, help="on the CPU, or on each GPU (default: 1)")
    triton.add_argument("--threads", type=int, help="of one run on the CPU (default: one for each core)")
    triton.add_argument("--method", default="winsor_cam", help="where a request names none (default: winsor_cam)")
    triton.add_argument("--max-batch", type=int, default=16, help="images in one run (default: 16)")
    triton.add_argument("--delay", type=float, default=2.0, help="ms that a run waits for more requests (default: 2)")
    triton.add_argument("--compiled", choices=("onnxruntime", "tensorrt"), help="also one ONNX file of the method")
    triton.add_argument("--overwrite", action="store_true")


def run(options: argparse.Namespace) -> int:
    from ..runtime.errors import InputError

    if (options.repository is None) == (options.check is None):
        raise InputError("pass a folder to write, or --check URL of a server that runs")
    return _write(options) if options.check is None else _check(options)


def _write(options: argparse.Namespace) -> int:
    from ..deploy.triton.repository import Deployment, write_repository

    how = Deployment(
        options.name,
        options.gpu,
        options.backend,
        options.precision,
        options.instances,
        options.threads,
        options.method,
        options.max_batch,
        options.delay,
        options.compiled,
    )
    for place in write_repository(options.bundle, options.repository, how, options.overwrite):
        print(place)
    print(f"{options.repository / 'Dockerfile'}: an image that serves them; its first lines say how")
    return 0


def _check(options: argparse.Namespace) -> int:
    from ..deploy.triton.check import LIMIT, check_server
    from ..deploy.triton.repository import model_name

    name = model_name(options.bundle, options.name)
    rows = check_server(options.bundle, options.check, name, options.precision)
    for row in rows:
        print(f"{'ok   ' if row.passed else 'WRONG'}  {row.what:24}{row.problem or format(row.difference, '.1e')}")
    passed = all(row.passed for row in rows)
    print(f"{name} at {options.check}: {'every map' if passed else 'not every map'} within {LIMIT} of this machine's")
    return 0 if passed else 1
