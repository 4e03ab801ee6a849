"""`camrt tune`: what is measured, kept, and taken by later loads."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from support import Mixing, small_net

import camrt
from camrt.cli import main
from camrt.export.probes import smooth_images
from camrt.runtime import tuning
from camrt.runtime.user_cache import cache_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMRT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return camrt.export_model(small_net(), tmp_path_factory.mktemp("tuning") / "small.camrt", (3, 32, 32))


def test_what_was_quickest_is_kept_for_the_same_settings(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = camrt.load(path, "onnxruntime", threads=1)
    assert explainer.session.mask_batch == 16
    monkeypatch.setattr(tuning, "SIZES", (4, 2))  # so that neither is the default
    found = camrt.tune(explainer)
    assert set(found) == {4, 2} and all(0 < ms < 100 for ms in found.values())
    best = min(found, key=lambda size: found[size])
    assert explainer.session.mask_batch == 16
    again = camrt.load(path, "onnxruntime", threads=1)
    assert again.session.mask_batch == best
    assert camrt.load(path, "onnxruntime", threads=1, mask_batch=7).session.mask_batch == 7
    assert camrt.load(path, "onnxruntime", threads=2).session.mask_batch == 16
    images = smooth_images((3, 32, 32), 2)
    want, got = (e.explain(images, "score_cam_pp", 1).maps for e in (explainer, again))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_command(path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["tune", str(path), "--backend", "onnxruntime", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(tuning.SIZES) and sum(line.endswith("ms each  kept") for line in lines) == 1
    (kept,) = json.loads((cache_folder() / "tuned.json").read_text()).values()
    assert camrt.load(path, "onnxruntime", threads=1).session.mask_batch == kept
    assert camrt.load(path, "onnxruntime", threads=2).session.mask_batch == 16


@pytest.mark.parametrize("text", ["", "[]", "no json", '{"x": 4}', "\x00"])
def test_a_damaged_file_counts_as_none(text: str, path: Path) -> None:
    cache_folder().mkdir(parents=True)
    (cache_folder() / "tuned.json").write_text(text)
    explainer = camrt.load(path, "onnxruntime", threads=1)
    assert explainer.session.mask_batch == 16
    camrt.tune(explainer)
    assert camrt.load(path, "onnxruntime", threads=1).session.mask_batch in tuning.SIZES


@pytest.mark.parametrize("kept", [0, -1, 3, 10**9, "8", None, True])
def test_what_tune_did_not_write_is_not_taken(kept: object, path: Path) -> None:
    explainer = camrt.load(path, "onnxruntime", threads=1)
    camrt.tune(explainer)
    file = cache_folder() / "tuned.json"
    (key,) = json.loads(file.read_text())
    file.write_text(json.dumps({key: kept}))
    assert camrt.load(path, "onnxruntime", threads=1).session.mask_batch == 16


def test_where_nothing_can_be_kept(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAMRT_CACHE", str(tmp_path / "file" / "cache"))
    explainer = camrt.load(path, "onnxruntime", threads=1)
    with pytest.raises(camrt.CamrtError, match=r"tuned.json: cannot be written"):
        camrt.tune(explainer)
    monkeypatch.delenv("CAMRT_CACHE")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home")))  # a user without one
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert camrt.load(path, "onnxruntime", threads=1).session.mask_batch == 16


def test_a_network_of_one_image_has_nothing_to_tune(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="batch 1"):
        camrt.export_model(Mixing(), tmp_path / "one.camrt", (3, 32, 32))
    with pytest.raises(camrt.CamrtError, match="there is nothing to tune"):
        camrt.tune(camrt.load(tmp_path / "one.camrt"))
