"""One function per kernel: NumPy's arrays in and out by the specification, a GPU's arrays in and out by CUDA.

A GPU's array is anything that speaks __cuda_array_interface__ or DLPack (PyTorch, CuPy, camrt.kernels.device). The work is
queued and not waited for; results are `DeviceArray`s. `stream` is a `Stream`, or the handle of another library's
(`torch.cuda.current_stream().cuda_stream`); without one it is the legacy default stream, PyTorch's default. All arrays lie
on the stream's GPU. What another library's stream still reads must be held until that is done, as with any two streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from . import launches, reference
from .arrays import DeviceArray, device_array, is_device_array
from .launches import Queue
from .shapes import (
    check_accumulate_maps,
    check_activations,
    check_class_scores,
    check_fuse_layers,
    check_layer_importance,
    check_mask_batch,
    check_resize_picture,
    check_winsorize,
)

Stream = Queue | int | None


def _refuse_gates(kernel: str, gates: Any) -> None:
    if gates is not None:
        raise ValueError(f"{kernel}: gates are not kept on a GPU, making them again is faster: leave them out")


@contextmanager
def _on_gpu(stream: Stream, kernel: str, written: str = "", **values: Any) -> Iterator[tuple[Queue, list[Any]]]:
    """The queue, and the values as arrays for it; None stays None. Streams that arrays come from wait for what is queued."""
    if not isinstance(stream, int | Queue | None):
        raise ValueError(f"{kernel}: stream {stream!r}: use a camrt Stream, a handle (an int) or None")
    handle = stream.handle if isinstance(stream, Queue) else stream or 0
    found = [
        None if v is None else device_array(v, f"{kernel}: {name}", handle, name == written)
        for name, v in values.items()
    ]
    arrays = [a for a in found if a is not None]
    with _queue(stream, arrays) as queue:
        others = {a.stream for a in arrays if a.stream is not None} - {handle, queue.handle}
        for other in others:
            queue.wait_for(other)
        yield queue, found
        for other in others:
            queue.lead(other)


def _queue(stream: Stream, arrays: Sequence[DeviceArray]) -> AbstractContextManager[Queue]:
    if isinstance(stream, Queue):
        return nullcontext(stream)
    from .device import in_order_of

    return in_order_of(stream or 0, next((a.pointer for a in arrays if a.pointer), 0))


def mask_batch(
    image: Any,
    activations: Any,
    kind: str = "tanh",
    interpolation: str = "bilinear",
    out: Any = None,
    gates: Any = None,
    *,
    stream: Stream = None,
) -> Any:
    """masked[k, c] = image[c] * gate(up(activations[k])).

    image (C, H, W) float32; activations (K, h, w) float32, finite -> masked (K, C, H, W), float32, or in `out`, float32 or 16.
    gates (K, H, W) float32, where given, receives gate(up(A)); NumPy only. ValueError for what does not fit; DeviceError.
    """
    if not any(map(is_device_array, (image, activations, out))):
        check_mask_batch(image, activations, kind, interpolation, out, gates)
        return reference.mask_batch(image, activations, kind, interpolation, out, gates)
    _refuse_gates("mask_batch", gates)
    values = {"image": image, "activations": activations, "out": out}
    with _on_gpu(stream, "mask_batch", "out", **values) as (queue, (image, activations, out)):
        check_mask_batch(image, activations, kind, interpolation, out, None)
        return launches.mask_batch(queue, image, activations, kind, interpolation, out)


def accumulate_maps(
    total: Any,
    scores: Any,
    activations: Any,
    kind: str = "tanh",
    interpolation: str = "bilinear",
    gates: Any = None,
    *,
    stream: Stream = None,
) -> None:
    """total[s] += sum_k scores[s, k] gate(up(activations[k])), in place, always in the same order.

    total (S, H, W), scores (S, K), activations (K, h, w), all float32 and finite. gates: what mask_batch kept, to spare
    making them again; NumPy only. ValueError for what does not fit; DeviceError.
    """
    if not any(map(is_device_array, (total, scores, activations))):
        check_accumulate_maps(total, scores, activations, kind, interpolation, gates)
        reference.accumulate_maps(total, scores, activations, kind, interpolation, gates)
        return
    _refuse_gates("accumulate_maps", gates)
    values = {"total": total, "scores": scores, "activations": activations}
    with _on_gpu(stream, "accumulate_maps", "total", **values) as (queue, (total, scores, activations)):
        check_accumulate_maps(total, scores, activations, kind, interpolation, None)
        launches.accumulate_maps(queue, total, scores, activations, kind, interpolation)


def winsorize(rows: Any, percentile: float, low: float = 0.1, high: float = 1.0, *, stream: Stream = None) -> Any:
    """Clamps each row's positive entries at their own percentile, then rescales them linearly to [low, high].

    rows (..., L) float (on a GPU float32) -> same shape, float32; conventions as in reference.winsorize. ValueError for NaN
    or a percentile outside 0..100. On a GPU a row with NaN becomes NaN, and `Stream.synchronize` raises; DeviceError.
    """
    if not is_device_array(rows):
        rows = np.asarray(rows)
        check_winsorize(rows, percentile, low, high)
        return reference.winsorize(rows, percentile, low, high)
    with _on_gpu(stream, "winsorize", rows=rows) as (queue, (rows,)):
        check_winsorize(rows, percentile, low, high, on_gpu=True)
        return launches.winsorize(queue, rows, percentile, low, high)


def fuse_layers(
    maps: Any,
    grids: Sequence[tuple[int, int]],
    weights: Any,
    size: Sequence[int],
    interpolation: str = "bilinear",
    normalize: bool = False,
    *,
    stream: Stream = None,
) -> Any:
    """sum_l weight_l up(up(M_l -> the largest height and width of any layer) -> size).

    maps (B, sum h w) float32, finite, layers side by side; weights (B, L) float32 -> (B, *size) float32. normalize: rectify and
    min-max scale each layer first. ValueError for what does not fit; DeviceError.
    """
    if not any(map(is_device_array, (maps, weights))):
        check_fuse_layers(maps, grids, weights, size, interpolation)
        return reference.fuse_layers(maps, grids, weights, size, interpolation, normalize)
    with _on_gpu(stream, "fuse_layers", maps=maps, weights=weights) as (queue, (maps, weights)):
        check_fuse_layers(maps, grids, weights, size, interpolation, on_gpu=True)
        return launches.fuse_layers(queue, maps, grids, weights, size, interpolation, normalize)


def layer_importance(alphas: Any, channels: Sequence[int], kind: str = "mean", *, stream: Stream = None) -> Any:
    """ReLU of the layers' aggregated alphas; conventions as in reference.layer_importance.

    alphas (B, sum K) float32, layers side by side -> (B, L) float32. kind: mean, max, min, absmean, absmax, l2. ValueError for
    what does not fit; DeviceError.
    """
    if not is_device_array(alphas):
        check_layer_importance(alphas, channels, kind)
        return reference.layer_importance(alphas, channels, kind)
    with _on_gpu(stream, "layer_importance", alphas=alphas) as (queue, (alphas,)):
        check_layer_importance(alphas, channels, kind)
        return launches.layer_importance(queue, alphas, channels, kind)


def class_scores(
    logits: Any, seeds: Any, kind: str = "softmax", offset: Any = None, weights: Any = None, *, stream: Stream = None
) -> Any:
    """weights_n (sum_c seeds[s, c] p(logits)[n, c] - offset_s), p the softmax, each class's sigmoid, or the logits themselves.

    logits (N, classes), seeds (S, classes), offset (S,), weights (N,), float32 -> (S, N) float32. ValueError for what does not
    fit; DeviceError.
    """
    if not any(map(is_device_array, (logits, seeds, offset, weights))):
        check_class_scores(logits, seeds, kind, offset, weights)
        return reference.class_scores(logits, seeds, kind, offset, weights)
    values = {"logits": logits, "seeds": seeds, "offset": offset, "weights": weights}
    with _on_gpu(stream, "class_scores", **values) as (queue, (logits, seeds, offset, weights)):
        check_class_scores(logits, seeds, kind, offset, weights)
        return launches.class_scores(queue, logits, seeds, kind, offset, weights)


def channel_extremes(activations: Any, *, stream: Stream = None) -> Any:
    """Lowest and highest value of each channel: (K, h, w) float32 -> (K, 2) float32. ValueError; DeviceError."""
    if not is_device_array(activations):
        check_activations("channel_extremes", activations)
        return reference.channel_extremes(activations)
    with _on_gpu(stream, "channel_extremes", activations=activations) as (queue, (activations,)):
        check_activations("channel_extremes", activations)
        return launches.channel_extremes(queue, activations)


def take_channels(activations: Any, index: Any, *, stream: Stream = None) -> Any:
    """activations[index]: (K, h, w) float32, index (n,) int32, within range -> (n, h, w). ValueError; DeviceError."""
    if not any(map(is_device_array, (activations, index))):
        check_activations("take_channels", activations, index)
        return activations[index]
    with _on_gpu(stream, "take_channels", activations=activations, index=index) as (queue, (activations, index)):
        check_activations("take_channels", activations, index)
        return launches.take_channels(queue, activations, index)


def check_finite(values: Any, *, stream: Stream = None) -> None:
    """Refuses NaN and infinity: ValueError, for a GPU's array from the stream's `synchronize`. float32. DeviceError."""
    if not is_device_array(values):
        if not np.isfinite(values).all():
            raise ValueError("NaN or infinity")
        return
    with _on_gpu(stream, "check_finite", values=values) as (queue, (values,)):
        if values.dtype != np.float32:
            raise ValueError(f"check_finite: values {values.shape} is {values.dtype}, needed float32")
        launches.check_finite(queue, values)


def resize_picture(
    picture: Any,
    size: Sequence[int],
    crop: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    filter: str = "bilinear",
    rows_first: bool = False,
    out: Any = None,
    *,
    stream: Stream = None,
) -> Any:
    """(pixel / 255 - mean) / std of a picture that is resized to (height, width) as Pillow does, bit by bit, and cropped.

    picture (H, W, C) uint8; crop: (top, left, height, width) -> (C, height, width) float32, in `out` where it is given (a GPU's).
    filter: bilinear, bicubic, lanczos; rows_first: which axis Pillow takes first. ValueError; DeviceError.
    """
    if not any(map(is_device_array, (picture, out))):
        check_resize_picture(picture, size, crop, mean, std, filter, out)
        image = reference.resize_picture(picture, size, crop, mean, std, filter, rows_first)
        if out is None:
            return image
        out[:] = image
        return out
    with _on_gpu(stream, "resize_picture", "out", picture=picture, out=out) as (queue, (picture, out)):
        check_resize_picture(picture, size, crop, mean, std, filter, out)
        return launches.resize_picture(queue, picture, size, crop, mean, std, filter, rows_first, out)
