"""What happens when the driver fails. test_standin.py runs these tests on the stand-in, which fails on demand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from standin import Control, StandinBackend
from support import small_net

import camrt
from camrt import kernels
from camrt.export.probes import smooth_images
from camrt.kernels.gpu.device import device
from camrt.runtime.bundle.reading import read_bundle
from camrt.verification.distances import largest_difference

IMAGES = smooth_images((3, 32, 32), 4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return camrt.export_model(small_net(), tmp_path_factory.mktemp("gpu") / "small.camrt", (3, 32, 32))


def loaded(small: Path) -> camrt.Explainer:
    device().give_back()
    return camrt.Explainer(read_bundle(small), StandinBackend(), 4, "fp32")


@pytest.mark.parametrize("method", ["winsor_cam", "score_cam_pp", "recipro_cam"])
def test_memory_that_runs_out_at_any_allocation(small: Path, control: Control, method: str) -> None:
    """The n-th allocation fails: the call succeeds, with less at once, and so do the next ones."""
    want = camrt.load(small, "onnxruntime", threads=1).explain(IMAGES, method).maps
    before = control.calls("cuMemAlloc_v2")
    loaded(small).explain(IMAGES, method)
    allocations = control.calls("cuMemAlloc_v2") - before
    assert allocations > 3
    for nth in np.unique(np.geomspace(1, allocations, 8).astype(int)).tolist():
        there = loaded(small)
        control.fail("cuMemAlloc_v2", nth)
        for _ in range(3):
            maps = there.explain(IMAGES, method).maps
            assert largest_difference(kernels.minmax(maps), kernels.minmax(want)) <= 1e-3, nth


def test_memory_that_stays_full_is_an_error_of_one_line(small: Path, control: Control) -> None:
    there = loaded(small)
    there.explain(IMAGES)
    control.memory(control.allocated())
    try:
        with pytest.raises(camrt.CamrtError, match=r"out of memory on GPU 0 .*: use a smaller batch") as caught:
            there.explain(np.concatenate([IMAGES] * 200))
    finally:
        control.memory()
    assert "\n" not in str(caught.value)
    there.explain(IMAGES)


@pytest.mark.parametrize(
    "function", ["cuLaunchKernel", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuGraphLaunch"]
)
def test_a_driver_that_fails_is_an_error_of_one_line(small: Path, control: Control, function: str) -> None:
    there = loaded(small)
    for _ in range(3):
        there.explain(IMAGES[:1])
    control.fail(function, code=1)  # an invalid value: the context lives on
    with pytest.raises(camrt.CamrtError) as caught:
        for _ in range(2):
            there.explain(IMAGES[:1])
            there.explain(IMAGES[:3])
    assert "\n" not in str(caught.value)
    control.recover()
    there.explain(IMAGES[:1])


def test_a_capture_that_fails_costs_speed_alone(small: Path, control: Control) -> None:
    there = loaded(small)
    want = there.explain(IMAGES[:1]).maps
    control.fail("cuGraphInstantiateWithFlags", code=801)
    with pytest.warns(UserWarning, match="cannot be replayed as a CUDA graph"):
        there.explain(IMAGES[:1])
    np.testing.assert_array_equal(there.explain(IMAGES[:1]).maps, want)


def test_memory_comes_back(small: Path, control: Control) -> None:
    device().give_back()
    before = control.allocated()
    there = loaded(small)
    for method in ("winsor_cam", "score_cam_pp"):
        for _ in range(3):
            there.explain(IMAGES, method)
    assert control.allocated() > before
    del there
    device().give_back()
    assert control.allocated() == before
