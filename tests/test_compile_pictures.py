"""One ONNX file that takes pictures: the network's input has Pillow's bits, and the overlay is that of `explain`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from engines import in_onnxruntime, in_openvino, in_reference, needs_openvino
from PIL import Image

import camrt
from camrt.compiling.pictures import network_input, picture_of
from camrt.export.tape import Tape, output
from camrt.kernels import minmax
from camrt.runtime.bundle.manifest import Manifest, Preprocess
from camrt.runtime.images.overlay import overlay
from camrt.runtime.images.preprocess import placed, preprocess

SIZES = [(40, 52), (32, 32), (17, 23), (300, 20), (64, 512), (101, 99)]
PLAIN = Preprocess((32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RECIPES = {
    "stretched": PLAIN,
    "cropped": replace(PLAIN, resize=37, crop=(32, 32)),
    "odd crop": replace(PLAIN, resize=(51, 40), crop=(32, 32)),
    "nearest": replace(PLAIN, interpolation="nearest"),
    "bicubic": replace(PLAIN, interpolation="bicubic"),
    "lanczos": replace(PLAIN, resize=36, crop=(32, 32), interpolation="lanczos"),
    "letterbox": replace(PLAIN, fit="letterbox", fill=114),
    "bgr": replace(PLAIN, channels="BGR"),
    "grey": replace(PLAIN, mean=(0.5,), std=(0.25,)),
}


@pytest.fixture(scope="module")
def manifest(exported: Path) -> Manifest:
    return camrt.load(exported).manifest


def prepared(path: Path, manifest: Manifest, size: tuple[int, int] | None) -> Path:
    """A file that only preprocesses: picture -> image."""
    shape = ["batch", *(size or ("height", "width")), 3]
    picture = ir.Value(name="picture", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.UINT8))
    graph = ir.Graph([picture], [], nodes=[], name="prepare", opset_imports={"": 18})
    tape = Tape(graph)
    made = network_input(tape, picture_of(tape, picture, size, manifest, "bundle"), manifest)
    graph.outputs.append(output(tape, made, "image", ["batch", *manifest.input_shape]))
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def of(manifest: Manifest, recipe: Preprocess) -> Manifest:
    return replace(manifest, preprocess=recipe, input_shape=(len(recipe.mean), 32, 32))


def pictures(size: tuple[int, int]) -> np.ndarray:
    """Noise, whose bits show every error, and a picture of edges."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    return np.stack([noise, np.where(noise[:1] > 128, 255, 0).astype(np.uint8).repeat(size[0], 0)])


def by_pillow(batch: np.ndarray, manifest: Manifest) -> np.ndarray:
    mode = "RGB" if manifest.input_shape[0] == 3 else "L"
    return np.stack([preprocess(Image.fromarray(p).convert(mode), manifest) for p in batch])


@pytest.mark.parametrize("run", [in_onnxruntime, in_reference, pytest.param(in_openvino, marks=needs_openvino)])
@pytest.mark.parametrize("name", RECIPES)
def test_a_fixed_size_gives_the_bits_of_pillow(name: str, run: Any, manifest: Manifest, tmp_path: Path) -> None:
    manifest = of(manifest, RECIPES[name])
    for size in SIZES:
        batch = pictures(size)
        got = run(prepared(tmp_path / "p.onnx", manifest, size))({"picture": batch})["image"]
        if run is in_openvino:  # it divides by a constant as a product, so that the last bit may differ
            np.testing.assert_allclose(got, by_pillow(batch, manifest), atol=2e-6)
        else:
            np.testing.assert_array_equal(got, by_pillow(batch, manifest))


@pytest.mark.parametrize("run", [in_onnxruntime, in_reference, pytest.param(in_openvino, marks=needs_openvino)])
@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.interpolation == "bilinear"])
def test_a_free_size_is_within_one_grey_level_of_pillow(
    name: str, run: Any, manifest: Manifest, tmp_path: Path
) -> None:
    manifest = of(manifest, RECIPES[name])
    assert manifest.preprocess is not None
    level = 1.01 / 255 / min(manifest.preprocess.std)
    opened = run(prepared(tmp_path / "p.onnx", manifest, None))
    for size in [*SIZES, (333, 1000)]:
        batch = pictures(size)
        got = opened({"picture": batch})["image"]
        want = by_pillow(batch, manifest)
        np.testing.assert_allclose(got, want, atol=level)
        assert run is in_openvino or (np.abs(got - want) > level / 2).mean() == 0, size


def with_recipe(exported: Path, path: Path, recipe: Preprocess | None) -> Path:
    """A copy of the bundle with another recipe, or without one."""
    path.mkdir()
    for file in exported.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(
        json.dumps(manifest | {"preprocess": None if recipe is None else asdict(recipe)})
    )
    return path


@pytest.mark.parametrize("run", [in_onnxruntime, pytest.param(in_openvino, marks=needs_openvino)])
@pytest.mark.parametrize("name", ["stretched", "cropped", "letterbox", "bgr"])
@pytest.mark.parametrize("free", [False, True])
def test_maps_and_overlays_of_pictures(name: str, free: bool, run: Any, exported: Path, tmp_path: Path) -> None:
    bundle = with_recipe(exported, tmp_path / "m.camrt", RECIPES[name])
    explainer, opened = camrt.load(bundle), None
    for size in [(40, 52), (300, 20), (32, 32)]:
        if opened is None or not free:
            chosen: Any = "free" if free else size
            path = camrt.compile(bundle, tmp_path / "m.onnx", picture=chosen, overlay="turbo", opacity=0.6)
            onnx.checker.check_model(onnx.load(path), full_check=True)
            opened = run(path)
        batch = pictures(size)
        feeds = {"picture": batch, "target": np.array([1, 2]), "percentile": np.array([80, 80], np.float32)}
        out = opened(feeds)
        images: Any = list(batch)
        if free:  # a grey level in the picture may switch a rectifier: compare from the network's input on
            manifest = explainer.manifest
            images = run(prepared(tmp_path / "p.onnx", manifest, None))({"picture": batch})["image"]
        result = explainer.explain(images, target=[1, 2], percentile=80)
        assert out["overlay"].dtype == np.uint8 and out["overlay"].shape == batch.shape
        np.testing.assert_allclose(out["logits"], result.logits, atol=1e-4)
        np.testing.assert_allclose(out["map"], result.maps, atol=1e-3 * np.ptp(result.maps))
        recipe = explainer.manifest.preprocess
        assert recipe is not None
        place = placed((size[1], size[0]), recipe)
        for picture, scaled, drawn in zip(batch, minmax(out["map"]), out["overlay"], strict=True):
            off = np.abs(drawn.astype(int) - overlay(picture, place.to_photo(scaled), opacity=0.6))
            assert (off > 1).mean() < 1e-3 and off.max() <= 6  # a level of the colour table


@pytest.mark.parametrize("recipe", [None, PLAIN, replace(PLAIN, channels="BGR")])
def test_the_overlay_of_an_image_is_that_of_what_the_network_saw(
    recipe: Preprocess | None, exported: Path, tmp_path: Path
) -> None:
    bundle = with_recipe(exported, tmp_path / "m.camrt", recipe)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    path = camrt.compile(bundle, tmp_path / "m.onnx", "layer_cam", overlay="viridis")
    out = in_onnxruntime(path)({"image": images, "target": np.array([0, -1])})
    logits = camrt.load(bundle).classify(images)
    result = camrt.load(bundle).explain(images, "layer_cam", target=[0, int(logits[1].argmax())])
    drawn = np.stack([result.overlay(i, colormap="viridis") for i in range(2)])
    off = np.abs(out["overlay"].astype(int) - drawn)
    assert (off > 1).mean() < 1e-3 and off.max() <= 6


def test_what_pictures_cannot_be(exported: Path, tmp_path: Path) -> None:
    for name in ("bicubic", "nearest"):
        bundle = with_recipe(exported, tmp_path / f"{name}.camrt", RECIPES[name])
        with pytest.raises(camrt.CamrtError, match=f"recipe says {name}: fix the size"):
            camrt.compile(bundle, tmp_path / "m.onnx", picture="free")
    narrow = with_recipe(exported, tmp_path / "n.camrt", replace(PLAIN, resize=256, crop=(32, 32)))
    with pytest.raises(camrt.CamrtError, match="too narrow"):
        camrt.compile(narrow, tmp_path / "m.onnx", picture=(16000, 1))
    path = tmp_path / "n.camrt" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preprocess": None}))
    with pytest.raises(camrt.CamrtError, match="does not say how to preprocess pictures"):
        camrt.compile(narrow, tmp_path / "m.onnx", picture=(48, 48))
    assert not (tmp_path / "m.onnx").exists()
