"""Bundles: what is written, and every kind of damage refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support import small_net
from torch import nn

import camrt
from camrt.export.probes import smooth_images
from camrt.runtime.bundle.manifest import MANIFEST, Manifest
from camrt.runtime.bundle.reading import read_bundle
from camrt.verification.oracle import module_oracle
from camrt.verification.verify import verify, verify_bundle

FILES = [
    "activations.last.onnx",
    "activations.onnx",
    "classify.onnx",
    "full_grad.onnx",
    "gradients.last.onnx",
    "gradients.onnx",
    "head.onnx",
    "layer_maps.last.onnx",
    "layer_maps.onnx",
    "manifest.json",
    "signed_maps.onnx",
    "trunk.onnx",
    "weights.bin",
]


def manifest_of(bundle: Path) -> dict:
    return json.loads((bundle / MANIFEST).read_text())


def rewrite(bundle: Path, **changes) -> None:
    (bundle / MANIFEST).write_text(json.dumps(manifest_of(bundle) | changes))


def assert_refused(bundle: Path, message: str) -> None:
    with pytest.raises(camrt.CamrtError, match=message) as caught:
        camrt.load(bundle)
    assert "\n" not in str(caught.value)


def test_a_bundle_is_a_folder_of_known_files(exported: Path) -> None:
    assert sorted(p.name for p in exported.iterdir()) == FILES


def test_programs_share_one_weights_file(exported: Path) -> None:
    """Every sizeable tensor of every program lies in weights.bin; a tensor that two programs use lies there once."""
    places: dict[tuple[int, int], set[str]] = {}
    for file in exported.glob("*.onnx"):
        for tensor in onnx.load(str(file), load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entries = {e.key: e.value for e in tensor.external_data}
                assert entries["location"] == "weights.bin"
                places.setdefault((int(entries["offset"]), int(entries["length"])), set()).add(file.name)
            else:
                assert len(tensor.raw_data) < 1024
    assert max(map(len, places.values())) == 10
    data = (exported / "weights.bin").read_bytes()
    hashes = [hashlib.sha256(data[o : o + n]).digest() for o, n in places]
    assert len(set(hashes)) == len(hashes)


def test_programs_pass_the_onnx_checker(exported: Path) -> None:
    for file in exported.glob("*.onnx"):
        onnx.checker.check_model(str(file), full_check=True)


def test_nothing_of_the_machine_is_in_a_bundle(exported: Path) -> None:
    for file in exported.iterdir():
        data = file.read_bytes()
        for word in (str(Path.home()), str(exported.parent), str(Path(__file__).parent), "site-packages"):
            assert word.encode() not in data, (file.name, word)


def test_manifest_says_what_is_needed(exported: Path) -> None:
    manifest = manifest_of(exported)
    assert manifest["format"] == 1 and manifest["batch"] == "dynamic" and manifest["seeds_share_image"] is True
    assert [t["name"] for t in manifest["taps"]] == ["stem", "block.0", "head.0", "head"]
    assert [t["batch_norm"] for t in manifest["taps"]] == ["after", "after", "none", "none"]
    assert [tuple(t["roles"]) for t in manifest["taps"]] == [("conv",)] * 3 + [("last",)]
    assert manifest["taps"][0]["channels"] == 8 and manifest["taps"][0]["grid"] == [16, 16]
    assert set(manifest["tools"]) == {"camrt", "torch", "onnx", "onnxscript"}


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file_is_refused(bundle: Path, file: str) -> None:
    data = (bundle / file).read_bytes()
    (bundle / file).write_bytes(data[: len(data) // 2])
    assert_refused(bundle, "export the bundle again")


@pytest.mark.parametrize("file", [f for f in FILES if f != MANIFEST])
def test_a_changed_byte_is_refused(bundle: Path, file: str) -> None:
    data = bytearray((bundle / file).read_bytes())
    data[len(data) // 3] ^= 1
    (bundle / file).write_bytes(data)
    assert_refused(bundle, rf"{file}: damaged, its contents are not what was exported")


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_refused(bundle: Path, file: str) -> None:
    (bundle / file).unlink()
    assert_refused(bundle, file)


def test_every_changed_hash_is_refused(bundle: Path) -> None:
    manifest = manifest_of(bundle)
    for record in [manifest["weights"], *manifest["programs"]]:
        kept, record["sha256"] = record["sha256"], "0" * 64
        (bundle / MANIFEST).write_text(json.dumps(manifest))
        assert_refused(bundle, "damaged")
        record["sha256"] = kept
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    camrt.load(bundle)


def test_another_format_version_is_refused(bundle: Path) -> None:
    rewrite(bundle, format=2)
    assert_refused(bundle, "bundle format 2, this camrt reads format 1")


@pytest.mark.parametrize(
    "changes",
    [
        {"taps": None},
        {"taps": [{"name": "stem"}]},
        {"programs": 3},
        {"input_shape": [3, 32]},
        {"classes": ["only one"]},
        {"weights": {"file": "../weights.bin", "sha256": ""}},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_itself_is_refused(bundle: Path, changes: dict) -> None:
    rewrite(bundle, **changes)
    assert_refused(bundle, "a field is missing or wrong")


def test_a_program_that_gives_other_than_it_says_is_refused(bundle: Path) -> None:
    """Of the right names, by the wrong program: each `logits` is there, of another shape or not at all."""
    manifest = manifest_of(bundle)
    files = {p["kind"]: p for p in manifest["programs"]}
    for kind, other in (("classify", "gradients"), ("trunk", "classify"), ("activations", "classify")):
        kept = files[kind]["file"], files[kind]["sha256"]
        files[kind]["file"], files[kind]["sha256"] = files[other]["file"], files[other]["sha256"]
        (bundle / MANIFEST).write_text(json.dumps(manifest))
        method = {"classify": None, "trunk": "recipro_cam", "activations": "eigen_cam"}[kind]
        image = np.zeros((1, 3, 32, 32), np.float32)
        explainer = camrt.load(bundle)
        with pytest.raises(camrt.CamrtError, match=r"ONNX Runtime refused|'activation.*' is nothing, not float32"):
            explainer.classify(image) if method is None else explainer.explain(image, method)
        files[kind]["file"], files[kind]["sha256"] = kept


def test_not_a_bundle(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "no such bundle")
    assert_refused(tmp_path, r"not a bundle, it has no manifest\.json")
    (tmp_path / MANIFEST).write_text("[]")
    assert_refused(tmp_path, "not a camrt manifest")


def test_an_existing_path_is_refused_before_any_work(bundle: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    with pytest.raises(camrt.CamrtError, match="exists already: choose another path"):
        camrt.export_model(small_net(), bundle, (3, 32, 32), progress=stages.append)
    assert not stages
    (tmp_path / "folder").mkdir()
    with pytest.raises(camrt.CamrtError, match="exists and is not a bundle"):
        camrt.export_model(small_net(), tmp_path / "folder", (3, 32, 32), overwrite=True)


def test_overwriting_replaces_the_bundle(bundle: Path) -> None:
    camrt.export_model(small_net(7), bundle, (3, 32, 32), layers="last", overwrite=True)
    assert camrt.load(bundle).manifest.num_classes == 7
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name]


def test_overwriting_through_a_link_replaces_what_it_names(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "link.camrt"
    link.parent.mkdir()
    link.symlink_to(bundle)
    camrt.export_model(small_net(7), link, (3, 32, 32), layers="last", overwrite=True)
    assert link.is_symlink() and camrt.load(bundle).manifest.num_classes == 7


def test_overwriting_removes_nobodys_files(bundle: Path) -> None:
    for name in ("notes.txt", "labels.json", "data.npz", ".git/config", "other.onnx/file"):
        file = bundle / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
        with pytest.raises(camrt.CamrtError, match=f"holds '{name.partition('/')[0]}', which is not of the bundle"):
            camrt.export_model(small_net(7), bundle, (3, 32, 32), overwrite=True)
        assert file.read_text() == "mine"
        file.unlink()
        if file.parent != bundle:
            file.parent.rmdir()


def test_a_path_that_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    stages: list[str] = []
    (tmp_path / "file").write_text("x")
    with pytest.raises(camrt.CamrtError, match="a file is where its folder would be"):
        camrt.export_model(small_net(), tmp_path / "file" / "x.camrt", (3, 32, 32), progress=stages.append)
    assert not stages


def test_of_two_exports_to_one_path_the_second_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.camrt"

    def meanwhile(folder: Path, manifest: Manifest, progress: object) -> Manifest:
        camrt.export_model(small_net(7), path, (3, 32, 32), layers="last")
        return manifest

    with pytest.raises(camrt.CamrtError, match="cannot be written"):
        camrt.export_model(small_net(), path, (3, 32, 32), complete=meanwhile)
    assert camrt.load(path).manifest.num_classes == 7


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(camrt.CamrtError, match="cannot be written \\(No space left on device\\)"):
        camrt.export_model(small_net(), tmp_path / "small.camrt", (3, 32, 32), layers="last")
    assert not list(tmp_path.iterdir())


def test_progress_is_told(tmp_path: Path) -> None:
    stages: list[str] = []
    camrt.export_model(small_net(), tmp_path / "small.camrt", (3, 32, 32), progress=stages.append)
    assert stages[0] == "tracing the model" and stages[-2] == "checking every program" and len(stages) == 17
    assert re.fullmatch(r"checked 11 programs in [0-9.]+ s", stages[-1])


# ---- models that cannot be exported


class Tokens(nn.Module):
    """Its output is no (batch, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Twice(nn.Module):
    """One convolution that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.conv(x)).mean((2, 3))


def test_a_module_that_runs_twice_is_two_layers(tmp_path: Path) -> None:
    """Named as torchvision's feature extraction names them."""
    torch.manual_seed(0)
    path = camrt.export_model(Twice().eval(), tmp_path / "twice.camrt", (3, 16, 16))
    assert [t.name for t in camrt.load(path).manifest.taps] == ["conv", "conv_1"]
    report = verify_bundle(camrt.load(path).bundle, module_oracle(Twice().eval(), "another model"))
    assert not report.passed  # other weights
    torch.manual_seed(0)
    assert verify_bundle(camrt.load(path).bundle, module_oracle(Twice().eval(), "the model")).passed


class Sorted(nn.Module):
    """An operator without a gradient rule behind its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(self.conv(x))


class Pair(Tokens):
    """It returns two tensors."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = self.conv(x)
        return y.mean((2, 3)), y


class Decides(nn.Module):
    """Control flow that depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).mean((2, 3))
        return y * 2 if y.sum() > 0 else y


class Rolled(nn.Module):
    """A block that moves its positions about, so that its grid is no longer the image's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(Roll(), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.conv(x)).mean((2, 3))


class Roll(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.roll(x, (5, 3), (2, 3))


class Regrouped(nn.Module):
    """A block that makes two rows of the batch of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.block = Halves()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.conv(x)).mean((2, 3)).reshape(-1, 4)


class Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 2, *x.shape[2:]).relu()


class ChannelsLast(nn.Module):
    """A block whose output is (batch, height, width, channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.LayerNorm(4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Tokens, {}, r"has 4 axes, .*: camrt explains classifiers, whose output is \(batch, classes\)"),
        (Pair, {}, r"returns a tuple of 0 \(2, 4\), 1 .*: name the one that holds the logits with output=, --output"),
        (
            Rolled,
            {"layers": ["block"]},
            r"layer 'block' has output .*, which is not known to be a feature map \(batch, chan",
        ),
        (Regrouped, {"layers": ["block"]}, "layer 'block' has output .*, which is not known to be a feature map"),
        (Sorted, {}, r"no gradient rule for Det \(node .*, between 'conv' and the logits\)"),
        (small_net, {"layers": ["block.9"]}, r"the model has no layer 'block\.9': did you mean 'block\."),
        (small_net, {"layers": "conv1"}, "the model has no layer 'conv1'"),
        (small_net, {"layers": []}, "finds nothing in this model"),
        (small_net, {"input_shape": (3, 32)}, r"input_shape \(3, 32\): pass \(channels, height, width\)"),
        (small_net, {"input_shape": (1, 32, 32)}, r"does not run on images of shape \(1, 32, 32\)"),
        (small_net, {"classes": ["one"]}, "1 class names for a network with 5 classes"),
        (small_net, {"preprocess": camrt.Preprocess((16, 16), (0.5,) * 3, (1,) * 3)}, r"preprocess gives \(16, 16\)"),
        (small_net, {"preprocess": camrt.Preprocess((32, 32), (0.5,), (1,) * 3)}, "mean has 1 numbers for 3 channels"),
        (lambda: "resnet", {}, "takes a torch.nn.Module, not str"),
        (Decides, {}, "PyTorch could not export the model"),
        (small_net, {"precision": "bf16"}, "precision 'bf16': use fp32, fp16, int8"),
        (small_net, {"precision": []}, "no precision was given"),
        (small_net, {"preprocess": camrt.Preprocess((32, 32), (0.5,) * 3, (1, 0, 1))}, "std holds a zero"),
        (small_net, {"preprocess": camrt.Preprocess((0, 32), (0.5,) * 3, (1,) * 3)}, "sizes are whole numbers from 1"),
        (
            small_net,
            {"preprocess": camrt.Preprocess((30, 30), (0.5,) * 3, (1,) * 3, (32, 32))},
            r"crop \(32, 32\) is larger than resize",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_export_refusals_are_one_line(tmp_path: Path, model, arguments: dict, message: str) -> None:
    with pytest.raises(camrt.CamrtError, match=message) as caught:
        given: dict[str, Any] = {"input_shape": (3, 32, 32)} | arguments
        camrt.export_model(model(), tmp_path / "out.camrt", **given)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_exporting_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = small_net().train()
    model.norm.eval()  # type: ignore[union-attr]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    camrt.export_model(model, tmp_path / "small.camrt", (3, 32, 32), layers="last")
    assert model.training and not model.norm.training  # type: ignore[union-attr]
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    logits = camrt.load(tmp_path / "small.camrt").classify(np.zeros((1, 3, 32, 32), np.float32))
    np.testing.assert_allclose(logits, model.eval()(torch.zeros(1, 3, 32, 32)).detach().numpy(), atol=1e-5)


def test_a_model_that_ends_in_a_softmax_is_explained_by_its_logits(tmp_path: Path) -> None:
    model = nn.Sequential(small_net(), nn.Softmax(1))
    path = camrt.export_model(model, tmp_path / "small.camrt", (3, 32, 32))
    explainer = camrt.load(path)
    assert explainer.manifest.final_activation == "Softmax"
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    np.testing.assert_allclose(explainer.classify(image), model[0](torch.from_numpy(image)).detach().numpy(), atol=1e-5)
    report = verify(path)
    assert report.passed and "own forward graph" in report.oracle


def test_an_exported_program_is_taken_as_well(tmp_path: Path) -> None:
    program = torch.export.export(
        small_net(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    path = camrt.export_model(program, tmp_path / "program.camrt", (3, 32, 32), "last")
    image = smooth_images((3, 32, 32), 1)
    want = small_net()(torch.from_numpy(image)).detach().numpy()
    np.testing.assert_allclose(camrt.load(path).classify(image), want, atol=1e-5)


def test_a_bundle_of_float16_alone(tmp_path: Path) -> None:
    """Its logits are those of float16: 1.2e-3 from the source's in this network."""
    path = camrt.export_model(small_net(), tmp_path / "m.camrt", (3, 32, 32), precision="fp16")
    assert read_bundle(path).precisions == ["fp16"]
