"""The same picture gives the same map: again, in another process's place, in any batch, on any number of threads."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import camrt
from camrt.demo.run import BUNDLE
from camrt.demo.scenes import draw_scene
from camrt.export.probes import smooth_images
from camrt.runtime.cams import METHODS
from camrt.runtime.session.lanes import Lanes

SCENES = [draw_scene(seed)[0] for seed in range(7)]
BATCH_LIMIT, THREADS_LIMIT = 1e-6, 1e-5  # after min-max


@pytest.fixture(scope="module")
def opened() -> camrt.Explainer:
    return camrt.load(BUNDLE, "onnxruntime")


def maps(explainer: camrt.Explainer, method: str, scenes: Any, target: Any = None) -> np.ndarray:
    found = explainer.explain(scenes, method, target).normalized()
    assert np.ptp(found) > 0.5, "maps that say nothing differ in nothing"
    return found


@pytest.mark.parametrize("method", list(METHODS))
def test_the_same_bits(method: str, opened: camrt.Explainer) -> None:
    want = [maps(opened, method, scene) for scene in SCENES[:3]]
    other = camrt.load(BUNDLE, "onnxruntime")
    for explainer in (opened, other):
        for scene, expected in zip(SCENES[:3], want, strict=True):
            np.testing.assert_array_equal(maps(explainer, method, scene), expected)
    batch = maps(opened, method, SCENES)
    np.testing.assert_array_equal(maps(other, method, SCENES), batch)


@pytest.mark.parametrize("method", list(METHODS))
def test_any_batch(method: str, opened: camrt.Explainer) -> None:
    """Alone, in batches of several sizes and places, and as one of several targets."""
    alone = [opened.explain(scene, method) for scene in SCENES]
    want = np.concatenate([a.normalized() for a in alone])
    target = np.array([int(a.logits.argmax()) for a in alone])
    for size in (2, 3, len(SCENES)):
        for start in range(len(SCENES) - size + 1):
            part = slice(start, start + size)
            got = maps(opened, method, SCENES[part], target[part])
            assert np.abs(got - want[part]).max() <= BATCH_LIMIT, (size, start)
    several = np.stack([target, (target + 1) % 8], axis=1)
    assert np.abs(maps(opened, method, SCENES, several)[:, 0] - want).max() <= BATCH_LIMIT


def test_large_images_of_a_batch_give_the_bits_that_each_gives_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    path = camrt.export_model(model, tmp_path / "large.camrt", (3, 200, 200), precision=["fp32", "fp16"])
    images = smooth_images((3, 200, 200), 3)
    for precision in ("fp32", "fp16"):
        explainer = camrt.load(path, "onnxruntime", threads=2, precision=precision)
        for method in ("winsor_cam", "grad_cam", "integrative_cam", "full_grad"):
            together = explainer.explain(images, method, [1, 2, 3])
            for i in range(3):
                alone = explainer.explain(images[i : i + 1], method, 1 + i)
                limit = BATCH_LIMIT if method == "integrative_cam" else 0  # NumPy 1 rounds its sums otherwise
                np.testing.assert_allclose(alone.maps[0], together.maps[i], rtol=0, atol=limit)
                np.testing.assert_array_equal(alone.logits[0], together.logits[i])
        several = explainer.explain(images, "winsor_cam", [[1, 2], [2, 3], [3, 0]])
        assert several.maps.shape == (3, 2, 200, 200)
        want = explainer.explain(images, "winsor_cam", [1, 2, 3]).normalized()
        assert np.abs(several.normalized()[:, 0] - want).max() <= BATCH_LIMIT


@pytest.mark.parametrize("method", list(METHODS))
def test_any_number_of_threads(method: str, opened: camrt.Explainer) -> None:
    want = maps(opened, method, SCENES[:2])
    for threads in (1, 2, 3, 5):
        explainer = camrt.load(BUNDLE, "onnxruntime", threads=threads)
        assert np.abs(maps(explainer, method, SCENES[:2]) - want).max() <= THREADS_LIMIT, threads


@pytest.mark.parametrize("count", [1, 2, 3])
def test_lanes_keep_the_order_and_tell_errors(count: int) -> None:
    lanes, busy, most, together = Lanes(count), 0, 0, threading.Barrier(count)

    def work(item: int) -> int:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        if item < count:
            together.wait(10)  # until every lane has an item
        busy -= 1
        return item * item

    assert lanes.map(work, range(20)) == [i * i for i in range(20)]
    assert most == count
    done: list[int] = []

    def failing(item: int) -> None:
        done.append(item)
        time.sleep(0.001)
        if item == 3:
            raise IndexError("of the work")

    with pytest.raises(IndexError, match="of the work"):
        lanes.map(failing, range(1000))
    assert len(done) < 500
    assert lanes.map(lambda item: item, []) == []


def test_a_caller_does_not_wait_for_lanes_that_others_use() -> None:
    lanes, started, release = Lanes(2), threading.Semaphore(0), threading.Event()

    def slow(item: int) -> int:
        started.release()
        release.wait(10)
        return item

    other = threading.Thread(target=lambda: lanes.map(slow, [0, 1]))
    other.start()
    for _ in range(2):  # its own thread and that of the lane
        assert started.acquire(timeout=10)
    assert lanes.map(lambda item: item, [1, 2, 3]) == [1, 2, 3]
    release.set()
    other.join()
