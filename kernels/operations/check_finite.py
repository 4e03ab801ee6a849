"""Refusal of NaN and infinity: cuda/check_finite.cu."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..call import Stream, prepared
from ..gpu.queue import FAULTS, NOT_FINITE, THREADS, Launch, blocks


def check_finite(values: Any, *, stream: Stream = None) -> None:
    """ValueError if an array holds NaN or infinity; for a GPU array (float32) the stream's `synchronize` raises it.

    values: any shape. ValueError at once for a GPU array of another dtype; DeviceError.
    """
    with prepared("check_finite", stream, values=values) as (queue, (values,)):
        if queue is not None and values.dtype != np.float32:
            raise ValueError(f"check_finite: values {values.shape} is {values.dtype}, needed float32")
        if queue is None:
            if not np.isfinite(values).all():
                raise ValueError(FAULTS[NOT_FINITE])
            return
        count = math.prod(values.shape)
        if count:
            arguments = (values, queue.fault, np.int64(count), np.int32(NOT_FINITE))
            queue.launch(Launch("check_finite", "check_finite", (blocks(count, 4 * THREADS), 1), THREADS, 0, arguments))
