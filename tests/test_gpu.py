"""Streams, memory, graphs, other libraries' arrays and whole explanations on a GPU.

test_standin.py runs these tests on a stand-in for the driver. The kernels' values are in test_cuda.py.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import standin
from kernel_table import everything, filled
from support import small_net

import camrt
from camrt import kernels
from camrt.export.probes import smooth_images
from camrt.kernels import minmax
from camrt.kernels.build import sources_hash
from camrt.kernels.gpu import device as gpu
from camrt.kernels.gpu.queue import Launch
from camrt.runtime.backends import BACKENDS
from camrt.runtime.bundle.reading import read_bundle
from camrt.runtime.cams import METHODS
from camrt.verification.distances import cosine_distance, largest_difference

pytestmark = pytest.mark.gpu


@pytest.fixture
def stream() -> Any:
    try:
        return gpu.device().stream()
    except kernels.DeviceError as error:
        pytest.skip(str(error))


TURNS = 1 if "STANDIN" in os.environ else 5  # kernels are slow there
IMAGE, MAPS = filled("random", (3, 40, 33)), filled("random", (7, 5, 6))
MASKED = kernels.mask_batch(IMAGE, MAPS)


def close(got: np.ndarray, want: np.ndarray = MASKED) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "uint8"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_arrays_come_back_as_they_went(stream: Any, shape: tuple[int, ...], dtype: str) -> None:
    values = np.asarray(np.random.default_rng(0).integers(0, 99, shape), dtype)
    on_gpu = stream.upload(values)
    again = stream.empty(shape, dtype)
    stream.copy(on_gpu, again)
    for array in (on_gpu, again):
        got = stream.download(array)
        assert got.dtype == values.dtype
        np.testing.assert_array_equal(got, values)


def test_pinned_memory_is_not_used_again_before_it_is_copied(stream: Any) -> None:
    found = []
    for i in range(20):
        values = stream.pinned((1 << 20,))
        values[:] = i
        found.append(stream.upload(values))
        del values
    for i, array in enumerate(found):
        assert (stream.download(array) == i).all()


def test_memory_returns_to_its_stream_and_to_no_other(stream: Any) -> None:
    array = stream.empty((1000,))
    pointer = array.pointer
    del array
    other = stream.device.stream().empty((1000,))
    assert other.pointer != pointer
    assert stream.empty((1000,)).pointer == pointer


@pytest.mark.parametrize("shape", [(1 << 48,), (1 << 62,)])
def test_a_gpu_without_memory_is_named_and_goes_on(stream: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        kernels.DeviceError, match=r"float32\[\d+\] of \d+ bytes: out of memory on GPU 0 .*: use a smaller"
    ):
        stream.empty(shape)
    close(stream.download(kernels.mask_batch(stream.upload(IMAGE), stream.upload(MAPS), stream=stream)))


@pytest.mark.parametrize("order", ["default", "foreign", "own"])
def test_work_is_queued_in_the_order_of_any_stream(stream: Any, order: str) -> None:
    other = stream.device.stream()
    handle = {"default": None, "foreign": other.handle, "own": stream}[order]
    for _ in range(20):
        image, maps = other.upload(IMAGE), other.upload(MAPS)
        masked = kernels.mask_batch(image, maps, stream=handle)
        other.upload(np.zeros_like(IMAGE), out=image)  # after the kernel has read it
        close(other.download(masked))


def test_threads_have_a_stream_each(stream: Any) -> None:
    want, wrong = everything(stream), []

    def work() -> None:
        own = stream.device.stream()
        for _ in range(TURNS):
            wrong.extend(not np.array_equal(a, b) for a, b in zip(everything(own), want, strict=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 4 * TURNS * len(want) and not any(wrong)


def test_nan_is_raised_once(stream: Any) -> None:
    kernels.winsorize(stream.upload(np.array([[1, np.nan]], np.float32)), 50, stream=stream)
    with pytest.raises(ValueError, match="winsorize: a row holds NaN"):
        stream.synchronize()
    stream.synchronize()


def test_a_graph_runs_again_on_what_its_inputs_hold_then(stream: Any) -> None:
    image, maps = stream.upload(IMAGE), stream.upload(MAPS)
    total = stream.upload(np.zeros((1, 40, 33), np.float32))

    def work() -> Any:
        scores = stream.constant(np.ones((1, 7), np.float32))
        kernels.accumulate_maps(total, scores, maps, stream=stream)
        return kernels.mask_batch(image, maps, stream=stream)

    work()
    with stream.capture() as graph:
        masked = work()
    stream.upload(np.zeros((1, 40, 33), np.float32), out=total)
    for factor in (1, 2, 3):
        stream.upload(factor * IMAGE, out=image)
        graph.launch()
        close(stream.download(masked), factor * MASKED)
    want = np.zeros((1, 40, 33), np.float32)
    kernels.accumulate_maps(want, np.full((1, 7), 3, np.float32), MAPS)
    np.testing.assert_allclose(stream.download(total), want, rtol=1e-4, atol=1e-4)


def test_a_graph_uploads_again_what_it_held(stream: Any) -> None:
    values = np.arange(100, dtype=np.float32)
    place = stream.upload(np.zeros(100, np.float32))
    with stream.capture() as graph:
        stream.upload(values, out=place)
    values[:] = -1
    for _ in range(3):
        others = [stream.upload(np.full(100, 7, np.float32)) for _ in range(5)]
        graph.launch()
        np.testing.assert_array_equal(stream.download(place), np.arange(100))
        del others


def test_what_cannot_be_captured_is_refused_and_leaves_the_stream_whole(stream: Any) -> None:
    with (
        pytest.raises(kernels.DeviceError, match="the default stream cannot be captured"),
        stream.device.follower(0).capture(),
    ):
        pass
    with pytest.raises(kernels.DeviceError, match="is being captured already"), stream.capture(), stream.capture():
        pass
    layers = stream.upload(filled("random", (1, 6))), [(2, 3)], stream.upload(np.ones((1, 1), np.float32)), (9, 9)
    with pytest.raises(kernels.DeviceError, match="run the same work once before"), stream.capture():
        kernels.fuse_layers(*layers, stream=stream)
    with pytest.raises(KeyError), stream.capture():
        raise KeyError("the body's own")
    with pytest.raises(kernels.DeviceError, match="nothing was captured"), stream.capture() as graph:
        graph.launch()
    close(stream.download(kernels.mask_batch(stream.upload(IMAGE), stream.upload(MAPS), stream=stream)))


def test_kernels_that_are_missing_or_do_not_load_are_named(
    stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "BINARIES", tmp_path)
    launch = Launch("other", "other", (1, 1), 32, 0, ())
    with pytest.raises(kernels.DeviceError, match=r"no CUDA kernels \(other.fatbin\): build them by `python -m camrt"):
        stream.launch(launch)
    (tmp_path / "other.fatbin").write_bytes(b"not a fat binary")
    described = {"cuda": "99.0", "architectures": ["99.0"], "sources": "others"}
    (tmp_path / "build.json").write_text(json.dumps(described))
    with pytest.raises(kernels.DeviceError, match=r"other.fatbin was built from other sources than the installed ones"):
        stream.launch(launch)
    (tmp_path / "build.json").write_text(json.dumps({**described, "sources": sources_hash()}))
    with pytest.raises(
        kernels.DeviceError, match=r"built by CUDA 99.0 for compute capability 99.0, does not load on GPU 0"
    ):
        stream.launch(launch)


def test_a_gpu_that_is_not_there_is_named(stream: Any) -> None:
    with pytest.raises(kernels.DeviceError, match="no GPU 99: this machine has"):
        gpu.device(99)
    assert gpu.device(0) is gpu.device()


# ---- whole explanations: on the stand-in with ONNX Runtime's engines, on a GPU with its own


GPU_BACKENDS = [n for n, row in BACKENDS.items() if row.on_gpu]
MATCHES = {"fp32": largest_difference, "fp16": cosine_distance}  # both at most 1e-3
IMAGES = smooth_images((3, 32, 32), 4)
PICTURES = [np.random.default_rng(i).integers(0, 256, (50 + i, 41, 3), dtype=np.uint8) for i in range(3)]
SEVERAL = np.array([[0, 3], [1, 2], [4, 4]])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "small.camrt"
    preprocess = camrt.Preprocess(resize=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return camrt.export_model(small_net(), path, (3, 32, 32), preprocess=preprocess, precision=["fp32", "fp16"])


@pytest.fixture(scope="module")
def cpu(small: Path) -> camrt.Explainer:
    return camrt.load(small, "onnxruntime", precision="fp32", threads=1)


def loaded(path: Path, name: str, precision: str = "fp32", max_batch: int = 2) -> camrt.Explainer:
    if "STANDIN" in os.environ:
        return camrt.Explainer(read_bundle(path), standin.StandinBackend(), max_batch, precision)
    try:
        return camrt.load(path, name, max_batch, precision)
    except camrt.CamrtError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["standin"] if "STANDIN" in os.environ else GPU_BACKENDS)
def backend(request: pytest.FixtureRequest, stream: Any) -> str:
    return request.param


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_maps_of_the_cpu(
    cpu: camrt.Explainer, small: Path, backend: str, method: str, precision: str
) -> None:
    """Three times, so that what is captured is replayed; on an odd batch, several targets, and pictures."""
    there, distance = loaded(small, backend, precision), MATCHES[precision]
    for images in (IMAGES[:3], PICTURES):
        for target in (None, SEVERAL):
            want = cpu.explain(images, method, target)
            for _ in range(3):
                got = there.explain(images, method, target)
                np.testing.assert_array_equal(got.target, want.target)
                assert distance(minmax(got.maps), minmax(want.maps)) <= 1e-3, target


def test_what_an_explanation_gave_stays(cpu: camrt.Explainer, small: Path, backend: str) -> None:
    """Also its retune, while other images run in the same graphs, and more results live than the pool has spare
    memory for.
    """
    there = loaded(small, backend)
    want = [cpu.explain(image[None], percentile=80) for image in IMAGES]
    got = [there.explain(image[None], percentile=80) for _ in range(5) for image in IMAGES]
    there.explain(IMAGES[:2], "score_cam_pp")
    for a, b in zip(got, want * 5, strict=True):
        assert largest_difference(minmax(a.maps), minmax(b.maps)) <= 1e-3
        for percentile in (20, 60):
            again, expected = a.retune(percentile=percentile), b.retune(percentile=percentile)
            assert largest_difference(minmax(again.maps), minmax(expected.maps)) <= 1e-3


def test_what_benchmarks_gpu_compares(cpu: camrt.Explainer, small: Path, backend: str) -> None:
    expected = networks.expected_of(cpu, IMAGES[:1], ["winsor_cam", "score_cam_pp", "layer_cam"])
    there = loaded(small, backend)
    found = networks.distances_of(there, expected, "fp32", None)
    assert set(found) == {"distances"} and len(found["distances"]) == 3, found
    expected["map:layer_cam"] = 1 - minmax(expected["map:layer_cam"])
    assert set(networks.distances_of(there, expected, "fp32", None)["wrong"]) == {"layer_cam"}


def test_threads_share_an_explainer(cpu: camrt.Explainer, small: Path, backend: str) -> None:
    there, wrong = loaded(small, backend), []
    want = {m: [cpu.explain(image[None], m).maps for image in IMAGES] for m in ("winsor_cam", "score_cam_pp")}

    def work(method: str) -> None:
        for _ in range(3):
            for image, maps in zip(IMAGES, want[method], strict=True):
                wrong.append(largest_difference(minmax(there.explain(image[None], method).maps), minmax(maps)) > 1e-3)

    threads = [threading.Thread(target=work, args=(m,)) for m in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 2 * 3 * len(IMAGES) and not any(wrong)


# ---- PyTorch's arrays


@pytest.fixture
def cuda() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return torch


def test_torch_tensors_go_in_and_out_without_a_copy(stream: Any, cuda: Any) -> None:
    image, maps = (cuda.from_numpy(a).cuda() for a in (IMAGE, MAPS))
    out = cuda.empty(MASKED.shape, dtype=cuda.float32, device="cuda")
    kernels.mask_batch(image, maps, out=out)
    close(out.cpu().numpy())
    masked = kernels.mask_batch(image, maps)
    for taken in (cuda.from_dlpack(masked), cuda.as_tensor(masked, device="cuda")):
        assert taken.data_ptr() == masked.pointer
        close(taken.cpu().numpy())
    with pytest.raises(
        ValueError, match=r"^mask_batch: image \(3, 33, 40\) is not C-contiguous: make it contiguous first$"
    ):
        kernels.mask_batch(image.transpose(1, 2), maps)


def test_torchs_own_stream_is_followed(stream: Any, cuda: Any) -> None:
    side = cuda.cuda.Stream()
    with cuda.cuda.stream(side):
        for _ in range(20):
            image, maps = (cuda.from_numpy(a).cuda(non_blocking=True) for a in (IMAGE, MAPS))
            image = (
                image * 2 + 0 * cuda.randn(2000, 2000, device="cuda").matmul(cuda.ones(2000, 1, device="cuda")).sum()
            ) / 2
            masked = kernels.mask_batch(image.contiguous(), maps, stream=side.cuda_stream)
            close(cuda.from_dlpack(masked).cpu().numpy())
