"""One network of each torchvision classification family, and small transformers: exported in float32 and float16, put
to every comparison of `camrt verify`, and built into TensorRT engines.

The comparisons are of activations, gradients and maps with PyTorch in float64, per tap, by the limits in
camrt.verification.comparisons.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from families import FAMILIES, TRANSFORMERS, convnext, network
from onnx import TensorProto
from torch import nn

import camrt
from camrt.export.probes import smooth_images
from camrt.runtime.backends.tensorrt.bindings import find_library
from camrt.runtime.backends.tensorrt.build import build_engine
from camrt.runtime.backends.tensorrt.target import Profile, Target, profiles_of
from camrt.runtime.bundle.reading import Bundle, read_bundle
from camrt.verification import method_runs
from camrt.verification.distances import cosine_distance, largest_difference
from camrt.verification.methods import LAYER_METHODS
from camrt.verification.oracle import module_oracle
from camrt.verification.verify import Report, verify, verify_bundle

# whose float16 programs are put to every comparison; of the others they are built into engines
HALF = ("resnet18", "squeezenet1_1", "mobilenet_v3_small", "mnasnet0_5", "convnext_tiny")


def exported(name: str, folder: Path) -> tuple[nn.Module, Bundle]:
    """A network and its bundle in both precisions."""
    model, shape = network(name)
    return model, read_bundle(camrt.export_model(model, folder / "model.camrt", shape, precision=["fp32", "fp16"]))


def failures(report: Report) -> list[Any]:
    return [r for r in report.rows if not r.passed][:5]


def build_engines(bundle: Bundle) -> None:
    """By TensorRT for RTX, without a word of warning: the widest float32 one for batches, which is the hardest, the
    others for single images.
    """
    library = find_library("tensorrt_rtx")
    layers = [t.name for t in bundle.manifest.taps]
    built = []
    for precision in ("fp32", "fp16"):
        for kind in ("classify", "activations", "gradients", "layer_maps", "signed_maps"):
            program = bundle.program(kind, () if kind == "classify" else layers, precision)
            if program.file in built:
                continue  # activations are the same file
            every = program.file == "layer_maps.onnx"
            profiles = profiles_of(bundle, program, 16, 64) if every else [Profile("single")]
            made = build_engine(library, bundle.file(program), program, Target((8, 9), None), profiles)
            assert len(made.engine) > 1000
            assert made.warnings == [], program.file
            built.append(program.file)
    assert len(built) == 9


@pytest.mark.parametrize(("name", "taps", "last"), [(f[0], *f[2:]) for f in FAMILIES], ids=[f[0] for f in FAMILIES])
def test_family(name: str, taps: int, last: str, tmp_path: Path) -> None:
    model, bundle = exported(name, tmp_path)
    manifest = bundle.manifest
    assert len(manifest.taps) == taps
    assert [t.name for t in manifest.taps if "last" in t.roles] == [last]
    assert manifest.batch == "dynamic" and manifest.seeds_share_image
    precisions = ["fp32", "fp16"] if name in HALF else ["fp32"]
    report = verify_bundle(bundle, module_oracle(model, name), precisions=precisions)
    assert report.passed, failures(report)
    compared = {row.subject.split()[0] for row in report.rows if "fp16" not in row.program}
    methods = {"winsor_cam", "integrative_cam", "full_grad", *LAYER_METHODS}
    programs = {"logits", "activation", "gradient", "float64", "alphas", "maps", "signed", "single", "several"}
    assert compared == programs | methods
    for file in ("gradients.onnx", "gradients.fp16.onnx")[: len(precisions)]:
        rows = {r.subject for r in report.rows if r.program == file and r.subject.startswith("float64 gradient")}
        assert len(rows) == taps
    for backend in ("onnxruntime", "rounding"):
        rows = {r.subject.split()[0] for r in report.rows if r.program == f"methods fp16 {backend}"}
        assert rows == ({"top", *methods} if "fp16" in precisions else set())
    build_engines(bundle)


@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_transformer(name: str, tmp_path: Path) -> None:
    """The same; and the methods that run the network again, against PyTorch."""
    model, bundle = exported(name, tmp_path)
    _, last, layout, prefix, channels, grid = TRANSFORMERS[name]
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
        want = getattr(method_runs, name)(model, torch.from_numpy(image), label, tap).numpy()
        got = explainer.explain(image, name, label).maps[0]
        assert largest_difference(got, want) < 1e-3, name
        said += np.ptp(want) > 0.5
    assert said >= 3, "maps that say nothing test nothing"
    build_engines(bundle)


def test_a_branch_that_layer_scale_makes_small_in_float16(tmp_path: Path) -> None:
    """At the start of training layer scale is 1e-6, below which float16 has almost no numbers."""
    torch.manual_seed(0)
    model = convnext(1e-6).eval()
    bundle = read_bundle(camrt.export_model(model, tmp_path / "m.camrt", (3, 64, 64), precision=["fp32", "fp16"]))
    report = verify_bundle(bundle, module_oracle(model, "the model"), precisions=["fp16"])
    found = [r for r in report.rows if r.program.startswith("methods fp16") and "winsor_cam max" in r.subject]
    assert len(found) == 8
    assert all(r.distance < 1e-5 for r in found), found
    assert report.passed, failures(report)


class Gated(nn.Module):
    """A rectifier written as a comparison: a cast of a condition, behind which the float16 network goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.block = nn.Conv2d(8, 12, 3, 2, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.block(x * (x > 0).to(x.dtype)).relu()
        return self.fc(x.mean((2, 3)))


def test_a_condition_in_float16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Gated().eval()
    path = camrt.export_model(model, tmp_path / "m.camrt", (3, 64, 64), precision=["fp32", "fp16"])
    report = verify_bundle(read_bundle(path), module_oracle(model, "the model"))
    assert report.passed, failures(report)
    image = smooth_images((3, 64, 64), 1)
    single, half = (camrt.load(path, precision=p).explain(image, "score_cam_pp").maps for p in ("fp32", "fp16"))
    assert 0 < cosine_distance(half, single) < 1e-3
    classify = onnx.load(str(path / "classify.fp16.onnx"), load_external_data=False)
    nodes = classify.graph.node
    conditions = {y for n in nodes if n.op_type == "Greater" for y in n.output}
    (cast,) = [n for n in nodes if n.op_type == "Cast" and n.input[0] in conditions]
    assert [a.i for a in cast.attribute if a.name == "to"] == [TensorProto.FLOAT16]


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
