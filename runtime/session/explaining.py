"""Explains one batch with one method: on the host, or fully on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...kernels import check_finite as check_finite_on_gpu
from ..cams import Method, Result
from ..errors import CamrtError, NotFinite
from .batches import NOT_FINITE, Batch, check_finite, repeated
from .session import Session


def explain_batch(
    session: Session, method: Method, batch: Batch, layers: Sequence[str], options: Mapping[str, Any]
) -> tuple[Result, np.ndarray]:
    """(the method's result, the logits (images or S, classes)) of one batch, both on the host.

    layers: names of taps; options: the method's. CamrtError if the network gives NaN or infinity.
    """
    needs = method.data(options)
    on_gpu = session.memory.stream is not None and method.on_gpu and needs.stays_on_gpu(options)
    if on_gpu and needs.captured:
        result, logits = _explain_captured(session, method, batch, layers, options)
    else:
        data = read(session, method, batch, layers, options)
        with session.stage("method"):
            result = method.function(data, **options)
            result = _fetched(session, result)[0] if on_gpu else result
        logits = data.logits
    rows = len(batch.seeds)
    _check_result(method, result, (rows, *session.size), (rows, len(layers)))
    return result, logits


def _check_result(method: Method, result: Any, maps: tuple[int, ...], weights: tuple[int, ...]) -> None:
    """CamrtError if the method gave something else than float32 maps and layer weights of these shapes, finite."""
    if not isinstance(result, Result):
        raise CamrtError(f"the method {method.name} gave {type(result).__name__}, it must give a Result")
    for name, array, shape in (("maps", result.maps, maps), ("layer_weights", result.layer_weights, weights)):
        if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != np.float32:
            got = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            raise CamrtError(f"the method {method.name} gave {name} {got}, it must give float32{list(shape)}")
    if not np.isfinite(result.maps).all():
        raise NotFinite(f"the map of {method.name} holds NaN or infinity, though the network's logits are finite")


def read(session: Session, method: Method, batch: Batch, layers: Sequence[str], options: Mapping[str, Any]) -> Any:
    """The method's data: the first argument of its function. CamrtError if the logits hold NaN or infinity."""
    data = method.data(options).read(session, batch, layers, options)
    check_finite(data.logits)
    return data


def _explain_captured(
    session: Session, method: Method, batch: Batch, layers: Sequence[str], options: Mapping[str, Any]
) -> tuple[Result, np.ndarray]:
    """As `explain_batch`, on a GPU, by a CUDA graph from the second run of the same shapes on."""
    memory, needs = session.memory, method.data(options)

    def work(images: Any, seeds: Any) -> tuple[Any, Result]:
        data: Any = needs.read(session, Batch(batch.first, images, seeds), layers, options, on_gpu=True)
        for values in (data.logits, data.alphas, data.maps):
            check_finite_on_gpu(values, stream=memory.stream)
        with session.stage("method"):
            data = data.select(layers)
            return data, method.function(data, **options)

    if session.cuda_graphs is None:
        data, result = work(batch.images, memory.put(batch.seeds))
    else:
        key = (method.name, *layers, repr(sorted(options.items())), batch.images.shape, batch.seeds.shape)
        data, result = session.cuda_graphs.run(key, (batch.images, batch.seeds), work)
    # a later replay overwrites these arrays: so download the result now, and copy the data that retune needs
    data_copy = replace(data, alphas=memory.copied(data.alphas), maps=memory.copied(data.maps))
    fetched, (logits,) = _fetched(session, result, data.logits)

    def retune(**changes: Any) -> Result:
        with session.exclusive():
            again = method.function(data_copy, **options).retune
            assert again is not None
            return _fetched(session, again(**changes))[0]

    return replace(fetched, retune=retune), repeated(logits[: len(batch.seeds)], len(batch.seeds))


def _fetched(session: Session, result: Result, *others: Any) -> tuple[Result, list[np.ndarray]]:
    """Downloads the result and the `others`. CamrtError if a kernel found NaN or infinity."""
    try:
        parts = [] if result.evidence is None else [result.evidence]
        maps, weights, *rest = session.memory.get(result.maps, result.layer_weights, *parts, *others)
        evidence, rest = (rest[0], rest[1:]) if parts else (None, rest)
    except ValueError as error:  # from a kernel that looked for NaN
        raise NotFinite(NOT_FINITE) from error
    again = result.retune
    if again is None:
        return replace(result, maps=maps, layer_weights=weights, evidence=evidence), rest

    def retune(**changes: Any) -> Result:
        with session.exclusive():
            return _fetched(session, again(**changes))[0]

    return replace(result, maps=maps, layer_weights=weights, evidence=evidence, retune=retune), rest
