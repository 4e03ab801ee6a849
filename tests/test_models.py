"""One network of each torchvision classification family, and small transformers: exported in float32 and float16, put to
every comparison of `camrt verify`, and built into TensorRT engines.

The comparisons are of activations, gradients and maps with PyTorch in float64, per tap, by the limits in camrt.verify.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from families import FAMILIES, TRANSFORMERS, network
from torch import nn

import camrt
from camrt.compare import largest_difference
from camrt.export import reference_runs
from camrt.export.reference import LAYER_METHODS
from camrt.oracle import module_oracle
from camrt.runtime.backends.tensorrt import Shapes, Target, build_engine, find_library
from camrt.runtime.bundle import Bundle, read_bundle
from camrt.verify import Report, smooth_images, verify, verify_bundle


@dataclass
class Exported:
    name: str
    model: nn.Module
    bundle: Bundle


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """A network's bundle in both precisions, for all of the tests that want it."""
    model, shape = network(request.param)
    path = tmp_path_factory.mktemp(request.param) / "model.camrt"
    yield Exported(
        request.param, model, read_bundle(camrt.export_model(model, path, shape, precision=["fp32", "fp16"]))
    )
    shutil.rmtree(path)


def each(names: Sequence[str]) -> Any:
    """Once for each network; the tests of one network in one process, where there are several."""
    params = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]
    return pytest.mark.parametrize("exported", params, indirect=True)


def failures(report: Report) -> list[Any]:
    return [r for r in report.rows if not r.passed][:5]


@each([f[0] for f in FAMILIES])
def test_family(exported: Exported) -> None:
    _, _, taps, last = next(f for f in FAMILIES if f[0] == exported.name)
    manifest = exported.bundle.manifest
    assert len(manifest.taps) == taps
    assert [t.name for t in manifest.taps if "last" in t.roles] == [last]
    assert manifest.batch == "dynamic" and manifest.seeds_share_image
    report = verify_bundle(exported.bundle, module_oracle(exported.model, exported.name))
    assert report.passed, failures(report)
    compared = {row.subject.split()[0] for row in report.rows if "fp16" not in row.program}
    methods = {"winsor_cam", "integrative_cam", "full_grad", *LAYER_METHODS}
    assert compared == {"logits", "activation", "gradient", "float64", "alphas", "maps", "single", "several", *methods}
    for file in ("gradients.onnx", "gradients.fp16.onnx"):
        rows = {r.subject for r in report.rows if r.program == file and r.subject.startswith("float64 gradient")}
        assert len(rows) == taps
    for backend in ("onnxruntime", "rounding"):
        rows = {r.subject.split()[0] for r in report.rows if r.program == f"methods fp16 {backend}"}
        assert rows == {"top", *methods}


@each(list(TRANSFORMERS))
def test_transformer(exported: Exported) -> None:
    """Verified like the others; and the methods that run the network again, against PyTorch."""
    bundle, model = exported.bundle, exported.model
    _, last, layout, prefix, channels, grid = TRANSFORMERS[exported.name]
    (tap,) = [t for t in bundle.manifest.taps if "last" in t.roles]
    assert (tap.name, tap.layout, tap.prefix, tap.channels, tap.grid) == (last, layout, prefix, channels, grid)
    report = verify_bundle(bundle, module_oracle(model, "the model"))
    assert report.passed, failures(report)
    report = verify(bundle.path)
    assert report.passed, ("by its own graph", failures(report))
    explainer = camrt.load(bundle.path)
    image = smooth_images((3, 64, 64), 1)
    label = int(explainer.classify(image).argmax())
    said = 0
    for name in ("score_cam_pp", "score_cam", "ablation_cam", "recipro_cam"):
        want = getattr(reference_runs, name)(model, torch.from_numpy(image), label, tap).numpy()
        got = explainer.explain(image, name, label).maps[0]
        assert largest_difference(got, want) < 1e-3, name
        said += np.ptp(want) > 0.5
    assert said >= 3, "maps that say nothing test nothing"


@each([f[0] for f in FAMILIES] + list(TRANSFORMERS))
def test_every_program_becomes_an_engine(exported: Exported) -> None:
    """By TensorRT for RTX: float32 for batches, float16 for single images; without a word of warning."""
    bundle, library = exported.bundle, find_library("tensorrt_rtx")
    layers = [t.name for t in bundle.manifest.taps]
    built = []
    for precision, shapes in (("fp32", Shapes("batch", 16)), ("fp16", Shapes("single"))):
        for kind in ("classify", "activations", "gradients", "layer_maps"):
            program = bundle.program(kind, () if kind == "classify" else layers, precision)
            if program.file in built:
                continue  # activations are the same file
            made = build_engine(library, bundle.path / program.file, program, Target((8, 9), None), shapes)
            assert len(made.engine) > 1000
            assert made.warnings == [], program.file
            built.append(program.file)
    assert len(built) == 7


def test_a_norm_behind_the_last_attention_is_refused(tmp_path: Path) -> None:
    """Its gradient at the grid is zero: the head reads the class token alone."""
    with pytest.raises(camrt.CamrtError, match="the logits read none of its grid, only its class token"):
        camrt.export_model(network("vit")[0], tmp_path / "model.camrt", (3, 64, 64), ["encoder.ln"])


def test_a_transformer_from_onnx_is_tapped_where_its_grid_is_read(tmp_path: Path) -> None:
    """The same choice of the last block without PyTorch's modules, and the same maps."""
    model = network("vit")[0]
    source = tmp_path / "vit.onnx"
    torch.onnx.export(model, (torch.zeros(2, 3, 64, 64),), str(source), dynamo=True, dynamic_shapes=({0: "batch"},))
    bundle = camrt.export_onnx(source, tmp_path / "onnx.camrt")
    explainer = camrt.load(bundle)
    (last,) = [t for t in explainer.manifest.taps if "last" in t.roles]
    assert (last.layout, last.prefix, last.grid, last.channels) == ("tokens", 1, (4, 4), 48)
    assert verify(bundle).passed
    direct = camrt.load(camrt.export_model(model, tmp_path / "torch.camrt", (3, 64, 64)))
    images = smooth_images((3, 64, 64), 2)
    np.testing.assert_allclose(explainer.classify(images), direct.classify(images), atol=1e-5)
    norms = [n for n in onnx.load(str(source)).graph.node if n.op_type == "LayerNormalization"]
    assert last.name == norms[-3].name  # behind it: the last block's second norm, and the final one
    for method in ("grad_cam", "recipro_cam"):
        got, want = (ex.explain(images, method, 2).maps for ex in (explainer, direct))
        assert largest_difference(got, want) < 1e-3, method
    with pytest.raises(camrt.CamrtError, match="the logits read none of its grid"):
        camrt.export_onnx(source, tmp_path / "x.camrt", [norms[-1].name])
