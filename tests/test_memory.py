"""How much memory a loaded explainer and a verification hold."""

from __future__ import annotations

import resource
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

import camrt
from camrt.export.pytorch.autograd import select
from camrt.runtime.backends import Settings, create
from camrt.runtime.errors import CamrtError
from camrt.verification.oracle import module_oracle
from camrt.verification.recorder import Recorder
from camrt.verification.verify import _OneOpen

RESIDENT = """
import sys
import numpy as np, camrt
explainer = camrt.load(sys.argv[1])
explainer.explain(np.random.default_rng(0).random((1, 3, 32, 32), dtype=np.float32))
assert "torch" not in sys.modules
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_loaded_explainer_holds_its_weights_once_where_products_have_one_row(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8192, 4096), nn.Linear(4096, 9)
    )
    path = camrt.export_model(model, tmp_path / "wide.camrt", (3, 32, 32), "conv")
    weights = (path / "weights.bin").stat().st_size
    done = subprocess.run([sys.executable, "-c", RESIDENT, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 1.5 * weights + 150e6


def test_a_verification_holds_one_program_and_its_records_in_files(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(400, 5)
    )
    path = camrt.export_model(model, tmp_path / "small.camrt", (3, 14, 14), "conv")
    bundle = camrt.load(path).bundle
    images = np.random.default_rng(0).random((2, 3, 14, 14), dtype=np.float32)
    seed = np.eye(5, dtype=np.float32)[:2]

    recorder = Recorder(bundle, module_oracle(model, "model"), images, seed)
    for stored, whole in zip(recorder.stored(images, tmp_path), recorder(images, True), strict=True):
        np.testing.assert_allclose(stored.logits, whole.logits, rtol=1e-12)
        for name in whole.activations:
            part = select(stored, [name])
            np.testing.assert_allclose(part.activations[name], whole.activations[name], rtol=1e-12, atol=1e-15)
            np.testing.assert_allclose(part.gradients[name], whole.gradients[name], rtol=1e-12, atol=1e-15)
    assert list(tmp_path.glob("*.npy"))
    (tmp_path / "another").mkdir()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CamrtError, match=r"File too large: .* let TMPDIR name a folder"):
            recorder.stored(images, tmp_path / "another")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    engine = _OneOpen(create("onnxruntime", Settings()))
    programs = [bundle.program(kind) for kind in ("classify", "activations", "classify")]
    opened = [engine.open(bundle, program) for program in programs]
    logits = [executable.run({"image": images})["logits"] for executable in opened]
    np.testing.assert_array_equal(logits[0], logits[2])
    assert len(engine._opened) == 1


def test_without_a_gpu_no_tensorrt_library_is_imported(monkeypatch):
    from camrt.runtime.backends.tensorrt import backend
    from camrt.runtime.errors import BackendUnavailable

    def no_gpu(*_: Any, **__: Any) -> Any:
        raise BackendUnavailable("no GPU")

    monkeypatch.setattr(backend, "installed", lambda: True)
    monkeypatch.setattr(backend, "find_library", lambda: pytest.fail("imported"))
    monkeypatch.setattr(backend, "open_gpu", no_gpu)
    with pytest.raises(BackendUnavailable, match="no GPU"):
        backend.create(cast(Settings, SimpleNamespace(device=0)))
