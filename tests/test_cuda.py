"""The CUDA kernels: the table against the specification, and what only the emulation can show."""

from __future__ import annotations

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulator import ORDERS, SOURCES, EmulatedGpu, Ledger, compile_server, kernels_of
from kernel_table import TABLE, Row, everything, filled, path, winsorized_and_fused

from camrt import kernels
from camrt.kernels.gpu import queue as launching
from camrt.kernels.operations import winsorize as winsorize_module

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: the emulated kernels are not tested")


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_kernel_is_its_specification(queue: Any, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(queue, EmulatedGpu) and row.name == "winsorize-2^24+3":
        monkeypatch.setattr(
            winsorize_module, "ENTRIES_PER_BLOCK", 2**18
        )  # fewer threads, which take their turns slowly
    row.check(queue)


@pytest.mark.parametrize("kernel", ["short", "long"])
def test_winsorize_spoils_a_row_with_nan_and_says_so(queue: Any, kernel: str) -> None:
    rows = filled("random", (3, 50))
    rows[1, 17] = np.nan
    with path(kernel):
        result = kernels.winsorize(queue.upload(rows), 90, stream=queue)
    with pytest.raises(ValueError, match="winsorize: a row holds NaN"):
        queue.synchronize()
    got = queue.download(result)
    assert np.isnan(got[1]).all()
    np.testing.assert_allclose(got[[0, 2]], kernels.winsorize(rows[[0, 2]], 90), atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 1500, 2999])
def test_what_is_not_finite_is_found(queue: Any, bad: float, at: int) -> None:
    values = filled("huge", (3000,))
    kernels.check_finite(queue.upload(values), stream=queue)
    queue.synchronize()
    values[at] = bad
    kernels.check_finite(queue.upload(values), stream=queue)
    with pytest.raises(ValueError, match=r"^NaN or infinity$"):
        queue.synchronize()
    queue.synchronize()


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "width", "skew", "kernel"),
    [
        (np.float32, 32, 0, "mask_batch_f32_wide"),
        (np.float32, 33, 0, "mask_batch_f32"),
        (np.float32, 32, 4, "mask_batch_f32"),
        (np.float16, 32, 0, "mask_batch_f16_wide"),
        (np.float16, 36, 0, "mask_batch_f16_wide"),
        (np.float16, 34, 0, "mask_batch_f16"),
        (np.float16, 32, 2, "mask_batch_f16"),
    ],
)
def test_wide_stores_where_alignment_allows(
    emulated: EmulatedGpu, dtype: Any, width: int, skew: int, kernel: str
) -> None:
    """The undefined-behaviour sanitizer stops a wide access that is not aligned."""
    image, activations = filled("random", (3, 5, width)), filled("random", (2, 3, 4))
    out = emulated.empty((2, 3, 5, width), dtype, skew)
    kernels.mask_batch(emulated.upload(image), emulated.upload(activations), out=out, stream=emulated)
    assert emulated.launched[-1].kernel == kernel
    want = kernels.mask_batch(image, activations)
    np.testing.assert_allclose(emulated.download(out), want, rtol=1e-3, atol=1e-3)
    skewed = emulated.upload(image, skew=4)
    kernels.mask_batch(skewed, emulated.upload(activations), out=out, stream=emulated)
    assert not emulated.launched[-1].kernel.endswith("wide")
    np.testing.assert_allclose(emulated.download(out), want, rtol=1e-3, atol=1e-3)


@needs_compiler
def test_the_order_of_threads_and_blocks_changes_nothing(emulated: EmulatedGpu) -> None:
    """A barrier too few would: each order lets other threads run ahead."""
    found = []
    for order in ORDERS:
        emulated.order = order
        found.append(everything(emulated))
    emulated.order = 0
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@needs_compiler
def test_kernels_stride_over_what_a_grid_does_not_cover(emulated: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    want = everything(emulated)
    emulated.launched.clear()
    monkeypatch.setattr(launching, "MAX_GRID", (2, 2))
    got = everything(emulated)
    assert {launch.grid for launch in emulated.launched} <= {(1, 1), (1, 2), (2, 1), (2, 2)}
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("side", [1, 30_001, 46_340])
@pytest.mark.parametrize("count", [1, 2**20 + 1, 2**31 - 1])
def test_no_grid_overflows(side: int, count: int) -> None:
    queue = Ledger()
    image, activations = queue.empty((3, side, side)), queue.empty((count, side, side))
    kernels.mask_batch(image, activations, "minmax", stream=queue)
    kernels.accumulate_maps(image, queue.empty((3, count)), activations, "minmax", stream=queue)
    for shape in ((count, 53), (count, 2**31 - 1)):
        kernels.winsorize(queue.empty(shape), 50, stream=queue)
    grids = [(side, side)]
    kernels.fuse_layers(
        queue.empty((count, side * side)), grids, queue.empty((count, 1)), (side, side), normalize=True, stream=queue
    )
    kernels.layer_importance(queue.empty((count, side)), [side], stream=queue)
    kernels.class_scores(queue.empty((count, side)), queue.empty((3, side)), stream=queue)
    kernels.channel_extremes(activations, stream=queue)
    rows = queue.empty((count, side, 1))
    kernels.take_channels(rows, queue.empty((count,), np.int32), stream=queue)
    kernels.check_finite(rows, stream=queue)
    picture = queue.empty((side, 50_000, 3), np.uint8)
    kernels.resize_picture(picture, (9, 50_000), (0, 0, 9, 50_000), [0.5] * 3, [0.5] * 3, stream=queue)
    assert {launch.module for launch in queue.launched} == {s.stem for s in SOURCES.glob("*.cu")}
    for launch in queue.launched:
        x, y = launch.grid
        assert 1 <= x < 2**31 and 1 <= y < 2**16 and launch.threads in (256, 1024), launch
        assert launch.shared + winsorize_module.STATIC_SHARED <= queue.shared_limit


def test_the_order_of_sums_depends_on_shapes_alone() -> None:
    """Wherever the total lies; and partial sums do not grow with the number of scores."""
    queue = Ledger()
    activations = queue.empty((192, 7, 7))
    for rows, chunks in ((1, 18), (1000, 1)):
        total = queue.empty((rows, 224, 224))
        found = set()
        for skew in (0, 4):
            queue.launched.clear()
            skewed = dataclasses.replace(total, pointer=total.pointer + skew)
            kernels.accumulate_maps(skewed, queue.empty((rows, 192)), activations, stream=queue)
            found.add(tuple(int(str(a)) for a in queue.launched[0].arguments[-2:]))  # maps per chunk, chunks
        assert found == {(-(-192 // chunks), chunks)}


@needs_compiler
def test_every_kernel_is_launched_somewhere(emulated: EmulatedGpu) -> None:
    emulated.launched.clear()
    for width in (32, 33):
        image = emulated.upload(filled("random", (1, 2, width)))
        activations = emulated.upload(filled("ties", (2, 3, 3)))
        for dtype in (np.float32, np.float16):
            out = emulated.empty((2, 1, 2, width), dtype)
            kernels.mask_batch(image, activations, "minmax", out=out, stream=emulated)
        kernels.accumulate_maps(image, emulated.upload(filled("ties", (1, 2))), activations, stream=emulated)
        kernels.winsorize(image, 50, stream=emulated)
        with path("long"):
            kernels.winsorize(image, 50, stream=emulated)
    everything(emulated)
    missing = {k for s in SOURCES.glob("*.cu") for k in kernels_of(s)} - {launch.kernel for launch in emulated.launched}
    assert not missing, f"{missing}: call it in everything() in tests/kernel_table.py, and in test_no_grid_overflows"


ELSEWHERE = {"extremes", "check_finite"}  # in mask_batch's rows; in tests of their own


def test_every_source_has_rows() -> None:
    sources = {s.stem for s in SOURCES.glob("*.cu")} - ELSEWHERE
    missing = {s for s in sources if not any(row.name.startswith(f"{s}-") for row in TABLE)}
    assert not missing, f"{missing}: add rows, named after the .cu file, to TABLE in tests/kernel_table.py"


OVERRUN, WRONG, STUCK = "heap-buffer-overflow", "Arrays are not equal", "threads wait at different barriers"
DEFECTS = {
    "a write past the end": (
        OVERRUN,
        "winsorize.cu",
        "for (int i = threadIdx.x; i < length; i += blockDim.x) to[i] = winsorized(",
        "for (int i = threadIdx.x; i <= length; i += blockDim.x) to[i] = winsorized(",
    ),
    "a read past the end": (
        OVERRUN,
        "common.cuh",
        "for (int i = lane; i < sources.count; i += WARP) {",
        "for (int i = threadIdx.x % WARP; i <= sources.count; i += WARP) {",
    ),
    "a missing barrier": (
        f"{WRONG}|{STUCK}",
        "common.cuh",
        "    if (lane == 0) shared[warp] = value;\n    __syncthreads();",
        "    if (lane == 0) shared[warp] = value;",
    ),
    "a missing barrier before shared memory is used again": (
        f"{WRONG}|{OVERRUN}",
        "fuse_layers.cu",
        "        __syncthreads();  // before the next tile overwrites the shared memory\n",
        "",
    ),
    "counts of one digit left for the next": (
        WRONG,
        "winsorize.cu",
        "                state.histogram[i] = 0;  // for the next digit\n",
        "",
    ),
    "a missing barrier before the last block is known": (
        f"{WRONG}|{STUCK}",
        "winsorize.cu",
        "        if (threadIdx.x == 0) last[0] = atomicAdd(&state.finished, 1u) == gridDim.x - 1;\n        "
        "__syncthreads();\n",
        "        if (threadIdx.x == 0) last[0] = atomicAdd(&state.finished, 1u) == gridDim.x - 1;\n",
    ),
    "a missing barrier of a warp": (
        WRONG,
        "common.cuh",
        "        __syncwarp();\n#pragma unroll",
        "#pragma unroll",
    ),
    "a barrier that not all threads reach": (
        STUCK,
        "fuse_layers.cu",
        "        __syncthreads();  // before the next tile overwrites the shared memory\n",
        "        if (threadIdx.x % 2) __syncthreads();\n",
    ),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A server for each defect."""

    def compile_with(defect: str) -> Path:
        _, file, right, wrong = DEFECTS[defect]
        folder = tmp_path_factory.mktemp("broken")
        sources = Path(shutil.copytree(SOURCES, folder / "cuda", ignore=shutil.ignore_patterns("*.fatbin")))
        text = (sources / file).read_text()
        assert text.count(right) == 1
        (sources / file).write_text(text.replace(right, wrong))
        for other in sources.glob("*.cu") if file.endswith(".cu") else ():  # which takes less long to compile
            if other.name not in ("winsorize.cu", "fuse_layers.cu", "extremes.cu"):
                other.unlink()
        return compile_server(folder, sources, "-O0")

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(DEFECTS, pool.map(compile_with, DEFECTS), strict=True))


@needs_compiler
@pytest.mark.parametrize("defect", DEFECTS)
def test_the_emulation_catches(
    defect: str, broken: dict[str, Path], emulated: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = EmulatedGpu(broken[defect])
    monkeypatch.setattr(launching, "MAX_GRID", (2, 2))  # so that blocks use their shared memory again
    run = winsorized_and_fused if DEFECTS[defect][1].endswith(".cu") else everything
    want = run(emulated)
    with pytest.raises(AssertionError, match=DEFECTS[defect][0]):
        for order in ORDERS:
            gpu.order = order
            for got, right_result in zip(run(gpu), want, strict=True):
                np.testing.assert_array_equal(got, right_result)
    gpu.close()
