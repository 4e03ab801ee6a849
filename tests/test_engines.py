"""TensorRT engines: what is built and how it is kept. TensorRT for RTX builds for GPUs that are not here."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
from support import small_net

import camrt
from camrt.cli import main
from camrt.commands import build
from camrt.export.probes import smooth_images
from camrt.kernels import DeviceArray, OutOfMemory
from camrt.runtime.backends import Settings, create
from camrt.runtime.backends.gpu import Gpu
from camrt.runtime.backends.ort import OrtCudaEngine
from camrt.runtime.backends.tensorrt import backend as backend_module
from camrt.runtime.backends.tensorrt.backend import TensorRtBackend
from camrt.runtime.backends.tensorrt.bindings import Library, find_library
from camrt.runtime.backends.tensorrt.build import build_engine
from camrt.runtime.backends.tensorrt.cache import EngineCache
from camrt.runtime.backends.tensorrt.engine import TensorRtEngine
from camrt.runtime.backends.tensorrt.target import Profile, Target, chosen, engine_key, profiles_of
from camrt.runtime.bundle.reading import read_bundle
from camrt.runtime.errors import EngineError

ADA = Target((8, 9), None)
KEY = {"program": "a" * 64, "library": "some 1.0", "largest": 16}
ENGINE = b"native code" * 1000


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network's bundle in all precisions."""
    path, images = tmp_path_factory.mktemp("engines") / "small.camrt", smooth_images((3, 32, 32), 8)
    precisions = ["fp32", "fp16", "int8"]
    return camrt.export_model(small_net(), path, (3, 32, 32), name="small", precision=precisions, calibration=images)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("CAMRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never() -> bytes:
    raise AssertionError("built again")


# ---- the cache


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("capability", [(7, 5), (8, 7), (9, 0), (12, 0)])
def test_a_machine_builds_the_engines_that_it_looks_up(
    name: str, capability: tuple[int, int], exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`camrt build` and the backend have the same key for this machine's GPU."""
    members = {f"SM{a}{b}": None for a, b in [(7, 5), (8, 7), (9, 0), (12, 0)]}
    trt = SimpleNamespace(__version__="10.9.0", ComputeCapability=SimpleNamespace(__members__=members, **members))
    library = Library(name, trt)
    card = SimpleNamespace(compute_capability=capability, name="Orin", model="Orin, 16 multiprocessors, 30000 MiB")
    monkeypatch.setattr(backend_module, "find_library", lambda: library)
    monkeypatch.setattr(backend_module, "open_gpu", lambda *_, **__: Gpu(cast(Any, SimpleNamespace(device=card)), True))
    monkeypatch.setattr(backend_module, "logger", lambda trt: None)
    monkeypatch.setattr("camrt.kernels.gpu.device.device", lambda: card)
    bundle = read_bundle(exported)
    program, profiles = bundle.manifest.programs[0], [Profile("single")]
    (target,) = build.targets(library, None)
    found = backend_module.create(Settings())
    assert engine_key(library, bundle, program, target, profiles) == engine_key(
        library, bundle, program, found.target, profiles
    )
    assert (target.gpu is None) == (name == "tensorrt_rtx")


def test_an_engine_is_built_once_for_its_key() -> None:
    cache = EngineCache()
    assert cache.fetch(KEY, lambda: ENGINE) == ENGINE
    assert EngineCache().fetch(KEY, never) == ENGINE
    assert cache.get(KEY | {"largest": 32}) is None
    assert [(e.key, e.size > len(ENGINE)) for e in cache.entries()] == [(KEY, True)]
    assert sorted(p.suffix for p in cache.folder.iterdir()) == [".engine"], "no lock and no half-written file stays"


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "foreign", "another key", "writable", "folder"])
def test_a_file_that_is_not_as_it_was_written_is_built_again(damage: str) -> None:
    cache = EngineCache()
    cache.fetch(KEY, lambda: ENGINE)
    path = cache.path(KEY)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "changed":
        path.write_bytes(data[:-1] + b"X")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        path.write_bytes(os.urandom(5000))
    elif damage == "another key":
        other = KEY | {"library": "other 2.0"}
        cache.fetch(other, lambda: b"other")
        shutil.copy(cache.path(other), path)
    elif damage == "writable":
        path.chmod(0o666)
    else:
        cache.folder.chmod(0o777)
    assert cache.get(KEY) is None
    if damage != "folder":
        assert cache.fetch(KEY, lambda: b"new") == b"new"
        assert cache.get(KEY) == b"new"
        assert path.stat().st_mode & 0o077 == 0
    else:
        with pytest.warns(UserWarning, match="others than this user can write"):
            assert cache.fetch(KEY, lambda: b"new") == b"new"


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, limit=35_000)
    keys = [KEY | {"largest": n} for n in range(4)]
    for n, key in enumerate(keys):
        cache.fetch(key, lambda: ENGINE)
        os.utime(cache.path(key), (n, n))
    assert [cache.get(k) is not None for k in keys] == [False, True, True, True]
    for seconds, key in zip((50, 40, 60), keys[1:], strict=True):
        os.utime(cache.path(key), (seconds, seconds))
    cache.fetch(KEY | {"largest": 9}, lambda: ENGINE)
    assert cache.path(keys[1]).exists() and not cache.path(keys[2]).exists()
    tiny = EngineCache(tmp_path / "tiny", limit=10)
    assert tiny.fetch(KEY, lambda: ENGINE) == ENGINE and tiny.get(KEY) == ENGINE, "the newest stays"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"engines cannot be kept there .*: set CAMRT_CACHE to another folder"):
        assert EngineCache(tmp_path).fetch(KEY, lambda: ENGINE) == ENGINE


def test_what_a_killed_build_left_goes_with_the_next_of_its_key(tmp_path: Path) -> None:
    cache, other = EngineCache(tmp_path, 100), {"program": "b"}
    cache.fetch(other, lambda: b"x")
    mine, theirs = (cache.path(key).with_suffix(".abc.part") for key in ({"program": "a"}, other))
    for part in (mine, theirs):
        part.write_bytes(b"half")
    assert cache.fetch({"program": "a"}, lambda: b"whole") == b"whole"
    assert not mine.exists() and theirs.exists()
    cache.clear()
    assert not list(cache.folder.iterdir())


def test_a_build_that_fails_leaves_nothing() -> None:
    cache = EngineCache()
    for error in (EngineError("no"), KeyboardInterrupt()):

        def fail(error: BaseException = error) -> bytes:
            raise error

        with pytest.raises(type(error)):
            cache.fetch(KEY, fail)
    assert cache.entries() == [] and not list(cache.folder.glob("*.part"))


def _fetch_slowly(folder: Path, log: Path) -> None:
    def build() -> bytes:
        with log.open("a") as file:
            file.write("x")
        time.sleep(0.5)
        return ENGINE

    assert EngineCache(folder).fetch(KEY, build) == ENGINE


def test_of_several_processes_one_builds(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fetch_slowly, args=(tmp_path, tmp_path / "log")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "x"


@pytest.mark.parametrize("text", ["much", "-1", "nan"])
def test_a_limit_that_is_no_number_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMRT_CACHE_GB", text)
    with pytest.raises(EngineError, match=f"CAMRT_CACHE_GB={text}: use a number of gigabytes"):
        EngineCache()


# ---- the builder


def test_build_and_cache_commands(both: Path, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    command = ["build", str(both), "--compute-capability", "8.6", "12.0", "--precision", "fp16", "--max-batch", "5"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 5 + 1
    files = ["activations.last.onnx", "classify.fp16.onnx", "masked.fp16.onnx", "layer_maps.fp16.onnx"]
    assert [line.split()[0] for line in lines[:5]] == [*files, "layer_maps.last.fp16.onnx"]
    start = "masked.fp16.onnx          float16  single, batch 64, masks 64        compute capability 8.6"
    assert lines[2].startswith(start), lines[2]
    assert all(re.search(r"built in [\d.]+ s; scratch memory on the GPU [\d, ]+ MB", line) for line in lines[:-1])
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("was built before" in line for line in lines[:-1])
    assert main(["cache", "list"]) == 0
    said = capsys.readouterr().out
    assert "10 engines" in said and "small layer_maps.fp16.onnx float16 tensorrt_rtx" in said
    names = sorted(p.name for p in (folder / "engines").glob("*.engine"))
    assert re.fullmatch(r"small-classify.fp16-tensorrt_rtx_[\d.]+-sm_12.0-[0-9a-f]{24}.engine", names[2]), names
    (folder / "engines" / f"{'0' * 64}.engine").write_bytes(b"?")
    assert main(["cache", "list"]) == 0
    assert "damaged: it will be built again" in capsys.readouterr().out
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"11 engines removed from {folder / 'engines'}\n"
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out.startswith("0 engines, 0.0 of 20000 MB")


REFUSED = [
    (
        ["--compute-capability", "9.0"],
        r"--compute-capability 9.0: tensorrt_rtx [\d.]+ builds for 7.5, 8.0, 8.6, 8.9",
    ),
    (["--compute-capability", "ada"], "--compute-capability ada: tensorrt_rtx"),
    (["--compute-capability", "8.9", "--max-batch", "0"], "--max-batch 0: use 1 or more"),
    (["--compute-capability", "8.9", "--programs", "winsor.onnx"], "has no program 'winsor.onnx'"),
    ([], "name --compute-capability"),
]


@pytest.mark.parametrize(("max_batch", "mask_batch"), [(16, None), (128, None), (4, 8)])
def test_a_build_has_the_profiles_that_load_asks_for(
    max_batch: int, mask_batch: int | None, both: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked: list[Settings] = []

    def noted(_: str, settings: Settings) -> Any:
        asked.append(settings)
        return create("onnxruntime", settings)

    monkeypatch.setattr("camrt.runtime.explainer.create", noted)
    camrt.load(both, max_batch=max_batch, mask_batch=mask_batch)
    opened = read_bundle(both)
    profiles = profiles_of(opened, opened.program("classify"), asked[0].max_batch, asked[0].mask_batch)
    options = ["--max-batch", str(max_batch)] + ([] if mask_batch is None else ["--mask-batch", str(mask_batch)])
    assert main(["build", str(both), "--compute-capability", "8.9", "--dry-run", *options]) == 0
    assert ", ".join(map(str, profiles)) in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "said"), REFUSED)
def test_a_build_that_makes_no_sense_is_refused(
    arguments: list[str], said: str, both: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(both), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error), error


def test_a_precision_that_the_bundle_lacks_is_refused(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(exported), "--compute-capability", "8.9", "--precision", "fp16"]) == 2
    assert "has no fp16 programs, it has fp32: export it with" in capsys.readouterr().err
    with pytest.raises(camrt.CamrtError, match="has no fp16 programs, it has fp32: export it with precision='fp16'"):
        camrt.load(exported, precision="fp16")


def test_a_dry_run_builds_nothing(both: Path, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    command = ["build", str(both), "--compute-capability", "8.9", "--mask-batch", "8"]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    count = said.count("would be built (size estimated)")
    assert count == len(said.splitlines()) - 1 and "single, batch 16, masks 8" in said
    assert not (folder / "engines").exists()
    estimated = [float(size) for size in re.findall(r"([\d.]+) MB  would", said)]
    assert main(command) == 0
    built = [float(size) for size in re.findall(r"([\d.]+) MB  built", capsys.readouterr().out)]
    assert all(0.4 < a / b < 2.5 for a, b in zip(estimated, built, strict=True)), (estimated, built)
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("was built before") == count


def test_every_profile_of_every_program_is_built(both: Path) -> None:
    """Also those of the other programs, and for several targets."""
    bundle, library = read_bundle(both), find_library("tensorrt_rtx")
    seen: list[str] = []
    for program in bundle.manifest.programs:
        profiles = profiles_of(bundle, program, 16, 64)
        made = build_engine(library, both / program.file, program, ADA, profiles, seen.append)
        assert made.warnings == [], program.file
    assert {p.kind for p in bundle.manifest.programs} > {"head", "trunk", "full_grad"}
    assert len(set(seen)) > 5, "the monitor says what is being done"


def test_profiles_follow_the_program_and_the_run(both: Path) -> None:
    opened = read_bundle(both)
    single, batch, masks = profiles_of(opened, opened.program("classify"), 5, 48)
    assert (single, batch, masks) == (Profile("single"), Profile("batch", 2, 64), Profile("masks", 47, 48))
    layer_maps = opened.program("layer_maps", [t.name for t in opened.manifest.taps])
    profiles = profiles_of(opened, layer_maps, 17, 64)
    assert profiles == (single, Profile("batch", 2, 32), Profile("targets", 2, 32))
    for sizes, kind in (
        ({"batch": 1, "seeds": 1}, "single"),
        ({"batch": 3, "seeds": 3}, "batch"),
        ({"batch": 1, "seeds": 3}, "targets"),
        ({"seeds": 3}, "targets"),
        ({}, "single"),
    ):
        assert profiles[chosen(profiles, sizes)].kind == kind, sizes
    for count, kind in ((1, "single"), (2, "batch"), (47, "batch"), (48, "masks"), (49, "batch")):
        assert (single, batch, masks)[chosen((single, batch, masks), {"batch": count})].kind == kind, count
    assert profiles[2].of_input(["batch", 3, 8, 8]) == ((1, 3, 8, 8), (1, 3, 8, 8))
    assert profiles[2].of_input(["seeds", 5]) == ((2, 5), (32, 5))
    assert profiles[1].of_input(["seeds", 5]) == ((2, 5), (32, 5))
    assert masks.of_input(["batch", 3, 8, 8]) == ((47, 3, 8, 8), (48, 3, 8, 8))


def test_a_program_that_the_library_does_not_take_names_its_node(both: Path, tmp_path: Path) -> None:
    bundle = read_bundle(both)
    program = bundle.program("classify")
    model = onnx.load(str(both / program.file), load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "Relu")
    node.op_type, node.name = "Celu9", "the_odd_one"
    shutil.copy(both / "weights.bin", tmp_path)
    (tmp_path / program.file).write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match=r"tensorrt_rtx .* does not take it: Celu9 'the_odd_one': .+"):
        build_engine(find_library("tensorrt_rtx"), tmp_path / program.file, program, ADA, [Profile("single")])


def test_an_interruption_ends_the_build(both: Path) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    bundle = read_bundle(both)
    program = bundle.program("layer_maps", [t.name for t in bundle.manifest.taps])
    with pytest.raises(KeyboardInterrupt):
        build_engine(find_library("tensorrt_rtx"), both / program.file, program, ADA, [Profile("single")], interrupt)


def test_the_key_holds_all_that_determines_an_engine(both: Path, bundle: Path) -> None:
    opened, library = read_bundle(both), find_library("tensorrt_rtx")
    program, other = opened.program("classify"), opened.program("classify", (), "fp16")
    one, several = [Profile("single")], [Profile("single"), Profile("batch", 1, 16)]
    keys = [
        engine_key(library, opened, program, ADA, one),
        engine_key(library, opened, other, ADA, one),
        engine_key(library, opened, program, ADA, several),
        engine_key(library, opened, program, ADA, [Profile("single"), Profile("batch", 1, 32)]),
        engine_key(library, opened, program, Target((8, 6), None), one),
        engine_key(library, opened, program, Target((8, 9), "Some GPU"), one),
        engine_key(library, read_bundle(bundle), program, ADA, one),  # other weights, or the same file
    ]
    assert len({json.dumps(k, sort_keys=True) for k in keys[:6]}) == 6
    assert keys[0]["weights"] == opened.manifest.weights["sha256"]


def test_engines_in_a_bundle_are_not_looked_at(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither beside the programs nor in a cache laid into the bundle: an engine is native code."""
    path = Path(shutil.copytree(both, tmp_path / "small.camrt"))
    opened, library = read_bundle(path), find_library("tensorrt_rtx")
    program = opened.program("classify")
    key = engine_key(library, opened, program, ADA, [Profile("single")])
    planted = EngineCache(path)
    planted.fetch(key, lambda: b"evil")
    shutil.copy(planted.path(key), path / planted.path(key).name)
    read: list[Any] = []
    monkeypatch.setattr(Path, "open", _noting(Path.open, read))
    assert EngineCache().fetch(key, lambda: b"good") == b"good"
    read_bundle(path)
    assert main(["build", str(path), "--compute-capability", "8.9", "--programs", "classify.onnx"]) == 0
    assert read and not [p for p in read if path in p.parents and p.suffix == ".engine"]


def _noting(function: Any, seen: list[Any]) -> Any:
    def call(self: Path, *arguments: Any, **options: Any) -> Any:
        seen.append(self)
        return function(self, *arguments, **options)

    return call


# ---- running: no GPU is here, so what the library is told is noted


class NotedContext:
    def __init__(self, trouble: set[str]) -> None:
        self.trouble = trouble
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.calls = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.calls += 1
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        classes = (self.shapes["image"][0], 4 if "shape" in self.trouble else 5)
        return self.shapes.get(name, classes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.calls += 1
        self.addresses[name] = address
        return "address" not in self.trouble

    def update_device_memory_size_for_shapes(self) -> int:
        return 0 if "size" in self.trouble else 1000

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 512 == 0 and size == 1000

    def set_optimization_profile_async(self, profile: int, handle: int) -> bool:
        self.calls += 1
        self.profile = profile
        return True

    def is_stream_capturable(self, handle: int) -> bool:
        return "capture" not in self.trouble

    def execute_async_v3(self, handle: int) -> bool:
        self.calls += 1
        return "run" not in self.trouble


class CompiledKernels:
    """TensorRT for RTX's runtime cache. read: what it was given."""

    accepted = True

    def __init__(self) -> None:
        self.read: bytes | None = None
        self.written = 0

    def serialize(self) -> bytes:
        self.written += 1
        return b"compiled kernels"

    def deserialize(self, data: bytes) -> bool:
        self.read = data
        return self.accepted


class NotedStream:
    """Its memory is only addresses."""

    handle, closed, capturing, model = 7, False, False, "Some GPU, 4 multiprocessors"

    def __init__(self) -> None:
        self.device = self
        self.held: list[Any] = []
        self.copied: list[tuple[DeviceArray, DeviceArray]] = []
        self.next = 1 << 20

    @contextmanager
    def active(self, what: str = "") -> Iterator[None]:
        yield

    def empty(self, shape: Any, dtype: Any = np.float32) -> DeviceArray:
        self.next += 1 << 20
        return DeviceArray(self.next, tuple(shape), np.dtype(dtype), self.handle)

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        self.copied.append((source, target))

    def hold(self, value: Any) -> None:
        if self.capturing:
            self.held.append(value)


@dataclass
class Noted:
    """A program on TensorRT, of which the engine is a note."""

    engine: TensorRtEngine
    stream: NotedStream
    contexts: list[NotedContext]
    trouble: set[str]
    backend: TensorRtBackend
    key: dict[str, Any]
    compiled: list[CompiledKernels]

    def run(self, images: int, offset: int = 0) -> None:
        array = DeviceArray((1 << 30) + offset, (images, 3, 32, 32), np.dtype(np.float32), 7)
        self.engine.enqueue({"image": array}, {"logits": self.stream.empty((images, 5))})


@pytest.fixture
def noted(both: Path) -> Noted:
    contexts: list[NotedContext] = []
    trouble: set[str] = set()
    compiled: list[CompiledKernels] = []

    def context(_: Any) -> NotedContext:
        contexts.append(NotedContext(trouble))
        return contexts[-1]

    def runtime_config() -> Any:
        compiled.append(CompiledKernels())
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda _: None,
            create_runtime_cache=lambda: compiled[-1],
            set_runtime_cache=lambda _: None,
        )

    class Runtime:
        def __init__(self, log: Any) -> None:
            self.log = log

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            assert data == b"engine"
            if "memory" in trouble:
                self.log.log(1, "Error Code 2: OutOfMemory (Requested size was 42 bytes.)")
                return None
            return SimpleNamespace(
                create_execution_context=context, device_memory_size_v2=1000, create_runtime_config=runtime_config
            )

    class Logger:
        Severity = SimpleNamespace(ERROR=1, WARNING=2)

    strategies = SimpleNamespace(USER_MANAGED=2)
    trt = SimpleNamespace(
        __version__="11.0.0",
        ILogger=Logger,
        Runtime=Runtime,
        ExecutionContextAllocationStrategy=strategies,
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER=1),
    )
    stream, opened = NotedStream(), read_bundle(both)
    target = Target((9, 0), "Some GPU")
    backend = TensorRtBackend(Library("tensorrt", trt), Gpu(cast(Any, stream)), target, Settings())
    program = opened.program("classify")
    key = engine_key(backend.tensorrt, opened, program, target, profiles_of(opened, program, 16, 64))
    backend.cache.fetch(key, lambda: b"engine")
    return Noted(TensorRtEngine(backend, opened, program), stream, contexts, trouble, backend, key, compiled)


def test_a_captured_graph_has_its_context_to_itself(noted: Noted) -> None:
    """The graph holds its state; another run, of the same shapes even, would change it."""
    noted.run(2)
    noted.run(3)
    noted.run(2)
    assert len(noted.contexts) == 1, "outside of graphs one context does"
    noted.stream.capturing = True
    with pytest.raises(camrt.CamrtError, match="run the same work once before it is captured"):
        noted.run(3)  # its shapes would be set in the capture
    noted.run(2)
    first = noted.contexts[0]
    assert noted.stream.held[0][0] is first
    with pytest.raises(camrt.CamrtError, match="run the same work once before it is captured"):
        noted.run(2)
    noted.stream.capturing = False
    calls = first.calls
    noted.run(2)
    noted.run(1)
    noted.run(3)
    assert first.calls == calls and len(noted.contexts) == 3, "one for graphs, one for batches, one for single images"


def test_an_image_that_lies_anywhere_in_a_batch_is_aligned(noted: Noted) -> None:
    noted.run(1, 512)
    assert not noted.stream.copied
    noted.run(1, 32 * 32 * 3 * 4 + 4)
    ((source, copy),) = noted.stream.copied
    assert copy.shape == source.shape and copy.pointer % 512 == 0
    assert noted.contexts[0].addresses["image"] == copy.pointer


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("address", r"classify.onnx: the engine does not take the memory of 'image'"),
        ("shape", r"classify.onnx: the engine's 'logits' is \(1, 4\), not \(1, 5\)"),
        ("size", r"classify.onnx: the engine does not say what memory it needs"),
        ("run", r"classify.onnx: the engine could not be run"),
    ],
)
def test_what_the_library_refuses_is_an_error(noted: Noted, trouble: str, said: str) -> None:
    if trouble != "size":  # it is asked for once
        noted.run(1)
    noted.trouble.add(trouble)
    with pytest.raises(camrt.CamrtError, match=said):
        noted.run(1)


def test_an_engine_that_cannot_be_captured_says_so(noted: Noted) -> None:
    noted.trouble.add("capture")
    noted.run(1)
    noted.stream.capturing = True
    with pytest.raises(camrt.CamrtError, match="cannot be captured for these shapes"):
        noted.run(1)


def test_an_engine_for_which_there_is_no_memory_is_kept(noted: Noted) -> None:
    noted.trouble.add("memory")
    with pytest.raises(OutOfMemory, match=r"the engine could not be loaded: .*OutOfMemory"):
        noted.run(2)
    assert noted.backend.cache.get(noted.key) == b"engine"


# ---- ONNX Runtime by IO binding, here with its processor's memory


def test_onnx_runtime_reads_and_writes_the_arrays_that_it_is_given(both: Path) -> None:
    opened = read_bundle(both)
    program = opened.program("layer_maps", [t.name for t in opened.manifest.taps])
    session = onnxruntime.InferenceSession(str(both / program.file), providers=["CPUExecutionProvider"])
    gpu: Any = None
    engine = OrtCudaEngine(onnxruntime, session, program.file, gpu, ("cpu", 0))
    rng = np.random.default_rng(0)
    given = {"image": rng.standard_normal((2, 3, 32, 32), np.float32), "seed": np.eye(5, dtype=np.float32)[:2]}
    want = create("onnxruntime").open(opened, program).run(given)
    out = {name: np.full(array.shape, np.nan, np.float32) for name, array in want.items()}

    def there(arrays: dict[str, np.ndarray]) -> dict[str, DeviceArray]:
        return {n: DeviceArray(a.ctypes.data, a.shape, a.dtype) for n, a in arrays.items()}

    engine.enqueue(there(given), there(out))
    for name, array in want.items():
        np.testing.assert_allclose(out[name], array, atol=1e-6, err_msg=name)
    given["seed"] = np.zeros((3, 5), np.float32)
    with pytest.raises(
        camrt.CamrtError, match=r"layer_maps.onnx: ONNX Runtime refused image \(2, 3, 32, 32\), seed \(3, 5\)"
    ):
        engine.enqueue(there(given), there(out))


# ---- symbols


def test_kernels_that_were_compiled_are_kept_for_the_next_process(
    noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT for RTX's runtime cache comes back, unless the driver refuses it."""
    monkeypatch.setattr(Library, "ahead_of_time", True)

    def another_process() -> CompiledKernels:
        noted.engine = TensorRtEngine(noted.backend, noted.engine._bundle, noted.engine._program)
        noted.run(1)
        return noted.compiled[-1]

    assert another_process().read is None
    CompiledKernels.accepted = False
    assert another_process().read == b"compiled kernels"
    CompiledKernels.accepted = True
    assert another_process().read == b"compiled kernels", "and were compiled again"
    assert len(noted.backend.cache.entries()) == 2
    for images in (2, 3, 2, 3, 1, 2):
        noted.run(images)
    assert sum(c.written for c in noted.compiled) == 3 + 2, "once for each new shape of a process"


def test_an_old_message_explains_no_later_failure(noted: Noted) -> None:
    noted.run(1)
    noted.backend.log.log(1, "Error Code 2: OutOfMemory (Requested size was 42 bytes.)")
    noted.trouble.add("run")
    with pytest.raises(EngineError, match="could not be run: no reason given"):
        noted.run(1)
    for i in range(1000):
        noted.backend.log.log(1, f"message {i}")
    assert len(noted.backend.log.failed) <= 20
