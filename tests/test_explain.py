"""The runtime on a small network: what `explain` returns, for every form of image and target."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import assert_maps_close, scaled, small_net

import camrt
from camrt.export.probes import smooth_images
from camrt.export.pytorch.autograd import record
from camrt.kernels import layer_importance
from camrt.runtime.cams import GRADIENT_AGGREGATIONS, Result, join
from camrt.verification.methods import grad_cam, winsor_cam

CONVOLUTIONS = ["stem", "block.0", "head.0"]
IMAGES = smooth_images((3, 32, 32), 4)


def reference_maps(target, percentile: float = 90, images: np.ndarray = IMAGES) -> np.ndarray:
    recorded = record(small_net(), torch.from_numpy(images), target, CONVOLUTIONS)
    return winsor_cam(recorded, (32, 32), percentile)[0].numpy()


def test_winsor_cam_of_a_class(explainer: camrt.Explainer) -> None:
    result = explainer.explain(IMAGES, target=2, percentile=50)
    assert result.layers == tuple(CONVOLUTIONS) and result.layer_weights.shape == (4, 3)
    np.testing.assert_array_equal(result.target, [2, 2, 2, 2])
    assert_maps_close(result.maps, reference_maps(2, 50), 1e-4)


def test_grad_cam_of_the_last_block(explainer: camrt.Explainer) -> None:
    result = explainer.explain(IMAGES, method="grad_cam", target=1)
    assert result.layers == ("head",)
    recorded = record(small_net(), torch.from_numpy(IMAGES), 1, ["head"])
    assert_maps_close(result.maps, grad_cam(recorded, (32, 32)).numpy(), 1e-4)


def test_without_a_target_each_image_explains_its_top_class(explainer: camrt.Explainer) -> None:
    result = explainer.explain(IMAGES)
    np.testing.assert_array_equal(result.target, explainer.classify(IMAGES).argmax(axis=1))
    given = explainer.explain(IMAGES, target=result.target)
    np.testing.assert_array_equal(result.maps, given.maps)


def test_several_targets_of_one_image_share_its_forward_pass(explainer: camrt.Explainer, monkeypatch) -> None:
    batches = []
    run = explainer.session.open(explainer.bundle.program("layer_maps", CONVOLUTIONS))
    original = type(run).run
    monkeypatch.setattr(type(run), "run", lambda self, feeds: batches.append(feeds) or original(self, feeds))
    result = explainer.explain(IMAGES[:2], target=[[0, 3, 4], [1, 1, 2]])
    assert [(f["image"].shape[0], f["seed"].shape[0]) for f in batches] == [(1, 3), (1, 3)]
    assert result.maps.shape == (2, 3, 32, 32) and result.layer_weights.shape == (2, 3, 3)
    assert result.target is not None
    for k in range(3):
        one = explainer.explain(IMAGES[:2], target=result.target[:, k])
        assert_maps_close(result.maps[:, k], one.maps, 1e-5)
    np.testing.assert_allclose(result.logits, explainer.classify(IMAGES[:2]), rtol=1e-5)


def test_a_seed_explains_a_contrast(explainer: camrt.Explainer) -> None:
    seed = np.zeros((4, 5), np.float32)
    seed[:, 0], seed[:, 3] = 1, -1
    result = explainer.explain(IMAGES, target=seed)
    assert result.target is None
    assert_maps_close(result.maps, reference_maps(torch.from_numpy(seed)), 1e-4)
    several = explainer.explain(IMAGES, target=np.stack([seed, -seed], axis=1))
    assert_maps_close(several.maps[:, 0], result.maps, 1e-5)


def test_batches_of_any_size_give_the_same(exported: Path, explainer: camrt.Explainer) -> None:
    small = camrt.load(exported, max_batch=3)
    assert_maps_close(small.explain(IMAGES).maps, explainer.explain(IMAGES).maps, 1e-5)
    assert_maps_close(
        small.explain(IMAGES[:1], target=[[0, 1, 2, 3]]).maps,
        explainer.explain(IMAGES[:1], target=[[0, 1, 2, 3]]).maps,
        1e-5,
    )


def test_retuning_is_explaining_anew_without_the_network(explainer: camrt.Explainer, monkeypatch) -> None:
    result = explainer.explain(IMAGES, target=1, percentile=90)
    wanted = explainer.explain(IMAGES, target=1, percentile=20, layer_aggregation="max", interpolation="nearest")
    monkeypatch.setattr(explainer.session, "run", None)  # the network cannot run any more
    tuned = result.retune(percentile=20).retune(layer_aggregation="max", interpolation="nearest")
    np.testing.assert_array_equal(tuned.maps, wanted.maps)
    np.testing.assert_array_equal(tuned.layer_weights, wanted.layer_weights)
    assert tuned.options == wanted.options and result.options["percentile"] == 90


@pytest.mark.parametrize("aggregation", GRADIENT_AGGREGATIONS)
def test_gradient_aggregations(explainer: camrt.Explainer, aggregation: str) -> None:
    """Other aggregations than the mean take whole gradients out of the network; the mean taken so is the mean."""
    result = explainer.explain(IMAGES, target=1, gradient_aggregation=aggregation, percentile=30)
    recorded = record(small_net(), torch.from_numpy(IMAGES), 1, CONVOLUTIONS)
    maps, alphas = [], []
    for name in CONVOLUTIONS:
        a, g = recorded.activations[name].numpy(), recorded.gradients[name].numpy()
        flat = g.reshape(*g.shape[:2], -1)
        alpha = {
            "mean": flat.mean(-1),
            "max": flat.max(-1),
            "min": flat.min(-1),
            "absmean": np.abs(flat).mean(-1),
            "absmax": np.abs(flat).max(-1),
            "sum": flat.sum(-1),
            "l2": np.linalg.norm(flat, axis=-1),
        }[aggregation]
        alphas.append(np.maximum(alpha.mean(1), 0))
        maps.append(torch.from_numpy(np.maximum(np.einsum("bk,bkhw->bhw", alpha, a), 0)))
    from camrt.verification.methods import minmax, resize, winsor_weights

    weights = torch.stack([winsor_weights(torch.from_numpy(row), 30) for row in np.stack(alphas, 1)])
    stack = torch.stack([resize(resize(minmax(m), (16, 16)), (32, 32)) for m in maps], 1)
    want = (weights[:, :, None, None] * stack).sum(1).numpy()
    assert_maps_close(result.maps, want, 1e-4)


def test_images_in_every_form_are_the_same(explainer: camrt.Explainer, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    tensor = ((pixels.astype(np.float32) / 255 - 0.5) / 0.25).transpose(2, 0, 1)
    want = explainer.explain(tensor[None], target=1).maps[0]
    forms = [
        pixels,
        pixels[None],
        [pixels],
        tensor,
        [tensor],
        Image.fromarray(pixels),
        [Image.fromarray(pixels)],
        tmp_path / "picture.png",
        str(tmp_path / "picture.png"),
        [tmp_path / "picture.png"],
    ]
    for form in forms:
        result = explainer.explain(form, target=1)
        assert_maps_close(result.maps[0], want, 1e-5)
        np.testing.assert_allclose(result.pictures[0], pixels, atol=1)


def test_a_turned_photo_is_explained_upright(explainer: camrt.Explainer, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    turned = Image.fromarray(np.rot90(pixels))
    exif = turned.getexif()
    exif[0x0112] = 6  # stored a quarter turn anticlockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    result = explainer.explain(tmp_path / "turned.png")
    np.testing.assert_array_equal(result.pictures[0], pixels)


def test_overlay_and_normalized(explainer: camrt.Explainer) -> None:
    result = explainer.explain(IMAGES, target=1)
    normalized = result.normalized()
    assert_maps_close(normalized, scaled(result.maps), 1e-6)
    picture = result.overlay(0)
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    warm = np.unravel_index(normalized[0].argmax(), (32, 32))
    assert int(picture[warm][0]) - int(picture[warm][2]) > 30  # red where the map is highest
    several = explainer.explain(IMAGES[:1], target=[[0, 1]])
    assert several.overlay((0, 1)).shape == (32, 32, 3)
    with pytest.raises(camrt.CamrtError, match="pass \\(image, target\\)"):
        several.overlay(0)


def test_threads_share_an_explainer(exported: Path) -> None:
    explainer = camrt.load(exported)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: explainer.explain(IMAGES[i % 4], target=i % 5).maps[0], range(40)))
    for i, maps in enumerate(results):
        assert_maps_close(maps, explainer.explain(IMAGES[i % 4], target=i % 5).maps[0], 1e-6)


def test_several_layers_by_name(explainer: camrt.Explainer) -> None:
    result = explainer.explain(IMAGES, target=1, layers=["head.0", "stem"], percentile=100)
    assert result.layers == ("stem", "head.0")
    recorded = record(small_net(), torch.from_numpy(IMAGES), 1, ["stem", "head.0"])
    assert_maps_close(result.maps, winsor_cam(recorded, (32, 32), 100)[0].numpy(), 1e-4)


REFUSALS = [
    ({"images": np.full((1, 3, 32, 32), np.nan, np.float32)}, "image 0: holds NaN or infinity"),
    (
        {"images": np.zeros((1, 1, 32, 32), np.float32)},
        r"image 0: shape \(1, 32, 32\), the network takes \(3, 32, 32\)",
    ),
    ({"images": np.zeros((1, 3, 32, 31), np.float32)}, r"image 0: shape \(3, 32, 31\), the network takes"),
    ({"images": np.zeros((1, 3, 32, 32))}, "dtype float64: pass preprocessed float32"),
    ({"images": np.zeros((5, 5, 5, 5), np.uint8)}, r"uint8 array of shape \(5, 5, 5\): pass \(height, width, 3\)"),
    ({"images": []}, "no images were given"),
    ({"images": 3.5}, "images of type float"),
    ({"images": "missing.png"}, "missing.png: no such file"),
    ({"target": 5}, r"class 5 is out of range: the network has classes 0\.\.4"),
    ({"target": -1}, "class -1 is out of range"),
    ({"target": [0, 1]}, r"target of shape \(2,\): pass one class, one per image \(4\)"),
    ({"target": "cow"}, "no class 'cow' of this bundle: it has 'ant', 'bee', 'cat', 'dog', 'elk'"),
    ({"target": np.zeros((4, 5), np.float32)}, "every row needs finite entries, not all of them zero"),
    ({"target": np.zeros((4, 3), np.float32)}, r"seed array of shape \(4, 3\): pass \(4, 5\)"),
    ({"method": "winsor"}, "no method 'winsor': did you mean 'winsor_cam'"),
    ({"percentile": 101}, r"percentile 101 is outside 0\.\.100"),
    ({"percentile": -0.1}, r"percentile -0.1 is outside 0\.\.100"),
    ({"percentile": float("nan")}, r"percentile nan is outside 0\.\.100"),
    ({"layer_aggregation": "median"}, "layer_aggregation 'median': use mean, max"),
    ({"gradient_aggregation": "median"}, "gradient_aggregation 'median': use mean, max"),
    ({"interpolation": "cubic"}, "interpolation 'cubic': use bilinear, nearest"),
    ({"low": 2.0}, "they need 0 < low <= high"),
    ({"method": "grad_cam", "percentile": 50}, "grad_cam has no option 'percentile'"),
    ({"layers": ["stemm"]}, "the bundle has no layer 'stemm': did you mean 'stem'"),
    ({"layers": []}, "layers is empty: name layers"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS, ids=[m[:40] for _, m in REFUSALS])
def test_refusals_are_one_line(explainer: camrt.Explainer, arguments: dict, message: str) -> None:
    with pytest.raises(camrt.CamrtError, match=message) as caught:
        given: dict[str, Any] = {"images": IMAGES} | arguments
        explainer.explain(**given)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_image_is_named(explainer: camrt.Explainer, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not pixels")
    with pytest.raises(camrt.CamrtError, match=r"notes\.png: not a readable image"):
        explainer.explain(tmp_path / "notes.png")


def test_a_truncated_image_is_named(explainer: camrt.Explainer, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(camrt.CamrtError, match=r"half\.jpg: not a readable image"):
        explainer.explain(tmp_path / "half.jpg")


def test_grad_cam_cannot_be_retuned(explainer: camrt.Explainer) -> None:
    with pytest.raises(camrt.CamrtError, match="grad_cam has nothing to retune"):
        explainer.explain(IMAGES, "grad_cam").retune(percentile=3)
    with pytest.raises(camrt.CamrtError, match="cannot retune 'gradient_aggregation'"):
        explainer.explain(IMAGES).retune(gradient_aggregation="max")


def test_a_bundle_without_a_recipe_takes_arrays_only(tmp_path: Path) -> None:
    explainer = camrt.load(camrt.export_model(small_net(), tmp_path / "bare.camrt", (3, 32, 32), layers="last"))
    assert explainer.explain(IMAGES, "grad_cam").maps.shape == (4, 32, 32)
    with pytest.raises(camrt.CamrtError, match="does not say how to preprocess pictures"):
        explainer.explain(np.zeros((32, 32, 3), np.uint8), "grad_cam")
    with pytest.raises(
        camrt.CamrtError,
        match="winsor_cam needs the layers 'conv', which this bundle lacks: export it with --layers conv",
    ):
        explainer.explain(IMAGES)


def test_a_mean_that_cancels_is_no_importance() -> None:
    """Behind a layer norm the alphas sum to zero over channels: what float32 leaves of their mean has no meaning."""
    alphas = np.random.default_rng(0).standard_normal((4, 96)).astype(np.float32)
    alphas *= np.sign(alphas.mean(axis=1, keepdims=True))
    centred = alphas - alphas.mean(axis=1, keepdims=True)
    assert (layer_importance(centred, [96])[0] != 0).any()
    importance, relative = layer_importance(centred, [96], zero=[1e-6])
    assert not importance.any() and 0 < np.abs(relative).max() < 1e-6
    assert layer_importance(0 * centred, [96])[1].min() == np.inf
    importance, relative = layer_importance(alphas, [96], zero=[1e-6])
    np.testing.assert_allclose(importance[:, 0], alphas.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(relative[:, 0], alphas.mean(axis=1) / np.abs(alphas).mean(axis=1), rtol=1e-5)


def test_a_map_of_no_important_layer_is_zero_and_warned_of(explainer: camrt.Explainer) -> None:
    result = explainer.explain(IMAGES, target=1, layer_aggregation="max")
    seed = np.zeros((1, 5), np.float32)
    seed[0, 1] = 1
    layers = [name for name, w in zip(result.layers, result.layer_weights[0], strict=True) if w > 0]
    assert layers
    with pytest.warns(UserWarning, match="no layer has positive min importance"):
        empty = explainer.explain(IMAGES[:1], target=seed, layers=layers, layer_aggregation="min")
    assert (empty.maps == 0).all() and (empty.normalized() == 0).all() and (empty.layer_weights == 0).all()


class FoldsBatch(torch.nn.Module):
    """Treats the halves of an image as images of their own, as window attention does: the batch is not kept apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, 2, 1)
        self.second = torch.nn.Conv2d(4, 6, 3, 1, 1)
        self.fc = torch.nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).relu()
        halves = y.reshape(-1, 4, 2, 8, 16).transpose(1, 2).reshape(-1, 4, 8, 16)
        z = self.second(halves).relu().mean((2, 3))
        return self.fc(z.reshape(-1, 2, 6).mean(1))


def test_several_targets_where_the_batch_is_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    explainer = camrt.load(camrt.export_model(FoldsBatch(), tmp_path / "folds.camrt", (3, 32, 32), layers=["conv"]))
    assert not explainer.manifest.seeds_share_image
    several = explainer.explain(IMAGES[:2], target=[[0, 1, 2], [2, 3, 4]], layer_aggregation="max")
    assert several.target is not None
    for k in range(3):
        one = explainer.explain(IMAGES[:2], target=several.target[:, k], layer_aggregation="max")
        assert_maps_close(several.maps[:, k], one.maps, 1e-5)
    assert several.maps.max() > 0


def test_a_batch_in_parts_is_retuned_as_a_whole(exported: Path) -> None:
    whole, parts = (camrt.load(exported, max_batch=size).explain(IMAGES, percentile=90) for size in (4, 3))
    assert len(parts) == 4
    for options in ({"percentile": 20}, {"layer_aggregation": "max", "percentile": 70}):
        again = parts.retune(**options)
        assert_maps_close(again.maps, whole.retune(**options).maps, 1e-6)
        assert not np.array_equal(again.maps, parts.maps)


def test_one_seed_for_every_image(explainer: camrt.Explainer) -> None:
    seed = np.array([0, 1, 0, -1, 0], np.float32)
    shared = explainer.explain(IMAGES, target=seed)
    each = explainer.explain(IMAGES, target=np.repeat(seed[None], 4, axis=0))
    assert shared.target is None
    np.testing.assert_array_equal(shared.maps, each.maps)


def test_pictures_are_of_the_arrays_as_they_were(explainer: camrt.Explainer) -> None:
    """A caller may fill the same buffer again before the overlay is drawn."""
    buffer = IMAGES[:1].copy()
    result = explainer.explain(buffer)
    buffer[:] = 0
    np.testing.assert_array_equal(result.pictures[0], explainer.explain(IMAGES[:1]).pictures[0])


def test_arrays_without_a_recipe_are_stretched_to_be_drawn(tmp_path: Path) -> None:
    path = camrt.export_model(small_net(), tmp_path / "plain.camrt", (3, 32, 32), "last")
    (picture,) = camrt.load(path).explain(IMAGES[:1], "grad_cam").pictures
    assert picture.dtype == np.uint8 and picture.shape == (32, 32, 3)
    assert (picture.min(), picture.max()) == (0, 255)


def test_a_constant_map_is_said(explainer: camrt.Explainer) -> None:
    """Of a seed of subnormal numbers all gradients are zero."""
    seeds = np.zeros((2, 5), np.float32)
    seeds[0, 1], seeds[1, 1] = 1, 1e-44
    with pytest.warns(UserWarning, match=r"hires_cam: the map of image 1 is constant, so it shows nothing"):
        result = explainer.explain(IMAGES[:2], "hires_cam", target=seeds)
    assert [image["constant_map"] for image in result.to_dict()["images"]] == [False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explainer.explain(IMAGES[:2], "hires_cam", target=1)


@pytest.mark.parametrize("largest", [2, 16])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("method", ["winsor_cam", "grad_cam", "score_cam_pp"])
def test_an_image_of_a_batch_alone(method: str, several: bool, largest: int, exported: Path) -> None:
    """It is what `explain` gives for it alone, and can be retuned alone."""
    explainer, images = camrt.load(exported, max_batch=largest), smooth_images((3, 32, 32), 5)
    targets: Any = np.arange(10).reshape(5, 2) % 5 if several else [0, 1, 2, 3, 4]
    batch = explainer.explain(images, method, targets)
    for i in (0, 2, -1):
        alone, want = batch.for_image(i), explainer.explain(images[i], method, [targets[i]])
        for name in ("maps", "layer_weights", "logits", "target"):
            got, expected = getattr(alone, name), getattr(want, name)
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, atol=1e-5)
        np.testing.assert_array_equal(alone.pictures[0], want.pictures[0])
        assert {name: v.shape for name, v in alone.details.items()} == {n: v.shape for n, v in want.details.items()}
        if method == "winsor_cam":
            again = pickle.loads(pickle.dumps(alone)).retune(percentile=40, layer_aggregation="max")
            np.testing.assert_array_equal(again.maps, batch.retune(percentile=40, layer_aggregation="max").maps[[i]])
            assert again.options["percentile"] == 40 and again.retune(percentile=0).maps.shape == want.maps.shape
    with pytest.raises(camrt.CamrtError, match="no image 5: there are 5"):
        batch.for_image(5)


def test_none_among_targets_is_the_top_class(explainer: camrt.Explainer) -> None:
    top = explainer.classify(IMAGES).argmax(axis=1)
    result = explainer.explain(IMAGES, target=[None, 2, None, 0])
    np.testing.assert_array_equal(result.target, [top[0], 2, top[2], 0])
    want = explainer.explain(IMAGES, target=[int(top[0]), 2, int(top[2]), 0])
    np.testing.assert_array_equal(result.maps, want.maps)
    for wrong in ([None, 2], [None, [1, 2], 1, 1], [None, 0.5, 1, 1], [None, 7, 1, 1]):
        with pytest.raises(camrt.CamrtError):
            explainer.explain(IMAGES, target=wrong)


def test_what_holds_a_function_does_not_pickle_it(explainer: camrt.Explainer) -> None:
    """As an explanation made on a GPU, of several batches, and one image of it."""
    made = explainer.explain(IMAGES)
    retune = made._retune
    assert retune is not None
    local = dataclasses.replace(made, _retune=lambda **options: retune(**options))
    twice = join([Result(made.maps, made.layer_weights, retune=local._retune)] * 2)
    several = dataclasses.replace(local, _retune=twice.retune)
    for explanation in (local, several, local.for_image(1)):
        copied = pickle.loads(pickle.dumps(explanation))
        np.testing.assert_array_equal(copied.maps, explanation.maps)
        with pytest.raises(camrt.CamrtError, match="nothing to retune"):
            copied.retune(percentile=3)
    again = local.for_image(1).retune(percentile=3)
    np.testing.assert_array_equal(again.maps, made.retune(percentile=3).maps[1:2])
