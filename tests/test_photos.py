"""Photos of every form: how they are read, and maps brought back to their own pixels."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from support import small_net

import camrt
from camrt.runtime.images.colormaps import colorize
from camrt.runtime.images.legend import with_legend
from camrt.runtime.images.opening import open_image
from camrt.runtime.images.overlay import overlay
from camrt.runtime.images.placement import Placement
from camrt.runtime.images.preprocess import placed

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (60, 90, 3), dtype=np.uint8)
STATISTICS = ((0.5,) * 3, (0.25,) * 3)
RECIPES = {
    "stretch": camrt.Preprocess((32, 32), *STATISTICS),
    "crop": camrt.Preprocess(40, *STATISTICS, crop=(32, 32)),
    "letterbox": camrt.Preprocess((32, 32), *STATISTICS, fit="letterbox"),
    "shorter side": camrt.Preprocess(32, *STATISTICS, crop=(32, 32), interpolation="bicubic"),
}


@pytest.fixture(scope="module")
def explainers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, camrt.Explainer]:
    folder = tmp_path_factory.mktemp("photos")
    return {
        name: camrt.load(
            camrt.export_model(
                small_net(),
                folder / f"{i}.camrt",
                (3, 32, 32),
                preprocess=recipe,
                classes=[f"animal {c}, beast {c}" for c in range(5)],
            )
        )
        for i, (name, recipe) in enumerate(RECIPES.items())
    }


# ---- reading


def _encoded(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def test_every_way_to_give_a_photo_gives_the_same(explainers: dict[str, camrt.Explainer], tmp_path: Path) -> None:
    explainer, file = explainers["crop"], tmp_path / "photo.png"
    Image.fromarray(PHOTO).save(file)
    want = explainer.explain(file, target=1).maps
    ways: list[Any] = [
        file.read_bytes(),
        bytearray(file.read_bytes()),
        io.BytesIO(file.read_bytes()),
        [file.read_bytes(), io.BytesIO(file.read_bytes())],
        str(file),
        Image.fromarray(PHOTO),
        PHOTO,
        torch.from_numpy(PHOTO),
        [torch.from_numpy(PHOTO), file],
        PHOTO.astype(np.uint16) * 257,
    ]
    for given in ways:
        maps = explainer.explain(given, target=1).maps
        for got in maps:  # a batch is another program: its rounding may differ
            np.testing.assert_allclose(got, want[0], rtol=0, atol=0 if len(maps) == 1 else 1e-6)
    with file.open("rb") as stream:
        np.testing.assert_array_equal(explainer.explain(stream, target=1).maps, want)


def test_tensors_with_gradients_are_inputs(explainers: dict[str, camrt.Explainer]) -> None:
    tensor = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    explainer = explainers["stretch"]
    want = explainer.explain(tensor.detach().numpy(), target=1).maps
    np.testing.assert_array_equal(explainer.explain(tensor, target=1).maps, want)
    np.testing.assert_array_equal(explainer.explain(list(tensor), target=1).maps, want)


GREY16 = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257


@pytest.mark.parametrize(
    ("image", "want"),
    [
        (Image.new("RGBA", (4, 4), (200, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (200, 0, 0, 51)), (244, 204, 204)),
        (Image.new("LA", (4, 4), (0, 128)), (127, 127, 127)),
        (Image.new("I;16", (4, 4), 65535), (255, 255, 255)),
        (Image.new("I;16", (4, 4), 257 * 100), (100, 100, 100)),
        (Image.new("I", (4, 4), 257 * 100), (100, 100, 100)),
        (Image.new("F", (4, 4), 0.4), (102, 102, 102)),
        (Image.new("F", (4, 4), 40.0), (40, 40, 40)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), (255, 255, 255)),
    ],
    ids=lambda v: getattr(v, "mode", str(v)),
)
def test_stated_rules_for_pixels(image: Image.Image, want: tuple[int, ...]) -> None:
    opened = open_image(image, 3, "it")
    assert opened.mode == "RGB" and np.asarray(opened)[0, 0].tolist() == list(want)


def test_a_palette_with_a_transparent_colour_is_composed_on_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "p.png", transparency=1)
    assert np.asarray(open_image(tmp_path / "p.png", 3, "it")).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    red = np.asarray(open_image(out.getvalue(), 3, "it"))[0, 0].tolist()
    assert red[0] > 240 and max(red[1:]) < 16


def test_16_bit_files_keep_their_grey_levels(tmp_path: Path) -> None:
    for name in ("grey.png", "grey.tiff"):
        Image.fromarray(GREY16).save(tmp_path / name)
        assert np.asarray(open_image(tmp_path / name, 1, "it")).ravel().tolist() == list(range(256))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.new("I", (4, 4), 70000), "pixels from 0 to 70000: scale them to 8 bits"),
        (Image.new("I", (4, 4), -1), "pixels from -1 to 0: scale them"),
        (Image.new("F", (4, 4), 300.0), r"floating-point pixels must lie in 0\.\.1, or in 0\.\.255"),
        (Image.new("F", (4, 4), float("nan")), "floating-point pixels must lie"),
        (b"no picture", "not a readable image"),
        (b"", "not a readable image"),
        (".", "a folder, not an image"),
        (np.zeros((4, 4, 2), np.uint16), r"uint16 array of shape \(4, 4, 2\)"),
    ],
    ids=lambda v: getattr(v, "mode", type(v).__name__),
)
def test_pixels_that_say_nothing_are_refused(image: Any, said: str) -> None:
    with pytest.raises(camrt.CamrtError, match=said):
        open_image(image, 3, "it")


# ---- back to the photo


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (7, 300), (32, 32), (15, 11), (1, 1), (400, 33)], ids=str)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_ramp_comes_back_to_its_own_pixels(recipe: camrt.Preprocess, size: tuple[int, int]) -> None:
    """A map whose value is its position in the resized photo says, on the photo, each pixel's own position."""
    place = placed((size[1], size[0]), recipe)
    for axis in (0, 1):
        at = np.arange(place.size[axis]) + 0.5 + (place.top, place.left)[axis]
        ramp = at / place.resized[axis] * size[axis] - 0.5
        grid = np.broadcast_to(ramp[:, None] if axis == 0 else ramp, place.size).astype(np.float32)
        back = place.to_photo(grid)
        assert back.shape == size and back.dtype == np.float32
        seen = place.seen()
        np.testing.assert_array_equal(np.isfinite(back), seen)
        want = np.broadcast_to(np.arange(size[axis])[:, None] if axis == 0 else np.arange(size[axis]), size)
        step = size[axis] / place.resized[axis]  # at the input's border a value is the nearest pixel's
        rows = place.seen().any(axis=1 - axis)
        inner = np.flatnonzero(rows)[2:-2] if rows.sum() > 6 and step < 1 else np.flatnonzero(rows)
        difference = np.abs(np.where(seen, back, want) - want)
        difference = difference.take(inner, axis) if len(inner) else difference * 0
        assert difference.max(initial=0) <= max(0.51 * step, 0.51)


def test_what_the_network_did_not_see_is_what_preprocessing_cuts() -> None:
    """White pixels of the photo reach the input exactly where `seen` says."""
    recipe = RECIPES["crop"]
    place = placed((90, 60), recipe)
    assert place == Placement((60, 90), (40, 60), 4, 14, (32, 32))
    assert place.seen().sum() == 48 * 48 and place.seen()[6:54, 21:69].all()
    assert placed((90, 60), RECIPES["letterbox"]).seen().all()
    assert placed((90, 60), RECIPES["stretch"]).seen().all()


@pytest.mark.parametrize("name", RECIPES)
def test_a_spot_in_the_photo_is_hot_at_its_own_place(name: str, explainers: dict[str, camrt.Explainer]) -> None:
    """The map of the input's brightness, brought back, is brightest where the photo is."""
    photo = np.zeros((60, 90, 3), np.uint8)
    photo[24:30, 50:56] = 255
    result = explainers[name].explain(photo, target=1)
    bright = result.pictures[0].mean(axis=2).astype(np.float32)
    back = result.images.placement(0).to_photo(bright)
    y, x = np.unravel_index(np.nanargmax(back), back.shape)
    assert 23 <= y <= 30 and 49 <= x <= 56
    assert result.photos[0].shape == (60, 90, 3) and result.overlay(0).shape == (60, 90, 3)
    assert result.overlay(0, size="input").shape == (32, 32, 3)
    assert result.photo_map(0).shape == (60, 90)
    np.testing.assert_array_equal(result.photos[0], photo)


def test_a_map_of_an_array_is_its_own_photo(explainers: dict[str, camrt.Explainer]) -> None:
    result = explainers["crop"].explain(RNG.standard_normal((1, 3, 32, 32)).astype(np.float32))
    np.testing.assert_array_equal(result.photo_map(0), result.maps[0])
    np.testing.assert_array_equal(result.photos[0], result.pictures[0])


# ---- colours


@pytest.mark.parametrize("name", ["viridis", "inferno", "turbo"])
def test_colours_are_matplotlibs(name: str) -> None:
    levels = np.linspace(0, 1, 256)
    want = matplotlib.colormaps[name](levels)[:, :3] * 255
    assert np.abs(colorize(levels[None], name)[0] - want).max() < 2
    assert np.abs(colorize(np.array([[-3.0, 7.0]]), name)[0] - want[[0, -1]]).max() < 2


def test_jet_runs_from_blue_to_red() -> None:
    assert colorize(np.array([[0, 0.5, 1]]), "jet")[0].tolist() == [[0, 0, 128], [130, 255, 126], [128, 0, 0]]


def test_opacity_and_what_is_unseen() -> None:
    picture = np.full((2, 3, 3), 100, np.uint8)
    scaled = np.array([[0, 0.5, 1], [0, 1, np.nan]])
    np.testing.assert_array_equal(overlay(picture, scaled, 0)[0], picture[0])
    np.testing.assert_array_equal(overlay(picture, scaled, 1)[0], colorize(scaled[:1])[0])
    by_value = overlay(picture, scaled, 1, by_value=True)
    assert by_value[0, 0].tolist() == [100] * 3 and by_value[0, 2].tolist() == colorize(scaled[:1, 2:])[0, 0].tolist()
    assert overlay(picture, scaled, 0)[1, 2].tolist() == [35] * 3


@pytest.mark.parametrize("opacity", [-0.1, 1.1, "0.5", None, float("nan"), True], ids=str)
def test_an_opacity_that_is_none_is_refused(explainers: dict[str, camrt.Explainer], opacity: Any) -> None:
    result = explainers["crop"].explain(PHOTO)
    with pytest.raises(camrt.CamrtError, match=r"opacity .*: use a number from 0 to 1"):
        result.overlay(0, opacity=opacity)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"colormap": "virdis"}, "no colour map 'virdis': did you mean 'viridis'"),
        ({"size": "large"}, "size 'large': use 'photo' or 'input'"),
        ({"index": 3}, r"no map 3: there are \[1\]"),
        ({"index": (0, 1)}, r"no map \(0, 1\): there are \[1\]"),
        ({"index": "0"}, "no map 0: there are"),
        ({"index": 0.0}, "no map 0.0: there are"),
        ({"index": slice(0, 1)}, r"no map slice\(0, 1, None\): there are"),
    ],
    ids=str,
)
def test_other_arguments_are_refused_in_a_line(
    arguments: dict[str, Any], said: str, explainers: dict[str, camrt.Explainer]
) -> None:
    with pytest.raises(camrt.CamrtError, match=said):
        given: dict[str, Any] = {"index": 0} | arguments
        explainers["crop"].explain(PHOTO).overlay(**given)


@pytest.mark.parametrize("width", [20, 90, 1200])
def test_a_legend_fits_under_its_picture(width: int) -> None:
    picture = RNG.integers(0, 256, (60, width, 3), dtype=np.uint8)
    drawn = with_legend(
        picture, ["a class with a very long name that does not fit into a line: 12 %", "grad_cam"], "turbo"
    )
    wide = max(width, 180)
    assert drawn.shape[1] == wide and drawn.shape[0] > 60 + 30
    start = (wide - width) // 2
    np.testing.assert_array_equal(drawn[:60, start : start + width], picture)
    strip = drawn[60:]
    assert (strip[:, 0] > 200).all() and (strip[:, -1] > 200).all()  # text ends before the border
    assert (strip < 80).all(axis=2).sum() > 50  # and there is some


# ---- the result


def test_what_a_result_says_of_itself(explainers: dict[str, camrt.Explainer], tmp_path: Path) -> None:
    import hashlib
    import json

    explainer = explainers["crop"]
    result = explainer.explain([PHOTO, PHOTO[:, ::-1]], "grad_cam", target=[1, 2])
    assert "grad_cam, 2 images, maps [2, 32, 32], target [1, 2]" in repr(result)
    said = json.loads(json.dumps(result.to_dict()))
    manifest = (explainer.bundle.path / "manifest.json").read_bytes()
    assert said["bundle_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert said["camrt"] == camrt.__version__ and said["engine"].startswith("onnxruntime ")
    assert said["method"] == "grad_cam" and said["precision"] == "fp32"
    first = said["images"][0]
    assert first["size"] == [60, 90] and first["target"] == 1
    assert first["pixels_sha256"] == hashlib.sha256(b"RGB[90, 60]" + PHOTO.tobytes()).hexdigest()
    assert first["pixels_sha256"] != said["images"][1]["pixels_sha256"]
    number, name, probability = result.top(1)[0][0]
    assert first["top"][0]["class"] == number == int(result.logits[0].argmax())
    assert first["top"][0]["name"] == name == f"animal {number}, beast {number}"
    assert np.float32(first["top"][0]["probability"]) == np.float32(probability) == result.probabilities[0, number]
    assert all(len(row) == 3 for row in result.top(3)) and len(result.top(99)[0]) == 5

    result.save(tmp_path / "result.npz")
    with np.load(tmp_path / "result.npz") as saved:
        np.testing.assert_array_equal(saved["maps"], result.maps)
        assert json.loads(str(saved["record"])) == said
    with pytest.raises(camrt.CamrtError, match=r"name it \.npz"):
        result.save(tmp_path / "result.png")
    assert np.asarray(Image.open(io.BytesIO(result.png(1)))).tolist() == result.overlay(1).tolist()


@pytest.mark.parametrize("method", ["winsor_cam", "score_cam_pp", "integrative_cam"])
def test_results_and_explainers_pickle(method: str, explainers: dict[str, camrt.Explainer]) -> None:
    explainer = pickle.loads(pickle.dumps(explainers["crop"]))
    several = camrt.load(explainer.bundle.path, threads=3)
    assert str(pickle.loads(pickle.dumps(several)).backend) == str(several.backend) != str(explainer.backend)
    result = explainer.explain([PHOTO, PHOTO[::-1]], method, target=[[1, 2], [0, 3]])
    again = pickle.loads(pickle.dumps(result))
    np.testing.assert_array_equal(again.maps, result.maps)
    np.testing.assert_array_equal(again.overlay((1, 0)), result.overlay((1, 0)))
    assert again.to_dict() == result.to_dict()
    if method == "winsor_cam":
        np.testing.assert_array_equal(again.retune(percentile=10).maps, result.retune(percentile=10).maps)


def test_a_notebook_shows_photo_overlay_classes_and_layers(explainers: dict[str, camrt.Explainer]) -> None:
    result = explainers["crop"].explain([PHOTO] * 10, target=1)
    page = result._repr_html_()
    assert page.count("<img ") == 2 * 8 and "and 2 more" in page and "animal 1, beast 1" in page
    assert all(layer in page for layer in result.layers)
    figure = result.plot(0, colormap="viridis")
    assert len(figure.axes) == 4 and figure.axes[1].get_title().startswith("animal 1")


def test_class_names_are_targets(explainers: dict[str, camrt.Explainer]) -> None:
    explainer = explainers["crop"]
    result = explainer.explain([PHOTO] * 2, target=["animal 1", "Beast 3"])
    assert result.target is not None and result.target.tolist() == [1, 3]
    result = explainer.explain([PHOTO] * 2, target="animal 2")
    assert result.target is not None and result.target.tolist() == [2, 2]
    result = explainer.explain([PHOTO] * 2, target=[["animal 2", "animal 0"], ["beast 4", 1]])
    assert result.target is not None and result.target.tolist() == [[2, 0], [4, 1]]
    with pytest.raises(camrt.CamrtError, match=r"no class 'animal 9' of this bundle: did you mean"):
        explainer.explain(PHOTO, target="animal 9")
