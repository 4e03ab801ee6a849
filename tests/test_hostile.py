"""Bundles from somebody who means harm: refused by a message, before an engine reads them and before anything is
allocated.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import camrt
from camrt.cli import main
from camrt.runtime.backends import Settings, create
from camrt.runtime.bundle import onnx_check
from camrt.runtime.bundle.reading import read_bundle

FILE = "classify.onnx"


def signed(bundle: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Writes the manifest's hashes anew, as whoever changed the files would."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for program in manifest["programs"]:
        if (bundle / program["file"]).is_file():
            program["sha256"] = hashlib.sha256((bundle / program["file"]).read_bytes()).hexdigest()
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def altered(bundle: Path, change: Callable[[onnx.ModelProto], None], file: str = FILE) -> None:
    model = onnx.load(str(bundle / file), load_external_data=False)
    change(model)
    (bundle / file).write_bytes(model.SerializeToString())
    signed(bundle)


def initializer(model: onnx.ModelProto, outside: bool) -> TensorProto:
    kind = TensorProto.EXTERNAL if outside else TensorProto.DEFAULT
    return next(t for t in model.graph.initializer if t.data_location == kind)


def external(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = initializer(model, True)
        kept = [e for e in tensor.external_data if e.key != key]
        del tensor.external_data[:]
        tensor.external_data.extend([*kept, onnx.StringStringEntryProto(key=key, value=value)])

    return change


def shaped(*dims: int, outside: bool = True) -> Callable[[onnx.ModelProto], None]:
    return lambda model: initializer(model, outside).dims.__setitem__(slice(None), dims)


def declared(*dims: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.value_info.append(helper.make_tensor_value_info("vast", TensorProto.FLOAT, dims))

    return change


def node(kind: str, *inputs: str, domain: str = "", **attributes: Any) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node(kind, list(inputs), ["unused"], domain=domain, **attributes))

    return change


def nested(depth: int) -> onnx.GraphProto:
    graph = helper.make_graph([], "inner", [], [])
    for _ in range(depth):
        outer = helper.make_graph([], "inner", [], [])
        outer.node.append(helper.make_node("If", ["c"], ["y"], then_branch=graph))
        graph = outer
    return graph


def making(kind: str, *sizes: int) -> Callable[[onnx.ModelProto], None]:
    """An operator that makes a tensor of a size that an initializer says."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), "sizes"))
        inputs = {"ConstantOfShape": ["sizes"], "Resize": ["image", "", "", "sizes"]}.get(kind, ["image", "sizes"])
        model.graph.node.append(helper.make_node(kind, inputs, ["vast"]))

    return change


def sparse(model: onnx.ModelProto) -> None:
    values, indices = (numpy_helper.from_array(np.ones(1, t), n) for t, n in ((np.float32, "v"), (np.int64, "i")))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 40]))


def function(model: onnx.ModelProto) -> None:
    model.functions.append(helper.make_function("", "F", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], []))


def library(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


OUTSIDE = "reads the file .* which is not the bundle's"
PLACE = "a tensor's place in the weights is wrong"
SIZE = "a tensor is not as large as it says"
VAST = "declares a tensor that no machine holds"
CHANGES: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "a file above the folder": (external("location", "../../../etc/passwd"), OUTSIDE),
    "an absolute path": (external("location", "/etc/passwd"), OUTSIDE),
    "another file of the bundle": (external("location", "manifest.json"), OUTSIDE),
    "a folder in between": (external("location", "./weights.bin"), OUTSIDE),
    "an unknown key": (external("basepath", "/etc"), OUTSIDE),
    "an offset before the file": (external("offset", "-4"), PLACE),
    "an offset behind the file": (external("offset", str(1 << 62)), PLACE),
    "an offset that is no number": (external("offset", "1e3"), PLACE),
    "a length that is not the shape's": (external("length", "8"), PLACE),
    "a shape beyond the file": (shaped(1 << 20, 64), PLACE),
    "a gigantic shape": (shaped(1 << 40), VAST),
    "a shape whose product overflows": (shaped(*[1 << 31] * 8), VAST),
    "a negative shape": (shaped(-1, 4), VAST),
    "an inline tensor that is shorter than its shape": (shaped(1000, outside=False), SIZE),
    "a gigantic inline tensor": (shaped(1 << 45, outside=False), VAST),
    "a gigantic declared tensor": (declared(1 << 20, 1 << 20), VAST),
    "an operator of another domain": (node("Evil", "image", domain="evil.ops"), "operators of 'evil.ops'"),
    "another library of operators": (library, "operators of 'com.microsoft'"),
    "a subgraph": (node("If", "c", then_branch=nested(0)), "holds a subgraph"),
    "subgraphs within subgraphs": (node("If", "c", then_branch=nested(30)), "holds a subgraph"),
    "a sparse tensor": (sparse, "holds a sparse tensor"),
    "a function": (function, "holds a function"),
    "a constant that is not there": (
        node("Constant", value=TensorProto(dims=[1 << 30], data_type=1, name="c")),
        SIZE,
    ),
    "ConstantOfShape": (making("ConstantOfShape", 1 << 20, 1 << 20), VAST),
    "Expand": (making("Expand", 1 << 40, 1, 1, 1), VAST),
    "Tile": (making("Tile", 1, 1 << 16, 1 << 16, 1), VAST),
    "Resize": (making("Resize", 1, 3, 1 << 20, 1 << 20), VAST),
    "texts": (lambda m: initializer(m, False).__setattr__("data_type", TensorProto.STRING), "a tensor of data type 8"),
    "no graph": (lambda m: m.ClearField("graph"), "holds 0 graphs"),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_a_program_that_camrt_never_writes_is_refused(
    what: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = CHANGES[what]
    altered(bundle, change)
    backend: Any = create("onnxruntime", Settings())
    monkeypatch.setattr(backend, "_runtime", None)  # so that nothing reaches it
    opened = read_bundle(bundle)
    with pytest.raises(camrt.CamrtError, match=said) as caught:
        backend.open(opened, opened.program("classify"))
    assert FILE in str(caught.value) and "export the bundle again" in str(caught.value)
    assert main(["build", str(bundle), "--compute-capability", "8.9", "--programs", FILE]) == 2
    assert FILE in capsys.readouterr().err


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "folder/../../secret.bin"])
def test_an_onnx_file_with_weights_elsewhere_is_refused(exported: Path, tmp_path: Path, location: str) -> None:
    model = onnx.load(str(exported / FILE), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    (tmp_path / "source" / "folder").mkdir(parents=True)
    source = tmp_path / "source" / "model.onnx"
    source.write_bytes(model.SerializeToString())
    with pytest.raises(
        camrt.CamrtError, match=r"model\.onnx: (its weights lie in .*, outside its folder|not readable as ONNX)"
    ):
        camrt.export_onnx(source, tmp_path / "out.camrt")
    assert not (tmp_path / "out.camrt").exists()


def test_programs_that_camrt_writes_are_not(exported: Path) -> None:
    opened = read_bundle(exported)
    for program in opened.manifest.programs:
        opened.file(program)
    weights = exported / "weights.bin"
    with pytest.raises(camrt.CamrtError, match=PLACE):
        onnx_check.check_program(exported / FILE, "weights.bin", weights.stat().st_size - 1)


def test_no_byte_of_a_program_makes_the_check_fall(exported: Path, tmp_path: Path) -> None:
    """Cut anywhere, or with any byte another, it is refused or it passes."""
    data = (exported / FILE).read_bytes()
    size = (exported / "weights.bin").stat().st_size
    rng = np.random.default_rng(0)
    file, refused = tmp_path / FILE, 0
    for i in range(1500):
        place = int(rng.integers(len(data)))
        changed = data[:place] if i % 3 == 0 else data[:place] + bytes([int(rng.integers(256))]) + data[place + 1 :]
        file.write_bytes(changed)
        try:
            onnx_check.check_program(file, "weights.bin", size)
        except camrt.CamrtError as error:
            assert str(file) in str(error)
            refused += 1
    assert refused > 600


@pytest.mark.parametrize("file", ["weights.bin", FILE, "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_of_the_bundle_is_refused(bundle: Path, tmp_path: Path, file: str, kind: str) -> None:
    """A link may lead anywhere, and a pipe is waited for for ever."""
    place = bundle / file
    kept = tmp_path / "kept"
    shutil.move(place, kept)
    if kind == "link":
        place.symlink_to(kept)
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    with pytest.raises(camrt.CamrtError, match=r"not a file of the bundle's own|not a bundle"):
        read_bundle(bundle)


MANIFESTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a file above the folder": lambda m: m["weights"].update(file="../weights.bin"),
    "the folder above": lambda m: m["weights"].update(file=".."),
    "an absolute file": lambda m: m["programs"][0].update(file="/etc/passwd"),
    "a file with a name of zeros": lambda m: m["programs"][0].update(file="a\0b"),
    "a file with half a letter": lambda m: m["programs"][0].update(file="\ud800"),
    "a file with an endless name": lambda m: m["weights"].update(file="a" * 5000),
    "a gigantic input": lambda m: m.update(input_shape=[3, 1 << 30, 1 << 30]),
    "a negative input": lambda m: m.update(input_shape=[3, -5, 5]),
    "an input that is true": lambda m: m.update(input_shape=[True, 32, 32]),
    "classes without end": lambda m: m.update(num_classes=1 << 60),
    "classes that are text": lambda m: m.update(num_classes="5"),
    "a gigantic layer": lambda m: m["taps"][0].update(channels=1 << 20, grid=[1 << 10, 1 << 10]),
    "a grid of three": lambda m: m["taps"][0].update(grid=[2, 2, 2]),
    "an unknown layout": lambda m: m["taps"][0].update(layout="CHWN"),
    "a program's shape": lambda m: m["programs"][0]["inputs"].update(image=["batch", 3, 1 << 40]),
    "a program's precision": lambda m: m["programs"][0].update(precision="float8"),
    "a gigantic picture": lambda m: m["preprocess"].update(resize=[1 << 30, 1 << 30]),
    "a division by zero": lambda m: m["preprocess"].update(std=[0, 1, 1]),
    "a mean that is no number": lambda m: m["preprocess"].update(mean=[float("nan")] * 3),
    "colours that are missing": lambda m: m["preprocess"].update(mean=[0.5], std=[0.5]),
    "another filter": lambda m: m["preprocess"].update(interpolation="__import__"),
    "a name that is none": lambda m: m.update(name=["a"]),
    "no program that classifies": lambda m: m.update(programs=[p for p in m["programs"] if p["kind"] != "classify"]),
    "a program of another kind": lambda m: m["programs"][0].update(kind="evil"),
    "a layer of another size": lambda m: m["taps"][0].update(grid=[8, 7]),
    "layers in another order": lambda m: m["taps"].reverse(),
    "logits of other classes": lambda m: m["programs"][0]["outputs"].update(logits=["batch", 6]),
    "a shape without sizes": lambda m: m["programs"][0]["inputs"].update({"context:x": []}),
    "a key of many lines": lambda m: m.update({"x\n" * 4000: 1}),
    "an activation": lambda m: m.update(final_activation="Evil"),
}


@pytest.mark.parametrize("what", list(MANIFESTS))
def test_a_manifest_that_cannot_be_is_refused(what: str, bundle: Path) -> None:
    signed(bundle, MANIFESTS[what])
    with pytest.raises(camrt.CamrtError, match="a field is missing or wrong"):
        read_bundle(bundle)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"format": 1, "taps": ' + "[" * 200_000, '{"format": ' + "9" * 9999])
def test_a_manifest_that_is_a_trap_for_its_reader_is_refused(text: str, bundle: Path) -> None:
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(camrt.CamrtError, match=r"not readable as JSON|not a camrt manifest"):
        read_bundle(bundle)


def test_a_manifest_without_end_is_not_read_to_its_end(bundle: Path) -> None:
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(camrt.CamrtError, match="too long for a manifest"):
        read_bundle(bundle)
