"""camrt bench: what it says adds up, and it stops where it is told to."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import camrt
from camrt import bench
from camrt.cli import main
from camrt.method_choice import MethodChoice
from camrt.runtime.backends import create
from camrt.runtime.bundle.manifest import Program
from camrt.runtime.bundle.reading import Bundle, read_bundle
from camrt.runtime.explainer import Explainer
from camrt.runtime.session.timing import Stages, covered

METHODS = [MethodChoice("winsor_cam", "winsor_cam"), MethodChoice("score_cam_pp", "score_cam_pp")]


def test_the_command(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    methods = ["winsor_cam:percentile=50", "recipro_cam"]
    command = ["bench", str(bundle), "--methods", *methods, "--batches", "2", "1", "--runs", "4"]
    assert main([*command, "--out", str(out), "--plot", str(plot)]) == 0
    report = json.loads(out.read_text())
    assert not report["interrupted"] and report["memory"]["peak_mb"] > 50
    assert report["machine"]["model"] == "small" and "onnxruntime" in report["machine"]["packages"]
    rows = {(r["what"], r["batch"]): r for r in report["rows"]}
    assert list(rows) == [(name, b) for b in (1, 2) for name in (bench.FORWARD, *methods)]
    for (name, batch), row in rows.items():
        assert row["calls"] == 4 and row["images_per_s"] == pytest.approx(batch / row["p50_ms"] * 1e3)
        assert 0 < row["quartiles_ms"][0] <= row["p50_ms"] <= row["quartiles_ms"][1] <= row["p99_ms"]
        assert ("forward_passes" in row) == (name != bench.FORWARD)
        assert ("stages_ms" in row) == (name != bench.FORWARD and batch == 1)
    for name in methods:
        stages = rows[name, 1]["stages_ms"]
        assert set(stages) == {"preprocess", "network", "method", "rest"}
        assert rows[name, 1]["bytes_to_png_ms"] > stages["network"] and "bytes_to_png_ms" not in rows[name, 2]
    assert report["photo"] == "JPEG of 640 x 480"
    printed = capsys.readouterr().out
    assert printed.startswith("small, fp32, onnxruntime") and "| winsor_cam:percentile=50 |" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


class Slow:
    """A backend whose every run takes a while, and whose outputs are off by a factor."""

    gpu, prunes = None, False

    def __init__(self, seconds: float = 0.0, factor: float = 1.0, name: str = "slow") -> None:
        self._backend = create("onnxruntime")
        self.seconds, self.factor, self.name, self.lanes, self.runs = seconds, factor, name, 1, 0

    def open(self, bundle: Bundle, program: Program, concurrent: bool = False) -> Any:
        executable, slow = self._backend.open(bundle, program, concurrent), self

        class SlowExecutable:
            def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
                time.sleep(slow.seconds)
                slow.runs += 1
                out = executable.run(feeds)
                return {k: v if k == "logits" else v + (1 - slow.factor) * v.max() for k, v in out.items()}

        return SlowExecutable()


def test_stages_are_where_the_time_goes(exported: Path) -> None:
    """The network sleeps: that time is its own, in methods that it runs before and in those that run it."""
    slow = Slow(0.05)
    explainer = Explainer(read_bundle(exported), slow)
    for method in METHODS:
        before = slow.runs
        (found, *_) = bench.stages(explainer, method, bench.example(explainer), 1)
        runs = (slow.runs - before) // (bench.WARM_UP + 1)
        assert runs >= (1 if method.name == "winsor_cam" else 2)
        assert 0.05 * runs <= found["network"] < 0.05 * runs + 0.2
        assert found["preprocess"] > 0 and found["method"] > 0 and found["rest"] > 0
    explainer.explain(bench.example(explainer))  # outside nothing is noted
    with explainer.timed() as stages:
        assert stages.seconds(1.0) == {"preprocess": 0, "network": 0, "method": 0, "rest": 1.0}


def test_what_overlaps_counts_once() -> None:
    assert covered([]) == 0
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.6)]) == 4
    stages = Stages()
    stages.intervals.update(preprocess=[(0, 1)], method=[(1, 8)], network=[(2, 4), (3, 5), (7, 7.5)])
    assert stages.seconds(10.0) == {"preprocess": 1, "network": 3.5, "method": 3.5, "rest": 2}


def test_interrupted_it_prints_what_it_has(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = bench.run, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(bench, "run", interrupted)
    out = tmp_path / "bench.json"
    assert main(["bench", str(bundle), "--batches", "1", "--runs", "500", "--out", str(out)]) == 130
    report = json.loads(out.read_text())
    assert report["interrupted"] and {r["what"] for r in report["rows"]} == {bench.FORWARD, "winsor_cam"}
    assert all(3 < r["calls"] < 60 for r in report["rows"])
    captured = capsys.readouterr()
    assert "| winsor_cam |" in captured.out and captured.err.endswith("camrt: interrupted\n")


def test_wrong_maps_are_not_timed(exported: Path) -> None:
    contenders = [MethodChoice("winsor_cam", "winsor_cam")]
    good = Explainer(read_bundle(exported), Slow())
    assert bench.check(good, contenders, bench.example(good)).startswith("maps at most 0.0e+00 from")
    wrong = Explainer(read_bundle(exported), Slow(factor=0.5))
    with pytest.raises(camrt.CamrtError, match="winsor_cam: not timed, because its map is wrong"):
        list(bench.measure(wrong, contenders, [bench.example(wrong)], [1], 1, bench.Measurements()))
    reference = Explainer(read_bundle(exported), create("onnxruntime"))
    assert "camrt verify" in bench.check(reference, contenders, bench.example(reference))


def test_time_is_limited(exported: Path) -> None:
    explainer = Explainer(read_bundle(exported), Slow(0.02))
    measured = bench.Measurements()
    for _ in bench.measure(explainer, METHODS[:1], [bench.example(explainer)], [1], 1000, measured, seconds=0.5):
        pass
    assert 3 <= len(measured.times["winsor_cam", 1]) < 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batches", "0"], "--batches and --runs must be 1 or more"),
        (["--runs", "0"], "--batches and --runs must be 1 or more"),
        (["--methods", "grad_cm"], "no method 'grad_cm'"),
        (["--plot", "plot.txt"], "--plot plot.txt: name it .png, .svg or .pdf"),
        (["--out", "missing/bench.json"], "missing/bench.json: no such folder"),
        (["nothing.png"], "nothing.png: no such file"),
    ],
)
def test_what_makes_no_sense_is_refused(
    bundle: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(bundle), *arguments]) == 2
    assert said in capsys.readouterr().err
