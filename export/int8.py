"""Int8 programs that score masked images: ONNX Runtime's static quantisation, calibrated on pictures.

Activations and weights are symmetric int8, weights per channel, biases float32: what TensorRT takes.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxscript import optimizer

from ..runtime.backends.one_file import open_file
from ..runtime.errors import ExportError, first_line
from .check import relative_l2
from .graph import TappedGraph, fold_batch_norm, tidy
from .head import normalize
from .precision import takes_half
from .probes import smooth_images
from .programs import masked

GATES = 2  # masked copies of each calibration image
MEASURED = 16  # calibration images that the error is measured on, under other gates
_QUANTISED = ["Conv", "MatMul", "Gemm"]
_WARNINGS, _ERRORS = 2, 3  # ONNX Runtime's log levels; the first is its default
_ANY = 1 << 40  # elements
FEW_IMAGES = 10  # fewer calibration images are warned of
LEAST_SAME = 0.8  # part of masked images whose top class stays; a warning says if it is less
LARGE_ERROR = 0.1  # relative L2 of the logits; a warning says so


@dataclass(frozen=True)
class Int8Program:
    """error: the relative L2 distance of the logits of masked calibration images from float32's; same: the part of them
    whose top class stays.
    """

    model: ir.Model
    error: float
    same: float


def int8_program(graph: TappedGraph, images: np.ndarray) -> Int8Program:
    """The int8 form of the program `masked`. images (N, C, H, W) float32: network inputs that it is calibrated with.

    ExportError if the network is quantised already, or ONNX Runtime cannot quantise it.
    """
    if any(node.op_type == "QuantizeLinear" for node in graph.model.graph):
        raise ExportError("precision int8: the network is quantised already: export it without int8")
    whole = replace(graph, taps=(), precision="float32")
    if graph.normalized is not None:
        images = _outputs(normalize(whole), "image", images, "normalized")
    exact = takes_half(masked(whole))
    model = to_int8(exact, under_gates(images, seed=1))
    inputs = under_gates(images[:MEASURED], seed=2)
    want, got = (_outputs(m, "masked", inputs, "logits").astype(np.float64) for m in (exact, model))
    same = float((want.argmax(axis=1) == got.argmax(axis=1)).mean())
    return Int8Program(model, relative_l2(got, want), same)


def under_gates(images: np.ndarray, seed: int) -> np.ndarray:
    """Images (N, C, H, W) as they are, and under random smooth gates between 0 and 1: (3 N, C, H, W) float16."""
    gates = np.clip(smooth_images((1, *images.shape[2:]), len(images) * GATES, seed), 0, 1)
    return np.concatenate([images, np.repeat(images, GATES, axis=0) * gates]).astype(np.float16)


def to_int8(model: ir.Model, inputs: np.ndarray) -> ir.Model:
    """The int8 form of a program `masked` whose convolutions and products are float32.

    inputs (N, C, H, W) float16: what it is calibrated with. ExportError where ONNX Runtime cannot quantise it.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._inputs: Iterator[np.ndarray] = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
            image = next(self._inputs, None)
            return None if image is None else {"masked": image[None]}

    with tempfile.TemporaryDirectory(prefix="camrt-") as folder:
        whole, quantised = Path(folder) / "masked.onnx", Path(folder) / "int8.onnx"
        folded = model.clone()
        fold_batch_norm(folded)
        optimizer.fold_constants(folded, input_size_limit=_ANY, output_size_limit=_ANY)  # weights must be constants
        _rename(tidy(folded).graph)
        _save_alone(folded, whole)
        try:
            with _quiet():
                quantize_static(
                    whole,
                    quantised,
                    Reader(),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=_QUANTISED,
                    per_channel=True,
                    activation_type=QuantType.QInt8,
                    weight_type=QuantType.QInt8,
                    extra_options={
                        "ActivationSymmetric": True,
                        "WeightSymmetric": True,
                        "QuantizeBias": False,
                        # only inputs are rounded, behind the rectifiers, whose range is a small part of a sum's
                        "OpTypesToExcludeOutputQuantization": _QUANTISED,
                    },
                )
        except Exception as error:
            raise ExportError(f"masked.int8: ONNX Runtime cannot quantise it: {first_line(error)[:300]}") from error
        result = ir.load(quantised)
        for value in result.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    return result


def _rename(graph: ir.Graph) -> None:
    """The quantiser calls its constants NAME_scale: no tensor may be called so before. Unused constants go."""
    kept = {*graph.inputs, *graph.outputs}
    for i, (name, value) in enumerate(list(graph.initializers.items())):
        del graph.initializers[name]
        if not value.uses():
            continue
        value.name = f"constant{i}"
        graph.register_initializer(value)
    for i, node in enumerate(graph):
        for k, y in enumerate(node.outputs):
            if y not in kept:
                y.name = f"value{i}_{k}"


def _outputs(model: ir.Model, entry: str, inputs: np.ndarray, name: str) -> np.ndarray:
    """One output of a program for each input, image after image."""
    with tempfile.TemporaryDirectory(prefix="camrt-") as folder:
        path = Path(folder) / "program.onnx"
        _save_alone(model, path)
        run = open_file(path)
        return np.concatenate([run({entry: image[None]})[name] for image in inputs])


def _save_alone(model: ir.Model, path: Path) -> None:
    """With its weights inside, or beside it if they are large."""
    ir.save(model, path, external_data=f"{path.stem}.bin", size_threshold_bytes=1024)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of ONNX Runtime and its quantiser, which advise what was done, or is of no use here."""
    import onnxruntime

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(_ERRORS)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNINGS)
        logging.disable(before)
