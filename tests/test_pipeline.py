"""The pipeline on a GPU, on the emulated one: the kernels run by their own sources, programs by ONNX Runtime on its
arrays.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PREPROCESS
from emulator import EmulatedDevice, EmulatedGpu
from PIL import Image

import camrt
from camrt.export.probes import smooth_images
from camrt.kernels import DeviceArray, DeviceError, OutOfMemory
from camrt.kernels.gpu.queue import Queue
from camrt.runtime.backends import create, ort
from camrt.runtime.backends.gpu import Gpu, GpuProgram
from camrt.runtime.bundle.manifest import Program
from camrt.runtime.bundle.reading import Bundle, read_bundle
from camrt.runtime.cams import METHODS
from camrt.runtime.errors import EngineError
from camrt.runtime.explainer import Explainer

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: the GPU pipeline is not tested")

IMAGES = smooth_images((3, 32, 32), 3)


@dataclass
class EmulatedEngine:
    """A program that ONNX Runtime runs on the emulated GPU's arrays."""

    backend: EmulatedBackend
    program: Program
    session: Any

    def enqueue(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        backend, gpu = self.backend, self.backend.emulated
        if any(len(a) > backend.room for a in inputs.values()):
            raise OutOfMemory(f"{self.program.file}: out of memory, use a smaller batch")
        if gpu.capturing and not backend.capturable:
            raise EngineError("the engine could not be run")
        if backend.broken:
            raise DeviceError("cuLaunchKernel failed: unspecified launch failure")

        def step() -> None:
            backend.runs.append((self.program.file, max(map(len, inputs.values()))))
            out = self.session.run({name: gpu.download(a) for name, a in inputs.items()})
            for name, array in outputs.items():
                gpu.write(array, np.ascontiguousarray(backend.spoil(name, out[name])))

        gpu.do(step)


@dataclass
class EmulatedBackend:
    """captures: whether CUDA graphs are made. room: the most images that its memory has room for."""

    emulated: EmulatedGpu
    captures: bool = True
    room: int = 1000
    broken: bool = False
    capturable: bool = True
    name: str = "emulated"
    lanes: int = 1
    prunes: bool = False
    runs: list[tuple[str, int]] = field(default_factory=list)
    spoiled: str = ""

    def __post_init__(self) -> None:
        self.gpu = Gpu(self.emulated, self.captures)
        self._processor = create("onnxruntime")

    def spoil(self, name: str, array: np.ndarray) -> np.ndarray:
        if name != self.spoiled:
            return array
        array = array.copy()
        array.flat[len(array.flat) // 2] = np.nan
        return array

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> GpuProgram:
        return GpuProgram(program, EmulatedEngine(self, program, self._processor.open(bundle, program)), self.gpu)


@pytest.fixture
def backend(emulated: EmulatedGpu) -> EmulatedBackend:
    emulated.order = 0
    emulated.launched.clear()
    return EmulatedBackend(emulated)


@pytest.fixture
def on_gpu(exported: Path, backend: EmulatedBackend) -> Explainer:
    return Explainer(read_bundle(exported), backend, max_batch=2, mask_batch=2)


def assert_same(got: Any, want: Any, atol: float = 1e-5) -> None:
    for name in ("maps", "logits", "layer_weights"):
        mine, theirs = getattr(got, name), getattr(want, name)
        assert isinstance(mine, np.ndarray) and mine.dtype == theirs.dtype == np.float32 and mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, atol=atol, err_msg=name)
    np.testing.assert_array_equal(got.target, want.target)
    assert got.layers == want.layers and set(got.details) == set(want.details)
    for name, values in want.details.items():
        if values.dtype == object:
            np.testing.assert_array_equal(got.details[name], values, err_msg=name)
        else:
            np.testing.assert_allclose(got.details[name], values, err_msg=name)


def test_the_emulated_gpu_is_a_queue(emulated: EmulatedGpu) -> None:
    assert isinstance(emulated, Queue)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_gives_the_maps_of_the_cpu(name: str, on_gpu: Explainer, explainer: camrt.Explainer) -> None:
    """On batches that the largest does not divide, twice, so that graphs are captured, and once more, replayed."""
    want = explainer.explain(IMAGES, name)
    for _ in range(3 if METHODS[name].data({}).captured else 1):
        assert_same(on_gpu.explain(IMAGES, name), want)
    classes = np.array([[0, 3], [1, 2], [4, 4]])
    assert_same(on_gpu.explain(IMAGES, name, classes), explainer.explain(IMAGES, name, classes))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("winsor_cam", {"percentile": 0, "layer_aggregation": "max"}),
        ("winsor_cam", {"percentile": 37.5, "interpolation": "nearest", "low": 0.2, "high": 2.0}),
        ("winsor_cam", {"gradient_aggregation": "absmax"}),
        ("winsor_cam", {"layers": ["stem", "head.0"]}),
        ("score_cam_pp", {"variant": "tanh_mask_only"}),
        ("score_cam_pp", {"variant": "sigmoid_relu"}),
        ("score_cam_pp", {"baseline": "zero"}),
        ("score_cam_pp", {"max_error": 2.0}),
        ("score_cam_pp", {"layers": ["head", "block.0"]}),
        ("score_cam", {"variant": "pytorch_grad_cam"}),
        ("score_cam", {"layers": ["head", "block.0"]}),
    ],
)
def test_options(method: str, options: dict[str, Any], on_gpu: Explainer, explainer: camrt.Explainer) -> None:
    for target in (2, np.eye(5, dtype=np.float32)[:2][None] - 0.25):
        want = explainer.explain(IMAGES[:1], method, target, **options)
        assert_same(on_gpu.explain(IMAGES[:1], method, target, **options), want)


def test_nothing_of_winsor_cam_visits_the_host(on_gpu: Explainer, backend: EmulatedBackend, monkeypatch: Any) -> None:
    """One upload of images and seeds, one download of map, weights and logits."""
    on_gpu.explain(IMAGES[:1])
    on_gpu.explain(IMAGES[:1])
    moved: list[Any] = []
    before = len(backend.runs)
    upload, download = backend.emulated.upload, backend.emulated.download_all
    monkeypatch.setattr(backend.emulated, "upload", lambda a, out=None: moved.append(("up", a.shape)) or upload(a, out))
    monkeypatch.setattr(
        backend.emulated, "download_all", lambda a: moved.append(("down", [x.shape for x in a])) or download(a)
    )
    on_gpu.explain(IMAGES[1:2])
    assert backend.runs[before:] == [("layer_maps.onnx", 1)]
    assert moved == [("up", (3, 32, 32)), ("up", (1, 5)), ("down", [(1, 32, 32), (1, 3), (1, 3), (1, 5)])]


def test_masks_are_made_in_the_programs_own_input(on_gpu: Explainer, backend: EmulatedBackend) -> None:
    on_gpu.explain(IMAGES[:1], "score_cam_pp")
    kernels = [launch.kernel for launch in backend.emulated.launched]
    ran = [size for file, size in backend.runs if file == "classify.onnx"]
    assert set(ran) == {2} and len(ran) == kernels.count("mask_batch_f32_wide") > 1, "all runs have one size"
    assert kernels.count("accumulate_maps_wide") == kernels.count("class_scores") == 1, "once for all masks"


def test_retuning_after_other_explanations_were_made(on_gpu: Explainer, explainer: camrt.Explainer) -> None:
    """A replayed graph writes the same memory again: what is retuned must have its own."""
    results = [on_gpu.explain(IMAGES[i : i + 1], percentile=90) for i in range(3)]
    for i, result in enumerate(results):
        want = explainer.explain(IMAGES[i : i + 1], percentile=90)
        assert_same(result, want)
        for change in ({"percentile": 20}, {"layer_aggregation": "l2"}, {"interpolation": "nearest"}):
            result, want = result.retune(**change), want.retune(**change)
            assert_same(result, want)
    with pytest.raises(camrt.CamrtError, match="winsor_cam cannot retune 'gradient_aggregation'"):
        results[0].retune(gradient_aggregation="max")


def test_graphs_of_many_shapes_and_options(on_gpu: Explainer, explainer: camrt.Explainer) -> None:
    """More than are kept; each gives its own."""
    for _ in range(2):
        for count in (1, 2, 3):
            for percentile in (0, 20, 40, 60, 80, 100):
                got = on_gpu.explain(IMAGES[:count], percentile=percentile)
                assert_same(got, explainer.explain(IMAGES[:count], percentile=percentile))


def test_without_graphs(exported: Path, emulated: EmulatedGpu, explainer: camrt.Explainer) -> None:
    """As with ONNX Runtime's CUDA provider."""
    eager = Explainer(read_bundle(exported), EmulatedBackend(emulated, captures=False), max_batch=2)
    for _ in range(3):
        assert_same(eager.explain(IMAGES), explainer.explain(IMAGES))


def test_what_cannot_be_captured_is_run_as_it_is(
    on_gpu: Explainer, backend: EmulatedBackend, explainer: camrt.Explainer
) -> None:
    backend.capturable = False
    want = explainer.explain(IMAGES[:1])
    assert_same(on_gpu.explain(IMAGES[:1]), want)
    with pytest.warns(UserWarning, match="cannot be replayed as a CUDA graph, so it is slower: the engine could"):
        assert_same(on_gpu.explain(IMAGES[:1]), want)
    assert_same(on_gpu.explain(IMAGES[:1]), want)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("resize", [(32, 32), 40, 32])
def test_pictures_are_preprocessed_as_pillow_does(
    interpolation: str, resize: Any, tmp_path: Path, exported: Path, backend: EmulatedBackend
) -> None:
    """To the last bit, whatever their sizes; together with arrays and files."""
    recipe = camrt.Preprocess(resize, PREPROCESS.mean, PREPROCESS.std, (32, 32), interpolation)
    opened = read_bundle(exported)
    bundle = replace(opened, manifest=replace(opened.manifest, preprocess=recipe))
    on_gpu, on_cpu = Explainer(bundle, backend), Explainer(bundle, create("onnxruntime"))
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (33, 200), (200, 33), (131, 97), (32, 50), (5, 7), (300, 290)]
    pictures: list[Any] = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    Image.fromarray(pictures[3]).save(tmp_path / "x.png")
    given = [*pictures, tmp_path / "x.png", Image.fromarray(pictures[1]).convert("L"), IMAGES[0]]
    got, want = on_gpu.explain(given, "grad_cam"), on_cpu.explain(given, "grad_cam")
    np.testing.assert_array_equal(got.logits, want.logits)
    assert_same(got, want)
    for mine, theirs in zip(got.pictures, want.pictures, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(on_gpu.classify(given), on_cpu.classify(given))


@pytest.mark.parametrize("method", ["winsor_cam", "score_cam_pp", "recipro_cam"])
def test_out_of_memory_halves_the_batch(
    method: str, exported: Path, backend: EmulatedBackend, explainer: camrt.Explainer
) -> None:
    on_gpu = Explainer(read_bundle(exported), backend, max_batch=16)
    backend.room = 2
    assert_same(on_gpu.explain(IMAGES, method), explainer.explain(IMAGES, method))
    assert max(size for _, size in backend.runs) == 2
    session = on_gpu.session
    assert (session.max_batch, session.mask_batch) == ((16, 2) if method == "score_cam_pp" else (2, 64)), "and stays so"
    backend.room = 0
    with pytest.raises(camrt.CamrtError, match="out of memory, use a smaller batch"):
        on_gpu.explain(IMAGES[:1], method)


@pytest.mark.parametrize(
    ("said", "memory"),
    [
        ("Failed to allocate memory for requested buffer of size 205520896", True),
        ("Exception during initialization: cuda_call.cc:154\nCUBLAS failure 3: the resource allocation failed ;", True),
        ("CUDA failure 2: out of memory ; GPU=0", True),
        ("CUDNN failure 4000: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("Non-zero status code returned while running Conv node", False),
    ],
)
def test_onnx_runtimes_words_for_memory_that_is_used_up(said: str, memory: bool) -> None:
    """As its CUDA provider said them on a GPU that was filled."""
    assert ort._out_of_memory(RuntimeError(said)) is memory


@pytest.mark.parametrize("name", ["alphas", "maps", "logits"])
def test_nan_is_refused(name: str, exported: Path, backend: EmulatedBackend) -> None:
    """Also where a minimum and a maximum would pass over it."""
    on_gpu = Explainer(read_bundle(exported), backend)
    on_gpu.explain(IMAGES)
    backend.spoiled = name
    for _ in range(3):
        with pytest.raises(camrt.CamrtError, match="the network gave NaN or infinity"):
            on_gpu.explain(IMAGES)
    with pytest.raises(camrt.CamrtError, match="the network gave NaN or infinity"):
        on_gpu.explain(IMAGES, "grad_cam")
    backend.spoiled = ""
    assert np.isfinite(on_gpu.explain(IMAGES).maps).all()


def test_a_gpu_that_fails_is_one_line(on_gpu: Explainer, backend: EmulatedBackend) -> None:
    backend.broken = True
    with pytest.raises(camrt.CamrtError, match=r"^cuLaunchKernel failed: unspecified launch failure$"):
        on_gpu.explain(IMAGES)


def test_threads_share_the_gpu(on_gpu: Explainer, explainer: camrt.Explainer) -> None:
    """Each gets its own maps, and retunes them while others explain."""
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for turn in range(2):
                image, method = IMAGES[(index + turn) % 3][None], ("winsor_cam", "score_cam_pp")[index % 2]
                got, want = on_gpu.explain(image, method), explainer.explain(image, method)
                assert_same(got, want)
                if method == "winsor_cam":
                    assert_same(got.retune(percentile=10), want.retune(percentile=10))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_bad_input_is_refused_before_anything_runs(on_gpu: Explainer, backend: EmulatedBackend) -> None:
    for images in (np.zeros((1, 3, 9, 9), np.float32), np.full((1, 3, 32, 32), np.nan, np.float32), "nowhere.png"):
        with pytest.raises(camrt.CamrtError):
            on_gpu.explain(images)
    with pytest.raises(camrt.CamrtError, match=r"percentile \[1\] is outside 0..100"):
        on_gpu.explain(IMAGES, percentile=[1])
    assert not [f for f, _ in backend.runs if f != "layer_maps.onnx"]


def test_what_is_kept_for_later_is_given_back_before_batches_are_halved(
    on_gpu: Explainer, backend: EmulatedBackend, explainer: camrt.Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu.explain(IMAGES)
    backend.room = 0
    monkeypatch.setattr(EmulatedDevice, "give_back", lambda _: setattr(backend, "room", 1000))
    assert_same(on_gpu.explain(IMAGES, percentile=10), explainer.explain(IMAGES, percentile=10))
    assert on_gpu.session.max_batch == 2
