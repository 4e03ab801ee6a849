"""Numbers that a model's Python code reads from tensors that do not depend on the image, as in `if (std == 0).any()`.

torch.export traces tensors without values and would refuse such a model. An eager run records the numbers that are
read, and the trace is given the same numbers.
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
    """value: what `function` read; None if it may depend on the image or on random numbers."""

    function: str
    value: Any | None


class ReadingsNoted(TorchFunctionMode):
    """Inside the block, records what an eager run reads. constants: tensors that are the same for every image, such as
    parameters and buffers; results of functions of constants alone are constants as well.
    """

    def __init__(self, constants: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._constants = {id(t): t for t in constants}  # the tensors stay alive, so that their ids stay valid
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
        """Removes the tensors that share memory with a written tensor from the constants; all tensors, if their memory
        cannot be compared.
        """
        try:
            storages = {x.untyped_storage()._cdata for x in written}
            self._constants = {i: t for i, t in self._constants.items() if t.untyped_storage()._cdata not in storages}
        except NotImplementedError:  # tensors within torch.vmap have no memory of their own
            self._constants = {}


class ReadingsGiven(TorchFunctionMode):
    """Inside the block, a trace reads the numbers of the eager run, as long as it calls the same functions in order."""

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
