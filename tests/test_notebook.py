"""What notebooks show: the example, executed by a kernel, and the slider."""

from __future__ import annotations

import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image
from support import ROOT

import camrt
from camrt.demo.run import BUNDLE
from camrt.demo.scenes import draw_scene
from camrt.notebook import percentile_slider


@pytest.fixture(scope="module")
def result() -> camrt.Explanation:
    return camrt.load(BUNDLE).explain([draw_scene(1_000_000 + i, label=i)[0] for i in range(2)])


def test_the_example_runs_and_shows_what_it_says(tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "examples" / "winsor_cam.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in cells)
    page = cells[0].outputs[-1]["data"]["text/html"]
    assert page.count("<img ") == 6 and "winsor_cam" in page
    assert "application/vnd.jupyter.widget-view+json" in cells[2].outputs[-1]["data"]
    assert all("image/png" in cell.outputs[-1]["data"] for cell in cells[3:5])
    assert camrt.__version__ in cells[5].outputs[-1]["data"]["text/plain"]


def test_the_slider_retunes(result: camrt.Explanation) -> None:
    slider, picture = percentile_slider(result, 1, size="input").children
    assert slider.value == 90 and picture.value == result.png(1, size="input")
    slider.value = 10
    want = result.retune(percentile=10).overlay(1, size="input")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(picture.value))), want)
    assert (want != result.overlay(1, size="input")).any()


def test_a_slider_needs_a_percentile_and_ipywidgets(result: camrt.Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(camrt.CamrtError, match="grad_cam has no percentile: explain with winsor_cam"):
        percentile_slider(camrt.load(BUNDLE).explain(draw_scene(1, label=0)[0], "grad_cam"))
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    with pytest.raises(camrt.CamrtError, match=r"a slider needs ipywidgets: pip install .*\[notebook\]"):
        percentile_slider(result)
