"""How pictures become a network's input: letterbox, BGR, and recipes that are set after the export."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import camrt
from camrt.cli import main
from camrt.export.pytorch.sources import processed
from camrt.runtime.bundle.manifest import Manifest, Preprocess
from camrt.runtime.bundle.reading import read_bundle
from camrt.runtime.images.image_batch import ImageBatch
from camrt.runtime.images.placement import Placement
from camrt.runtime.images.preprocess import placed, undo

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)


def as_batch(images: np.ndarray, manifest: Manifest) -> tuple[np.ndarray, list[np.ndarray]]:
    """The network's input, and what is drawn under the maps."""
    batch = ImageBatch(images, manifest)
    return batch.on_host(), [batch.picture(i) for i in range(len(batch))]


def recipe(bundle: Path, *options: str) -> Preprocess | None:
    assert main(["recipe", str(bundle), *options]) == 0
    return read_bundle(bundle).manifest.preprocess


def test_a_letterbox_keeps_the_shape_and_fills_the_rest(bundle: Path) -> None:
    given = recipe(bundle, "--fit", "letterbox", "--fill", "100", "--interpolation", "nearest")
    assert given is not None and (given.fit, given.fill, given.resize, given.crop) == ("letterbox", 100, (32, 32), None)
    batch, pictures = as_batch(PICTURE, read_bundle(bundle).manifest)
    inner = np.asarray(Image.fromarray(PICTURE).resize((32, 16), Image.Resampling.NEAREST))
    want = np.full((32, 32, 3), 100, np.uint8)
    want[8:24] = inner
    assert np.array_equal(pictures[0], want)
    scaled = (want.astype(np.float32) / 255 - 0.5) / 0.25  # the recipe of the bundle's mean and std
    np.testing.assert_allclose(batch[0], scaled.transpose(2, 0, 1), atol=1e-6)
    tall, _ = as_batch(PICTURE.transpose(1, 0, 2), read_bundle(bundle).manifest)
    np.testing.assert_allclose(tall[0], batch[0].transpose(0, 2, 1), atol=1e-6)


def test_bgr_turns_the_channels_and_nothing_else(bundle: Path) -> None:
    rgb, seen = as_batch(PICTURE, read_bundle(bundle).manifest)
    recipe(bundle, "--channels", "BGR")
    bgr, still = as_batch(PICTURE, read_bundle(bundle).manifest)
    np.testing.assert_array_equal(bgr, rgb[:, ::-1])
    np.testing.assert_array_equal(seen[0], still[0])
    shown = undo(bgr[0], read_bundle(bundle).manifest.preprocess)  # the picture drawn under a map of the tensor
    assert np.abs(shown.astype(int) - still[0].astype(int)).max() <= 1


def test_a_recipe_is_set_where_there_was_none(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from support import small_net

    path = camrt.export_model(small_net(), tmp_path / "bare.camrt", (3, 32, 32))
    assert main(["recipe", str(path)]) == 0 and "preprocessing  none" in capsys.readouterr().out
    with pytest.raises(camrt.CamrtError, match="does not say how to preprocess pictures"):
        camrt.load(path).classify(PICTURE)
    assert main(["recipe", str(path), "--resize", "32"]) == 2
    assert "preprocessing needs both --mean and --std" in capsys.readouterr().err
    numbers = ["--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]
    assert main(["recipe", str(path), "--resize", "32", "32", *numbers]) == 0
    np.testing.assert_allclose(camrt.load(path).classify(PICTURE), camrt.load(exported).classify(PICTURE), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resize", "16"], r"preprocess gives 16, the network takes"),
        (["--channels", "GRB"], "preprocess channels 'GRB': use RGB, BGR"),
        (["--fit", "letterbox", "--resize", "32"], r"preprocess fit 'letterbox' takes a resize of"),
        (["--mean", "0.5"], "preprocess mean has 1 numbers for 3 channels"),
        (["--activation", "tanh"], "activation 'tanh': use softmax or sigmoid"),
    ],
)
def test_a_recipe_that_does_not_fit_changes_nothing(
    options: list[str], message: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (bundle / "manifest.json").read_bytes()
    assert main(["recipe", str(bundle), *options]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1, said
    assert (bundle / "manifest.json").read_bytes() == before and len(list(bundle.glob(".*"))) == 0


def test_an_activation_is_set_after_the_export(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = np.random.default_rng(1).standard_normal((1, 3, 32, 32)).astype(np.float32)
    logits = camrt.load(bundle).classify(image)
    main(["recipe", str(bundle)])
    assert "softmax, assumed" in capsys.readouterr().out
    recipe(bundle, "--activation", "sigmoid")
    np.testing.assert_allclose(camrt.load(bundle).probabilities(image), 1 / (1 + np.exp(-logits)), rtol=1e-5)
    main(["info", str(bundle)])
    assert "probabilities: sigmoid, set by --activation" in capsys.readouterr().out


PROCESSORS: dict[str, tuple[dict[str, Any], Preprocess | None]] = {
    "size": (
        {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.2] * 3, "resample": 3},
        Preprocess((64, 64), (0.5,) * 3, (0.2,) * 3, None, "bicubic"),
    ),
    "crop": (
        {
            "size": {"shortest_edge": 72},
            "do_center_crop": True,
            "crop_size": {"height": 64, "width": 64},
            "image_mean": [0.5] * 3,
            "image_std": [0.2] * 3,
        },
        Preprocess(72, (0.5,) * 3, (0.2,) * 3, (64, 64), "bilinear"),
    ),
    "share": (
        {
            "size": {"shortest_edge": 64},
            "crop_pct": 0.875,
            "image_mean": [0.5] * 3,
            "image_std": [0.2] * 3,
            "resample": 3,
        },
        Preprocess(73, (0.5,) * 3, (0.2,) * 3, (64, 64), "bicubic"),
    ),
    "turned": (
        {"size": {"height": 64, "width": 64}, "do_normalize": False, "do_flip_channel_order": True},
        Preprocess((64, 64), (0.0,) * 3, (1.0,) * 3, None, "bilinear", channels="BGR"),
    ),
    "nothing": ({}, None),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_image_processors_are_read(kind: str) -> None:
    """As Hugging Face's preprocessor_config.json has them."""

    class Config:
        num_channels, image_size = 3, 64

    given, want = PROCESSORS[kind]
    shape, got = processed(json.loads(json.dumps(given)), Config)
    assert shape == (3, 64, 64)
    if want is None:
        assert got is None
        return
    assert got is not None
    assert (got.resize, got.crop, got.interpolation, got.channels) == (
        want.resize,
        want.crop,
        want.interpolation,
        want.channels,
    )
    np.testing.assert_allclose([got.mean, got.std], [want.mean, want.std], rtol=1e-6)


def test_one_score_has_no_softmax(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from support import small_net

    with pytest.raises(camrt.CamrtError, match="whose softmax is 1 for every image"):
        camrt.export_model(small_net(classes=1), tmp_path / "one.camrt", (3, 32, 32), activation="softmax")
    path = camrt.export_model(small_net(classes=1), tmp_path / "one.camrt", (3, 32, 32))
    assert main(["recipe", str(path), "--activation", "softmax"]) == 2
    assert "whose softmax is 1 for every image" in capsys.readouterr().err


def test_not_the_class_is_no_map_of_the_class(tmp_path: Path) -> None:
    """Ablation-CAM divides by the score: by the score of "not" its two signs would cancel."""
    from support import small_net

    path = camrt.export_model(small_net(classes=1), tmp_path / "one.camrt", (3, 32, 32))
    image = np.random.default_rng(3).standard_normal((1, 3, 32, 32)).astype(np.float32)
    explainer = camrt.load(path)
    of_class, of_not = (explainer.explain(image, "ablation_cam", t).maps for t in (0, "not"))
    assert np.abs(of_class - of_not).max() > 0.1
    main(
        ["recipe", str(path), "--resize", "32", "32", *["--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]]
    )
    Image.fromarray(PICTURE).save(tmp_path / "photo.png")
    for target, said in (("not", "not"), ("0", 0)):
        out = tmp_path / f"maps of {target}"
        assert main(["explain", str(path), str(tmp_path / "photo.png"), "--out", str(out), "--target", target]) == 0
        assert json.loads((out / "explanations.jsonl").read_text())["target"] == said


def test_the_odd_row_of_a_letterbox_is_filled_below() -> None:
    told = Preprocess((32, 32), (0.0,) * 3, (1.0,) * 3, fit="letterbox")
    assert placed((32, 25), told) == Placement((25, 32), (25, 32), -3, 0, (32, 32))
    assert placed((25, 32), told) == Placement((32, 25), (32, 25), 0, -3, (32, 32))


def test_class_names_are_set_later(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, names = tmp_path / "net.camrt", tmp_path / "names.txt"
    shutil.copytree(exported, path)
    names.write_text("a\nb\nc\nd\ne\n")
    assert main(["recipe", str(path), "--classes", str(names)]) == 0
    assert "classes        a, b, c, ...\n" in capsys.readouterr().out
    assert camrt.load(path).manifest.classes == ("a", "b", "c", "d", "e")
    names.write_text("a\n")
    assert main(["recipe", str(path), "--classes", str(names)]) == 2
    assert "1 names, the network has 5 classes" in capsys.readouterr().err
