"""`camrt evaluate`: the table, its resuming, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import small_net

import camrt
from camrt import install
from camrt.cli import main
from camrt.demo.run import BUNDLE, FIRST_SEED
from camrt.demo.scenes import draw_scene
from camrt.evaluation import (
    CHECKS,
    METRICS,
    RESULTS,
    Settings,
    as_csv,
    as_markdown,
    bootstrap,
    differences,
    differences_as_markdown,
    evaluate,
    find_masks,
    read_mask,
    read_targets_file,
    tabulate,
)
from camrt.method_choice import parse_method
from camrt.runtime.backends.ort import OrtBackend

METHODS = ["winsor_cam:percentile=50", "grad_cam"]


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Three scenes in images/, with masks of 0 and 255 in masks/."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for i in range(3):
        picture, _, mask = draw_scene(FIRST_SEED + i, label=i)
        Image.fromarray(picture).save(tmp_path / "images" / f"scene-{i}.png")
        Image.fromarray((mask * 255).astype(np.uint8)).save(tmp_path / "masks" / f"scene-{i}.png")
    return tmp_path


def run(scenes: Path, *more: str, methods: list[str] = METHODS) -> int:
    out = ["--out", str(scenes / "out"), "--steps", "8"]
    return main(["evaluate", str(BUNDLE), str(scenes / "images"), *out, "--methods", *methods, *more])


def records(scenes: Path) -> list[dict]:
    return [json.loads(line) for line in (scenes / "out" / RESULTS).read_text().splitlines()]


def test_a_table_of_all_metrics(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(scenes, "--masks", str(scenes / "masks")) == 0
    printed = capsys.readouterr().out
    assert "3 of 3 images" in printed
    assert (scenes / "out" / "table.md").read_text() in printed
    table = json.loads((scenes / "out" / "table.json").read_text())
    assert list(table) == METHODS
    for cells in table.values():
        assert set(cells) == set(METRICS) - set(CHECKS)
        for cell in cells.values():
            assert cell["low"] <= cell["mean"] <= cell["high"] and cell["images"] == 3
    wins = [table[m]["win"]["mean"] for m in METHODS]
    assert sum(wins) == pytest.approx(100)


def test_the_records_are_the_metrics_of_the_maps(scenes: Path) -> None:
    """Average Drop, computed here from the map alone."""
    assert run(scenes, "--metrics", "average_drop", "increase", methods=["grad_cam"]) == 0
    explainer = camrt.load(BUNDLE)
    for record, path in zip(records(scenes), sorted((scenes / "images").iterdir()), strict=True):
        result = explainer.explain(path, "grad_cam")
        from camrt.runtime.images.image_batch import ImageBatch

        image = ImageBatch(path, explainer.manifest).on_host()
        scores = explainer.probabilities(np.concatenate([image, image * result.normalized()[0]]))[:, result.target[0]]  # type: ignore[index]
        assert record["average_drop"] == pytest.approx(100 * max(0, scores[0] - scores[1]) / scores[0], abs=1e-3)
        assert record["increase"] == 100 * (scores[1] > scores[0])
        assert record["image"] == path.name
        assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        own = {"image", "sha256", "mask_sha256", "wanted", "method", "settings", "target", "probability"}
        assert set(record) == own | {"average_drop", "increase"}


def test_it_resumes_after_an_interruption(scenes: Path) -> None:
    """A result file that was cut in the middle of a line goes on where it was, and nothing is measured twice."""
    assert run(scenes) == 0
    path = scenes / "out" / RESULTS
    whole = path.read_text()
    path.write_text(whole[: len(whole) * 2 // 3])
    kept = whole[: len(whole) * 2 // 3].count("\n")
    assert 0 < kept < 6
    assert run(scenes) == 0
    again = path.read_text()
    assert sorted(again.splitlines()) == sorted(whole.splitlines())
    assert again.splitlines()[:kept] == whole.splitlines()[:kept]
    before = path.read_text()
    assert run(scenes) == 0
    assert path.read_text() == before


def test_other_settings_and_changed_images_are_measured_anew(scenes: Path) -> None:
    assert run(scenes, methods=["grad_cam"]) == 0
    assert run(scenes, "--threshold", "0.4", methods=["grad_cam"]) == 0
    assert len(records(scenes)) == 6
    picture, _, _ = draw_scene(FIRST_SEED + 77, label=0)
    Image.fromarray(picture).save(scenes / "images" / "scene-0.png")
    assert run(scenes, methods=["grad_cam"]) == 0
    assert len(records(scenes)) == 7
    masks = ["--masks", str(scenes / "masks"), "--metrics", "iou"]
    assert run(scenes, *masks, methods=["grad_cam"]) == 0
    values = np.zeros((128, 128), np.uint8)
    values[3:9, 3:9] = 1
    Image.fromarray(values).save(scenes / "masks" / "scene-0.png")
    assert run(scenes, *masks, methods=["grad_cam"]) == 0
    assert len(records(scenes)) == 7 + 3 + 1
    table = json.loads((scenes / "out" / "table.json").read_text())
    assert table["grad_cam"]["iou"]["images"] == 3


def test_another_backend_is_measured_anew(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(scenes, methods=["grad_cam"]) == 0
    monkeypatch.setattr(OrtBackend, "name", "another")
    assert run(scenes, methods=["grad_cam"]) == 0
    assert [r["settings"]["backend"] for r in records(scenes)] == ["onnxruntime"] * 3 + ["another"] * 3


def test_unreadable_images_and_masks_are_named_and_the_rest_measured(
    scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scenes / "images" / "broken.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(scenes / "masks" / "scene-1.png")
    assert run(scenes, "--masks", str(scenes / "masks"), methods=["grad_cam"]) == 1
    captured = capsys.readouterr()
    assert "broken.png: not a readable image" in captured.err
    assert "scene-1.png: 5 x 5, its image is 128 x 128: make the sizes equal" in captured.err
    assert "2 of 4 images" in captured.out


def test_images_without_a_mask_have_no_localisation(scenes: Path) -> None:
    (scenes / "masks" / "scene-2.png").unlink()
    assert run(scenes, "--masks", str(scenes / "masks"), methods=["grad_cam"]) == 0
    found = records(scenes)
    assert ["iou" in r for r in found] == [True, True, False]
    table = json.loads((scenes / "out" / "table.json").read_text())
    assert table["grad_cam"]["iou"]["images"] == 2 and table["grad_cam"]["average_drop"]["images"] == 3


def test_void_pixels_of_a_voc_mask_are_left_out(scenes: Path) -> None:
    """A palette picture's 255 is void, even where no other object is near; a grey picture's is the object, unless
    --void says so.
    """
    values = np.zeros((128, 128), np.uint8)
    values[40:80, 40:80] = 7
    values[38:40] = 255
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.ravel().tolist())
    palette.save(scenes / "masks" / "scene-0.png")
    explainer = camrt.load(BUNDLE)
    images = sorted((scenes / "images").iterdir())
    masks = find_masks(images, scenes / "masks")
    mask = read_mask(masks[images[0]], images[0], explainer)
    np.testing.assert_array_equal(mask.object, values == 7)
    np.testing.assert_array_equal(mask.valid, values != 255)
    binary = read_mask(masks[images[1]], images[1], explainer)
    assert binary.valid.all() and binary.object.any() and not binary.object.all()
    with pytest.raises(camrt.CamrtError, match="has no object inside the crop that the network sees"):
        read_mask(masks[images[1]], images[1], explainer, void=255)
    values[values == 7] = 0
    palette.putdata(values.ravel().tolist())
    palette.save(scenes / "masks" / "scene-0.png")
    with pytest.raises(camrt.CamrtError, match="has no object inside the crop that the network sees"):
        read_mask(masks[images[0]], images[0], explainer)


def test_masks_that_cannot_be_read_are_refused(scenes: Path) -> None:
    explainer, image, mask = camrt.load(BUNDLE), scenes / "images" / "scene-0.png", scenes / "masks" / "scene-0.png"
    Image.fromarray(np.full((128, 128), 300, np.uint16)).save(mask)
    with pytest.raises(camrt.CamrtError, match="save masks as palette or 8-bit grey pictures"):
        read_mask(mask, image, explainer)
    mask.write_bytes(mask.read_bytes()[:50])
    with pytest.raises(camrt.CamrtError, match=r"scene-0\.png: "):
        read_mask(mask, image, explainer)


def test_images_of_one_name_keep_their_own_masks(scenes: Path) -> None:
    """By their place below the folder; a stem that two images share is not enough."""
    for folder in ("a", "b"):
        (scenes / "images" / folder).mkdir()
    (scenes / "images" / "scene-0.png").rename(scenes / "images" / "a" / "scene.png")
    (scenes / "images" / "scene-1.png").rename(scenes / "images" / "b" / "scene.png")
    images = sorted((scenes / "images").rglob("*.png"))
    (scenes / "masks" / "scene-0.png").rename(scenes / "masks" / "scene.png")
    assert set(find_masks(images, scenes / "masks")) == {scenes / "images" / "scene-2.png"}
    (scenes / "masks" / "a").mkdir()
    (scenes / "masks" / "scene.png").rename(scenes / "masks" / "a" / "scene.png")
    assert find_masks(images, scenes / "masks")[images[0]] == scenes / "masks" / "a" / "scene.png"


def test_masks_and_results_below_the_images_are_no_images(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scenes / "masks").rename(scenes / "images" / "masks")
    arguments = ["--masks", str(scenes / "images" / "masks"), "--metrics", "iou"]
    assert run(scenes, *arguments, methods=["grad_cam"]) == 0
    assert "3 of 3 images" in capsys.readouterr().out


REFUSALS = [
    (["--methods", "gradcam"], "no method 'gradcam': did you mean 'grad_cam'"),
    (["--methods", "grad_cam:depth=3"], "grad_cam has no option 'depth': it has none"),
    (["--methods", "winsor_cam:low=abc"], "rescale bounds low='abc'"),
    (["--methods", "finer_cam:alpha=abc"], "alpha 'abc': use a number"),
    (["--methods", "recipro_cam:gaussian=no"], "gaussian 'no': use True or False"),
    (["--methods", "winsor_cam:50"], "write options as winsor_cam:option=value"),
    (["--metrics", "iou"], "metric 'iou' needs masks of the objects: pass --masks FOLDER"),
    (["--metrics", "beauty"], "no metric 'beauty': use average_drop"),
    (["--masks", "nowhere"], "nowhere: no such folder of masks"),
    (["--steps", "0"], "use steps from 1"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS, ids=[r[1][:30] for r in REFUSALS])
def test_refusals_are_one_line(
    arguments: list[str], message: str, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["evaluate", str(BUNDLE), str(scenes / "images"), "--out", str(scenes / "out"), *arguments]
    assert main(given) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


def test_a_mask_folder_that_does_not_match_is_refused(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mask in (scenes / "masks").iterdir():
        mask.rename(mask.with_name(f"other-{mask.name}"))
    assert run(scenes, "--masks", str(scenes / "masks")) == 2
    assert "masks: no mask has the name of an image, e.g. scene-0.png" in capsys.readouterr().err


def test_without_scipy_the_extra_is_named(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    assert run(scenes, methods=["grad_cam"]) == 2
    assert f"insertion, like road, needs scipy: {install.extra('evaluate')}" in capsys.readouterr().err


def test_bootstrap_covers_the_mean() -> None:
    """Of 200 samples whose true mean is 0, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(1)
    cells = [bootstrap(rng.standard_normal(40), resamples=400, seed=i) for i in range(200)]
    held = np.mean([c.low <= 0 <= c.high for c in cells])
    assert 0.88 < held < 0.99
    with pytest.raises(ValueError, match="no values"):
        bootstrap(np.zeros(0))


def test_the_table_marks_the_best_by_the_metrics_direction() -> None:
    rows = [
        {"image": str(i), "method": m, "average_drop": d, "iou": v}
        for i in range(2)
        for m, d, v in (("a", 10.0, 0.5), ("b", 20.0, 0.7))
    ]
    text = as_markdown(tabulate(rows, ["a", "b"]))
    a, b, count = text.splitlines()[2:]
    assert "**10.0**" in a and "**100.0**" in a and "**0.700**" in b and count == "| images | 2 | 2 | 2 |"


def test_methods_are_written_with_options() -> None:
    chosen = parse_method("score_cam_pp:variant=tanh_mask_only,max_error=0.5")
    assert (chosen.name, chosen.options) == ("score_cam_pp", {"variant": "tanh_mask_only", "max_error": 0.5})
    assert parse_method("recipro_cam:gaussian=true").options == {"gaussian": True}


def test_the_methods_command_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    from camrt.runtime.cams import METHODS as registered

    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[::2]]
    assert set(names) == set(registered) and names[:3] == ["winsor_cam", "score_cam_pp", "integrative_cam"]
    assert main(["methods", "integrative_cam"]) == 0
    text = capsys.readouterr().out
    assert "reconstruction" in text and "options: smooth=identity" in text
    assert main(["methods", "cam"]) == 2


def test_evaluate_returns_the_records(scenes: Path) -> None:
    explainer = camrt.load(BUNDLE)
    images = sorted((scenes / "images").iterdir())
    named, settings = {image: image.name for image in images}, Settings(metrics=["average_drop"])
    rows = evaluate(explainer, named, [parse_method("grad_cam")], scenes / "direct", settings)
    assert len(rows) == 3


# ---- targets, layers, checks, differences


def test_labels_say_which_class_is_explained(scenes: Path) -> None:
    explainer = camrt.load(BUNDLE)
    names = explainer.manifest.classes
    assert names is not None
    (scenes / "labels.csv").write_text(f"image,class\nscene-0.png,3\nscene-1,{names[2]}\nimages/scene-2.png, 1\n")
    assert run(scenes, "--targets", str(scenes / "labels.csv"), "--metrics", "average_drop", methods=["grad_cam"]) == 0
    assert [(r["image"], r["target"]) for r in records(scenes)] == [
        (f"scene-{i}.png", c) for i, c in enumerate((3, 2, 1))
    ]
    (scenes / "labels.json").write_text(json.dumps({"scene-0.png": 3.0, "scene-1.png": 2}))
    assert run(scenes, "--targets", str(scenes / "labels.json"), "--metrics", "average_drop", methods=["grad_cam"]) == 1
    assert len(records(scenes)) == 3  # two are the same, the third has no label


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("a.csv", "scene-0.png,99\n", "a.csv, entry 1: class 99 is out of range"),
        ("a.csv", "scene-0.png,unicorn\n", "a.csv, entry 1: no class 'unicorn'"),
        ("a.csv", "scene-0.png\n", "write an image and a class in each row"),
        ("a.csv", "other.png,1\n", "names none of the images, e.g. scene-0.png"),
        ("a.json", "[1]", "it must be an object: image -> class"),
        ("a.csv", "scene-0.png,1\nscene-0,2\n", "a.csv, entry 2: scene-0 has class 1 already"),
        ("a.csv", "elsewhere/scene-0.png,1\n", "names none of the images"),
        ("a.json", "{", "a.json: no labels"),
    ],
)
def test_labels_that_do_not_fit(file: str, text: str, said: str, scenes: Path) -> None:
    (scenes / file).write_text(text)
    images = {path: path.name for path in sorted((scenes / "images").iterdir())}
    with pytest.raises(camrt.CamrtError, match=re.escape(said)):
        read_targets_file(scenes / file, images, camrt.load(BUNDLE).manifest)


def test_layers_images_and_files(scenes: Path) -> None:
    arguments = ["--metrics", "average_drop", "area", "rank_drop", "--plot", str(scenes / "table.png")]
    assert run(scenes, *arguments, "--layers", "last", "--max-images", "2") == 0
    rows = records(scenes)
    assert {r["image"] for r in rows} == {"scene-0.png", "scene-1.png"} and rows[0]["settings"]["layers"] == "last"
    assert Image.open(scenes / "table.png").size[0] > 500
    lines = (scenes / "out" / "table.csv").read_text().splitlines()
    table = json.loads((scenes / "out" / "table.json").read_text())
    assert lines[0] == "method,metric,mean,low,high,images" and len(lines) == 1 + sum(map(len, table.values()))
    (pair,) = json.loads((scenes / "out" / "differences.json").read_text())
    assert (pair["method"], pair["other"]) == tuple(METHODS)
    by = {(r["image"], r["method"]): r for r in rows}
    want = np.mean([by[i, METHODS[0]]["area"] - by[i, METHODS[1]]["area"] for i in ("scene-0.png", "scene-1.png")])
    assert pair["area"]["mean"] == pytest.approx(want)


def test_equal_methods_share_the_wins() -> None:
    rows = [
        {"image": str(i), "method": m, "average_drop": 10.0 + noise}
        for i in range(40)
        for m, noise in (("a", 1e-5 * (-1) ** i), ("b", 0.0), ("c", 5.0))
    ]
    table = tabulate(rows, ["a", "b", "c"])
    assert [table[m]["win"].mean for m in "abc"] == [50, 50, 0]


def test_a_difference_is_of_the_same_images() -> None:
    """Methods that differ little beside how much images differ: the paired interval leaves out 0."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(50, 20, 40)
    rows = [
        {"image": str(i), "method": m, "insertion": d + step + rng.normal(0, 0.5)}
        for i, d in enumerate(difficulty)
        for m, step in (("a", 1.0), ("b", 0.0))
    ]
    table, paired = tabulate(rows, ["a", "b"]), differences(rows, ["a", "b"])
    a, b = table["a"]["insertion"], table["b"]["insertion"]
    assert a.low < b.high and b.low < a.high  # the means' intervals overlap widely
    cell = paired["a", "b"]["insertion"]
    assert 0.5 < cell.low < cell.mean < cell.high < 1.5 and cell.images == 40
    assert "**+" in differences_as_markdown(paired) and as_csv(table).count("insertion") == 2


def test_checks_tell_maps_that_ignore_the_network(scenes: Path, tmp_path: Path) -> None:
    """EigenCAM is the same for every class; Grad-CAM is not."""
    methods = ["grad_cam", "eigen_cam"]
    names = ["other_class", "sensitivity", "insertion", "deletion", "net", "seconds"]
    assert run(scenes, "--metrics", *names, methods=methods) == 0
    table = json.loads((scenes / "out" / "table.json").read_text())
    assert table["eigen_cam"]["other_class"]["mean"] == pytest.approx(1)
    assert table["grad_cam"]["other_class"]["mean"] < 0.9
    assert 0 < table["grad_cam"]["sensitivity"]["mean"] < 1
    means = {name: table["grad_cam"][name]["mean"] for name in ("insertion", "deletion", "net", "seconds")}
    assert means["net"] == pytest.approx(means["insertion"] - means["deletion"], abs=1e-5) and 0 < means["seconds"] < 9


def test_other_weights_need_a_bundle_of_the_same_network(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(scenes, "--metrics", "other_weights") == 2
    assert "pass --other-weights BUNDLE" in capsys.readouterr().err
    arguments = ["--metrics", "other_weights", "--other-weights", str(BUNDLE)]
    assert run(scenes, *arguments, methods=["grad_cam"]) == 0
    table = json.loads((scenes / "out" / "table.json").read_text())
    assert table["grad_cam"]["other_weights"]["mean"] == pytest.approx(1)  # the same weights


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_shuffled_weights_make_other_maps(kind: str, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same network: the same tensors in another order, another bundle, other maps; the copy verifies."""
    monkeypatch.chdir(scenes)
    recipe = ["--resize", "32", "32", "--mean", *["0.5"] * 3, "--std", *["0.25"] * 3]
    source = "support:small_net"
    if kind == "onnx":
        source = "net.onnx"
        torch.onnx.export(small_net(), (torch.zeros(1, 3, 32, 32),), source, dynamo=True, external_data=False)
    shape = ["--input-shape", "3", "32", "32"]
    assert main(["export", source, "own.camrt", *shape, *recipe]) == 0
    assert main(["export", source, "other.camrt", *shape, *recipe, "--shuffle-weights", "0"]) == 0
    assert main(["verify", "other.camrt"]) == 0
    own, other = camrt.load("own.camrt"), camrt.load("other.camrt")
    assert other.manifest.source["spec"] is None and own.layers == other.layers
    arguments = [
        "evaluate",
        "own.camrt",
        "images",
        "--out",
        "out",
        "--methods",
        "grad_cam",
        "--metrics",
        "other_weights",
    ]
    assert main([*arguments, "--other-weights", "other.camrt"]) == 0
    table = json.loads(Path("out/table.json").read_text())
    assert table["grad_cam"]["other_weights"]["mean"] < 0.9
