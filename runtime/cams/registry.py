"""The table of CAM methods."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import math
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import UnknownMethod, first_line, near
from .data import DATA, MethodData


@dataclass(frozen=True)
class Result:
    """What a method's function returns for S explanations.

    maps (S, H, W) float32 and layer_weights (S, L) float32: on the host, or on the GPU if the method runs there.
    details: name -> (S,), what the method reports beside its maps. retune: new options -> Result, without running the
    network. evidence: None, or (S, ...) as the maps, what `check` reads. check: (the result on the host) -> further
    details; it warns if the result is unusual.
    """

    maps: Any
    layer_weights: Any
    details: dict[str, np.ndarray] = field(default_factory=dict)
    retune: Callable[..., Result] | None = None
    evidence: Any = None
    check: Callable[[Result], dict[str, np.ndarray]] | None = None

    def checked(self) -> dict[str, np.ndarray]:
        """The details with those of the check."""
        return self.details if self.check is None else self.details | self.check(self)

    def rows(self, which: slice) -> Result:
        """Of some of the S explanations alone, on the host."""
        return replace(
            self,
            maps=self.maps[which],
            layer_weights=self.layer_weights[which],
            details={name: values[which] for name, values in self.details.items()},
            retune=None if self.retune is None else retune_of_rows(self.retune, which),
            evidence=None if self.evidence is None else self.evidence[which],
        )


class Retune:
    """What a Result's `retune` may be, so that a part of the explanations can be retuned alone, and held alone."""

    def __call__(self, **options: Any) -> Result:
        raise NotImplementedError

    def rows(self, which: slice) -> Callable[..., Result]:
        """Of some of the explanations."""
        raise NotImplementedError


def retune_of_rows(retune: Callable[..., Result], which: slice) -> Callable[..., Result]:
    """The same of some of the explanations."""
    return retune.rows(which) if isinstance(retune, Retune) else _RowsOf(retune, which)


def pickles(retune: Callable[..., Result] | None) -> bool:
    """False if it is, or holds, a function made inside another, as those are that hold arrays on a GPU."""
    if isinstance(retune, _RowsOf):
        return pickles(retune.retune)
    if isinstance(retune, _JoinedRetune):
        return all(map(pickles, retune.parts))
    return not isinstance(retune, types.FunctionType)


@dataclass(frozen=True)
class _RowsOf:
    """A part of what retunes all explanations, and is not divided itself."""

    retune: Callable[..., Result]
    which: slice

    def __call__(self, **options: Any) -> Result:
        return self.retune(**options).rows(self.which)


def join(results: Sequence[Result]) -> Result:
    """Concatenates the results of several batches along the first axis. Their details must have the same names."""
    if len(results) == 1:
        return results[0]
    retunes = tuple(r.retune for r in results if r.retune is not None)
    return Result(
        np.concatenate([r.maps for r in results]),
        np.concatenate([r.layer_weights for r in results]),
        {name: np.concatenate([r.details[name] for r in results]) for name in results[0].details},
        _JoinedRetune(retunes, tuple(len(r.maps) for r in results)) if len(retunes) == len(results) else None,
        None if results[0].evidence is None else np.concatenate([r.evidence for r in results]),
        results[0].check,
    )


@dataclass(frozen=True)
class _JoinedRetune(Retune):
    """Retunes the parts of a batch one by one. counts: of explanations in each part."""

    parts: tuple[Callable[..., Result], ...]
    counts: tuple[int, ...]

    def __call__(self, **options: Any) -> Result:
        return join([retune(**options) for retune in self.parts])

    def rows(self, which: slice) -> Callable[..., Result]:
        start, stop, _ = which.indices(sum(self.counts))
        parts, counts, first = [], [], 0
        for retune, count in zip(self.parts, self.counts, strict=True):
            inside = slice(max(start - first, 0), min(stop - first, count))
            first += count
            if inside.start < inside.stop:
                parts.append(retune_of_rows(retune, inside))
                counts.append(inside.stop - inside.start)
        return parts[0] if len(parts) == 1 else _JoinedRetune(tuple(parts), tuple(counts))


@dataclass(frozen=True)
class Method:
    """A registered method.

    needs: the class of data that it reads; or the name of an option, and the class for each of its values. layers: the
    role of its default layers, None if it takes no layers.
    source: where it was published. seeds: for a method that explains another score than the class's: (logits
    (S, classes), seeds (S, classes), **options) -> the seeds to explain (S, classes). on_gpu: its function also takes
    GPU arrays and returns GPU arrays.
    """

    name: str
    needs: Needs
    layers: str | None
    function: Callable[..., Result]
    source: str
    seeds: Callable[..., np.ndarray] | None = None
    on_gpu: bool = False

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Option names and their defaults; not to be changed."""
        return {p.name: p.default for p in list(inspect.signature(self.function).parameters.values())[1:]}

    def data(self, options: Mapping[str, Any]) -> type[MethodData]:
        """The class of data that it reads with these options. UnknownMethod for a value that has none."""
        if isinstance(self.needs, type):
            return self.needs
        option, classes = self.needs
        return classes[chosen(options.get(option, self.options[option]), list(classes), option)]

    def check_options(self, options: dict[str, object]) -> None:
        """UnknownMethod names an option that the method does not have, or a value that no class of data fits."""
        known = list(self.options)
        for option in options:
            if option not in known:
                raise UnknownMethod(f"{self.name} has no option {option!r}: it has {', '.join(known) or 'none'}")
        self.data(options)


Needs = type[MethodData] | tuple[str, Mapping[str, type[MethodData]]]
METHODS: dict[str, Method] = {}
PLUGINS = "camrt.methods"  # the entry point group of packages with methods

Function = Callable[..., Result]


def cam(
    name: str,
    needs: Needs,
    layers: str | None,
    source: str,
    seeds: Callable[..., np.ndarray] | None = None,
    on_gpu: bool = False,
) -> Callable[[Function], Function]:
    """A decorator that registers a method's function under `name`. The other arguments: see `Method`.

    ValueError if the name is taken, `needs` is not a class of cams/data, or on_gpu is set for data that is never on a
    GPU.
    """

    def register(function: Function) -> Function:
        if name in METHODS:
            raise ValueError(f"a method {name!r} is registered already")
        for data in needs[1].values() if isinstance(needs, tuple) else (needs,):
            if data not in DATA:
                raise ValueError(f"needs {data!r}: use {', '.join(d.__name__ for d in DATA)}")
            if on_gpu and not data.on_gpu:
                raise ValueError(f"{name}: on_gpu, but {data.__name__} lies on the host: leave on_gpu out")
        METHODS[name] = Method(name, needs, layers, function, source, seeds, on_gpu)
        return function

    return register


def all_methods() -> dict[str, Method]:
    """By name: ours, and those of installed packages that name a module in the entry point group `camrt.methods`."""
    _import_plugins()
    return METHODS


@functools.cache
def _import_plugins() -> None:
    for entry in importlib.metadata.entry_points(group=PLUGINS):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(f"the methods of {entry.value} cannot be used: {first_line(error)}", stacklevel=2)


def method_named(name: str) -> Method:
    """The method of that name. UnknownMethod, with similar names, if there is none."""
    if name not in METHODS and name not in all_methods():
        raise UnknownMethod(f"no method {name!r}{near(str(name), list(METHODS))}")
    return METHODS[name]


def is_number(value: Any) -> bool:
    """Whether it is a finite real number; True and False are none."""
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def chosen(value: str, known: Sequence[str], option: str) -> str:
    """`value`, if it is one of the known. UnknownMethod names the option otherwise."""
    if value not in known:
        raise UnknownMethod(f"{option} {value!r}: use {', '.join(known)}")
    return value
