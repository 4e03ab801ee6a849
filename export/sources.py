"""What the command line calls SOURCE: `package.module:callable`, `torchvision:NAME[:WEIGHTS]`, `timm:NAME`, a .pt2 file."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import ExportError, first_line
from ..runtime.manifest import Preprocess


@dataclass(frozen=True)
class Source:
    """A model as it was found, with what its origin knows about its input."""

    spec: str
    name: str
    model: Any  # nn.Module
    input_shape: tuple[int, int, int] | None = None
    classes: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None


def is_onnx(spec: str) -> bool:
    return spec.lower().endswith(".onnx")


def open_source(spec: str) -> Source:
    """Builds the model. Random weights are the same every time: the generator is seeded with 0. ExportError if it cannot."""
    import torch

    torch.manual_seed(0)
    if spec.lower().endswith(".pt2"):
        return _saved_program(spec)
    origin, _, rest = spec.partition(":")
    if not rest:
        raise ExportError(
            f"{spec!r} is no source: use package.module:callable, torchvision:NAME[:WEIGHTS], timm:NAME, FILE.pt2 or FILE.onnx"
        )
    if origin == "torchvision":
        return _torchvision(spec, *rest.partition(":")[::2])
    if origin == "timm":
        return _timm(spec, rest)
    return _callable(spec, origin, rest)


def _saved_program(spec: str) -> Source:
    import torch

    if not Path(spec).is_file():
        raise ExportError(f"{spec}: no such file")
    try:
        program = torch.export.load(spec)
    except Exception as error:
        raise ExportError(f"{spec}: not a torch.export program ({first_line(error)})") from error
    shapes = [v.shape[1:] for v in _example_inputs(program) if v.dim() == 4]
    shape = tuple(int(n) for n in shapes[0]) if len(shapes) == 1 else None
    return Source(spec, Path(spec).stem, torch.export.unflatten(program), shape)  # type: ignore[arg-type]


def _example_inputs(program: Any) -> list[Any]:
    import torch

    args, kwargs = program.example_inputs or ((), {})
    return [v for v in [*args, *kwargs.values()] if isinstance(v, torch.Tensor)]


def _torchvision(spec: str, name: str, weights: str) -> Source:
    models = _module("torchvision.models", "torchvision")
    if name not in models.list_models(module=models):
        raise ExportError(f"torchvision has no classification model {name!r}: see torchvision.models.list_models()")
    if not weights:
        return Source(spec, name, models.get_model(name, weights=None))
    try:
        chosen = models.get_model_weights(name)[weights]
    except KeyError:
        known = ", ".join(w.name for w in models.get_model_weights(name))
        raise ExportError(f"torchvision has no weights {weights!r} for {name}: it has {known}, DEFAULT") from None
    try:
        model = models.get_model(name, weights=chosen)
    except Exception as error:
        raise ExportError(f"{spec}: the weights could not be loaded ({first_line(error)})") from error
    transform = chosen.transforms()
    crop, resize = transform.crop_size[0], transform.resize_size[0]
    preprocess = Preprocess(
        resize, tuple(transform.mean), tuple(transform.std), (crop, crop), str(transform.interpolation.value)
    )
    return Source(spec, name, model, (3, crop, crop), tuple(chosen.meta["categories"]), preprocess)


def _timm(spec: str, name: str) -> Source:
    timm = _module("timm", "timm")
    try:
        model = timm.create_model(name, pretrained=timm.models.is_model_pretrained(name))
    except Exception as error:
        raise ExportError(f"timm could not make {name!r} ({first_line(error)})") from error
    data = timm.data.resolve_data_config({}, model=model)
    channels, height, width = (int(n) for n in data["input_size"])
    resize = int(height / data["crop_pct"])
    preprocess = Preprocess(resize, tuple(data["mean"]), tuple(data["std"]), (height, width), data["interpolation"])
    return Source(spec, name, model, (channels, height, width), None, preprocess)


def _callable(spec: str, module_name: str, attribute: str) -> Source:
    import torch

    sys.path.insert(0, os.getcwd())
    try:
        module = _module(module_name, module_name)
    finally:
        sys.path.remove(os.getcwd())
    try:
        made = getattr(module, attribute)
    except AttributeError:
        raise ExportError(f"module {module_name!r} has no {attribute!r}") from None
    if not isinstance(made, torch.nn.Module):
        try:
            made = made()
        except Exception as error:
            raise ExportError(f"{spec} raised {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(made, torch.nn.Module):
        raise ExportError(f"{spec} gave a {type(made).__name__}, not a torch.nn.Module")
    return Source(spec, attribute, made)


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"cannot import {name!r} ({first_line(error)}): is {package} installed, or the folder wrong?"
        ) from error
