"""The methods that run the network, or the part of it behind a layer, several times for one image."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from ..export.tape import Tape
from ..runtime.bundle.kinds import Kind
from ..runtime.bundle.manifest import Tap
from .maps import combined, minmax, resize, within_range
from .source import Finished, Source

WINDOW = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], np.float32) / 16  # Recipro-CAM's, where it is Gaussian


def recipro_cam(source: Source, gaussian: bool = False, variant: str = "original") -> Finished:
    """M_ij = the class's score when the layer keeps its activation only at position (i, j). All positions of all images
    run at once, in the part of the network behind the layer.
    """
    tape, maps, image = source.tape, [], source.inputs["image"]
    for index, tap in enumerate(source.chosen):
        outputs = source.outputs if index == 0 else source.run(Kind.TRUNK, {"image": image}, [tap.name])
        positions = tap.grid[0] * tap.grid[1]
        columns = tape.Unsqueeze(tape.Reshape(outputs["activation"], [-1, tap.channels, positions]), [3])
        rows = tape.Transpose(columns, perm=[0, 2, 1, 3])  # (batch, positions, K, 1)
        windows = _windows(tap, gaussian)
        if "means" in outputs:  # all that the network reads
            kept = tape.floats(windows.mean(axis=1)[None, :, None, None])
            feeds = {"means": tape.Reshape(tape.Mul(rows, kept), [-1, tap.channels])}
        else:
            kept = tape.floats(windows[None, :, None, :])
            feeds = {"activation": tape.Reshape(tape.Mul(rows, kept), [-1, tap.channels, *tap.grid])}
        for name, value in outputs.items():
            if name.startswith("context:"):
                sizes = _sizes(value)
                copies = tape.Expand(tape.Unsqueeze(value, [1]), [1, positions, *sizes])
                feeds[name] = tape.Reshape(copies, [-1, *sizes])
        logits = source.run(Kind.HEAD, feeds, [tap.name])["logits"]
        if variant == "openvino_xai":
            own = tape.Mul(
                tape.Reshape(logits, [-1, positions, source.manifest.num_classes]),
                tape.Unsqueeze(source.explained, [1]),
            )
            scores = tape.ReduceSum(own, [2], keepdims=0)
            scores = tape.Sub(scores, tape.ReduceMin(scores, [1], keepdims=1))
        else:
            scores = source.scores(tape, logits, (-1, positions))
        maps.append((tape.Reshape(scores, [-1, *tap.grid]), tap.grid))
    return combined(tape, maps, source.size), source.even()


def _sizes(value: ir.Value) -> list[int]:
    """Of a value behind its batch."""
    assert value.shape is not None
    return [int(n) for n in value.shape[1:]]  # type: ignore[arg-type]


def _windows(tap: Tap, gaussian: bool) -> np.ndarray:
    """What each position keeps of the grid around it: (positions, positions)."""
    height, width = tap.grid
    kept = np.zeros((height, width, height + 2, width + 2), np.float32)
    for y in range(height):
        for x in range(width):
            if gaussian:
                kept[y, x, y : y + 3, x : x + 3] = WINDOW
            else:
                kept[y, x, y + 1, x + 1] = 1
    return kept[:, :, 1:-1, 1:-1].reshape(height * width, height * width)


# ---- ScoreCAM++ and Score-CAM

Gate = Callable[[Tape, ir.Value, ir.Value], ir.Value]  # tape, resized maps, the maps before it -> masks
GATES: Mapping[str, Gate] = {
    "tanh": lambda tape, resized, maps: tape.Tanh(resized),
    "sigmoid_relu": lambda tape, resized, maps: tape.Sigmoid(tape.Mul(tape.Relu(resized), tape.floats(0.5))),
    "identity": lambda tape, resized, maps: resized,
    "minmax": lambda tape, resized, maps: minmax(tape, within_range(tape, resized, maps)),
}


def score_cam_pp(source: Source, variant: str = "tanh") -> Finished:
    """minmax(ReLU(sum_k s_k H_k)), H_k = tanh(up(A_k)), s_k the class's probability for the masked input x H_k."""
    kind = "sigmoid_relu" if variant == "sigmoid_relu" else "tanh"
    return _scored(source, kind, "identity" if variant == "tanh_mask_only" else kind)


def score_cam(source: Source, variant: str = "original") -> Finished:
    """minmax(ReLU(sum_k s_k up(A_k))), s_k the class's probability for the input masked by minmax(up(A_k))."""
    del variant
    return _scored(source, "minmax", "identity")


def _scored(source: Source, kind: str, summed: str) -> Finished:
    """kind: the gate of the masks; summed: of what the scores weigh."""
    tape, maps = source.tape, []
    for tap in source.chosen:
        total = _weighted_sum(source, source.outputs[f"activation:{tap.name}"], tap, GATES[kind], GATES[summed])
        maps.append(minmax(tape, tape.Relu(total)))
    if len(maps) == 1:
        return maps[0], source.even()
    fused = maps[0]
    for other in maps[1:]:
        fused = tape.Add(fused, other)
    return minmax(tape, tape.Mul(fused, tape.floats(1 / len(maps)))), source.even()


def _weighted_sum(source: Source, activation: ir.Value, tap: Tap, kind: Gate, summed: Gate) -> ir.Value:
    """sum_k s_k summed(up(A_k)), (batch, H, W): a loop over the channels, `source.masks` in each run of the network."""
    tape, (height, width), masks = source.tape, source.size, min(source.masks, tap.channels)
    runs = -(-tap.channels // masks)
    scored = source.inputs["image"]
    if source.manifest.normalized is not None:
        scored = source.run(Kind.NORMALIZE, {"image": scored})["normalized"]
    channels = tape.Transpose(activation, perm=[1, 0, 2, 3])
    missing = runs * masks - tap.channels
    if missing:  # the last run is filled up; these masks count for nothing
        channels = tape.Pad(channels, [0, 0, 0, 0, missing, 0, 0, 0])
    parts = tape.Reshape(channels, [runs, masks, -1, *tap.grid])
    counted = np.zeros((runs, masks, 1), np.float32)
    counted.reshape(-1)[: tap.channels] = 1

    def part(inside: Tape, number: ir.Value) -> ir.Value:
        """The sum over the masks of one run, (batch, H, W). inside: the tape of the loop's body."""
        maps = inside.Gather(parts, number, axis=0)  # (masks, batch, h, w)
        resized = resize(inside, maps, [tap.grid, source.size])
        masked = inside.Mul(inside.Unsqueeze(kind(inside, resized, maps), [2]), inside.Unsqueeze(scored, [0]))
        images = inside.Reshape(masked, [-1, *source.manifest.scored_shape])
        of_score = source.manifest.normalized is not None
        feeds = {"normalized" if of_score else "image": images}
        logits = source.run(Kind.SCORE if of_score else Kind.CLASSIFY, feeds, into=inside.graph)["logits"]
        scores = source.scores(inside, logits, (masks, -1))
        alive = inside.Gather(inside.constant(counted), number, axis=0)
        if kind is GATES["minmax"]:  # a constant channel has no mask
            span = inside.Sub(inside.ReduceMax(maps, [2, 3], keepdims=0), inside.ReduceMin(maps, [2, 3], keepdims=0))
            alive = inside.Mul(alive, inside.Cast(inside.Greater(span, inside.floats(0)), to=ir.DataType.FLOAT))
        weighted = inside.Mul(inside.Unsqueeze(inside.Mul(scores, alive), [2, 3]), summed(inside, resized, maps))
        return inside.ReduceSum(weighted, [0], keepdims=0)

    nothing = source.full(0, height, width)
    if runs == 1:
        return part(tape, tape.constant(np.array(0)))
    number, go_on, total = (
        ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
        for name, shape, dtype in (
            ("number", ir.Shape([]), ir.DataType.INT64),
            ("go_on", ir.Shape([]), ir.DataType.BOOL),
            ("total", None, ir.DataType.FLOAT),
        )
    )
    body = ir.Graph([number, go_on, total], [], nodes=[], name="masks")
    inside = Tape(body, outer=tape)
    summed_up = inside.Add(total, part(inside, number))
    body.outputs.extend([inside.Identity(go_on), summed_up])
    for value, dtype in zip(body.outputs, (ir.DataType.BOOL, ir.DataType.FLOAT), strict=True):
        value.type = ir.TensorType(dtype)
    for i, value in enumerate(y for node in body for y in node.outputs):  # names are unique over all graphs of a model
        value.name = f"masks:{tap.name}:{i}"
    return tape.Loop(tape.constant(np.array(runs)), tape.constant(np.array(True)), nothing, body=body)
