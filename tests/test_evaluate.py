"""`camrt evaluate`: the table, its resuming, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import camrt
from camrt import install
from camrt.cli import main
from camrt.demo.run import BUNDLE, FIRST_SEED
from camrt.demo.scenes import draw_scene
from camrt.evaluate import METRICS, RESULTS, as_markdown, bootstrap, evaluate, find_masks, read_mask, tabulate
from camrt.method_choice import MethodChoice, parse_method
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
        assert set(cells) == set(METRICS)
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
        from camrt.runtime.images.image_batch import as_batch

        image, _ = as_batch(path, explainer.manifest)
        scores = explainer.probabilities(np.concatenate([image, image * result.normalized()[0]]))[:, result.target[0]]  # type: ignore[index]
        assert record["average_drop"] == pytest.approx(100 * max(0, scores[0] - scores[1]) / scores[0], abs=1e-3)
        assert record["increase"] == 100 * (scores[1] > scores[0])
        assert set(record) == {"image", "method", "settings", "target", "probability", "average_drop", "increase"}


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
    assert f"insertion and road need scipy: {install.extra('evaluate')}" in capsys.readouterr().err


def test_bootstrap_covers_the_mean() -> None:
    """Of 200 samples whose true mean is 0, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(1)
    cells = [bootstrap(rng.standard_normal(40), resamples=400, seed=i) for i in range(200)]
    held = np.mean([c.low <= 0 <= c.high for c in cells])
    assert 0.88 < held < 0.99
    with pytest.raises(ValueError, match="no values"):
        bootstrap(np.zeros(0))


def test_the_table_marks_the_best_by_the_metrics_direction() -> None:
    methods = [MethodChoice("a", "a", {}), MethodChoice("b", "b", {})]
    rows = [
        {"image": str(i), "method": m, "average_drop": d, "iou": v}
        for i in range(2)
        for m, d, v in (("a", 10.0, 0.5), ("b", 20.0, 0.7))
    ]
    text = as_markdown(tabulate(rows, methods))
    a, b = text.splitlines()[2:]
    assert "**10.0**" in a and "**100.0**" in a and "**0.700**" in b


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
    rows = evaluate(explainer, images, [parse_method("grad_cam")], scenes / "direct", wanted=["average_drop"])
    assert len(rows) == 3
