"""Numbers that a model's Python code reads from tensors which the image does not enter, as `if (std == 0).any()`.

torch.export has tensors without numbers and would refuse such a model. An eager run shows what was read, and the trace
reads the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_READS = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "equal", "allclose", "is_nonzero")
_RANDOM = ("rand", "normal", "bernoulli", "multinomial", "dropout", "uniform", "poisson")


@dataclass(frozen=True)
class Reading:
    """value: what `function` read; None where the image or chance may enter."""

    function: str
    value: Any | None


class ReadingsNoted(TorchFunctionMode):
    """While it lasts, notes what an eager run reads. constants: tensors that are the same for every image, as
    parameters and buffers are; what functions make of them alone is as well.
    """

    def __init__(self, constants: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._constants = {id(t): t for t in constants}  # the tensors stay alive, and their ids theirs
        self.readings: list[Reading] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        constant = all(id(t) in self._constants for t in tensors) and not any(word in name for word in _RANDOM)
        output = func(*args, **kwargs)
        if name in _READS:
            self.readings.append(Reading(name, output if constant else None))
        elif constant:
            self._constants.update({id(x): x for x in tree_leaves(output) if isinstance(x, torch.Tensor)})
        elif name.endswith("_") or name.startswith("__i") or "out" in kwargs:  # add_, []=, +=, out=
            self._forget([x for x in (*args[:1], kwargs.get("out")) if isinstance(x, torch.Tensor)])
        return output

    def _forget(self, written: Sequence[torch.Tensor]) -> None:
        """What shares memory with a tensor that was written to is no constant any more; where that cannot be told,
        nothing is.
        """
        try:
            storages = {x.untyped_storage()._cdata for x in written}
            self._constants = {i: t for i, t in self._constants.items() if t.untyped_storage()._cdata not in storages}
        except NotImplementedError:  # tensors within torch.vmap have no memory of their own
            self._constants = {}


class ReadingsGiven(TorchFunctionMode):
    """While it lasts, a trace reads what the eager run read, as long as it reads the same in the same order."""

    def __init__(self, readings: Iterable[Reading]) -> None:
        super().__init__()
        self._readings = iter(readings)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in _READS:
            reading = next(self._readings, None)
            if reading is None or reading.function != name:
                self._readings = iter(())
            elif reading.value is not None:
                return reading.value
        return func(*args, **(kwargs or {}))
