"""Some outputs of a program, and nothing that only the others need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import small_net

import camrt
from camrt.export.probes import smooth_images
from camrt.kernels import minmax
from camrt.runtime.bundle.kinds import Kind
from camrt.runtime.bundle.pruning import pruned
from camrt.runtime.bundle.reading import read_bundle
from camrt.runtime.errors import BundleError
from camrt.runtime.session.session import quarter
from camrt.verification.distances import cosine_distance

IMAGES = smooth_images((3, 32, 32), 2)
METHODS = {
    "grad_cam": [{}],
    "winsor_cam": [{}, {"gradient_aggregation": "absmean"}],
    "layer_cam": [{}],
    "grad_cam_pp": [{}],
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of four layers. Not to be changed."""
    folder = tmp_path_factory.mktemp("pruning") / "small.camrt"
    return camrt.export_model(small_net(), folder, (3, 32, 32), precision=["fp32", "fp16"])


def whole(path: Path, precision: str = "fp32") -> camrt.Explainer:
    explainer = camrt.load(path, "onnxruntime", precision=precision)
    explainer.backend.prunes = False
    return explainer


def test_a_pruned_model_is_an_onnx_model_with_less(path: Path, tmp_path: Path) -> None:
    bundle = read_bundle(path)
    program = bundle.program(Kind.GRADIENTS, [t.name for t in bundle.manifest.taps])
    data = bundle.file(program).read_bytes()
    everything = onnx.load_model_from_string(pruned(data, program.outputs))
    assert everything.SerializeToString() == onnx.load_model_from_string(data).SerializeToString()
    sizes = []
    for tap in program.taps:
        part = program.part([tap])
        assert part.taps == (tap,) and set(part.outputs) == {"logits", f"activation:{tap}", f"gradient:{tap}"}
        model = onnx.load_model_from_string(pruned(data, part.outputs))
        (tmp_path / "weights.bin").write_bytes((path / "weights.bin").read_bytes())
        onnx.save(model, tmp_path / "part.onnx")
        onnx.checker.check_model(tmp_path / "part.onnx")
        assert [o.name for o in model.graph.output] == [o for o in program.outputs if o in part.outputs]
        assert [i.name for i in model.graph.input] == ["image", "seed"]
        read = {name for node in model.graph.node for name in node.input} | set(part.outputs)
        assert all(read.intersection(node.output) for node in model.graph.node)
        assert all(tensor.name in read for tensor in model.graph.initializer)
        sizes.append(len(model.graph.node))
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] <= len(everything.graph.node)


def test_what_is_no_model_is_refused(path: Path) -> None:
    data = (path / "gradients.onnx").read_bytes()
    with pytest.raises(BundleError, match="cut off"):
        pruned(data[:-3], ["logits"])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_layers_alone_give_what_all_layers_give(method: str, precision: str, path: Path) -> None:
    layers = camrt.load(path).layers
    for options in METHODS[method]:
        for some in ([layers[-1]], [layers[1]], list(layers[1:])):
            part, all_of_it = camrt.load(path, "onnxruntime", precision=precision), whole(path, precision)
            for images in (IMAGES, IMAGES[:1]):
                target = [1, 2][: len(images)]
                got, want = (e.explain(images, method, target, some, **options) for e in (part, all_of_it))
                assert cosine_distance(minmax(got.maps), minmax(want.maps)) < 1e-6
                np.testing.assert_allclose(got.layer_weights, want.layer_weights, rtol=1e-4, atol=1e-5)
                np.testing.assert_array_equal(got.target, want.target)
            got, want = (e.explain(IMAGES[:1], method, [[0, 3, 1]], some, **options) for e in (part, all_of_it))
            assert cosine_distance(minmax(got.maps[0]), minmax(want.maps[0])) < 1e-6


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 53])
def test_there_are_few_parts_and_each_has_its_layers(count: int, path: Path) -> None:
    program = replace(read_bundle(path).program(Kind.GRADIENTS), taps=tuple(map(str, range(count))))
    starts = {quarter(program, [str(i)]) for i in range(count)}
    assert len(starts) == min(count, 4) and 0 in starts
    for i in range(count):
        assert i - max(1, (count + 3) // 4) < quarter(program, [str(i)]) <= i
    assert quarter(program, [str(count - 1), "0"]) == 0


def test_each_explainer_gives_the_same_bits(path: Path) -> None:
    """Whatever it was asked before."""
    explainer = camrt.load(path, "onnxruntime")
    for method in ("layer_cam", "grad_cam"):
        for name in (*explainer.layers, *explainer.layers):
            fresh = camrt.load(path, "onnxruntime").explain(IMAGES, method, 1, [name])
            np.testing.assert_array_equal(explainer.explain(IMAGES, method, 1, [name]).maps, fresh.maps)
    opened = [taps for file, taps, *_ in explainer.session._opened if file == "gradients.onnx"]
    assert len(opened) == (3 if explainer.backend.prunes else 1)
