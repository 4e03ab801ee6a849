"""What the command line calls SOURCE: `package.module:callable`, `torchvision:NAME[:WEIGHTS]`, `timm:NAME`,
`hf:FOLDER`, a .pt2 file.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.bundle.manifest import Preprocess
from ...runtime.errors import ExportError, first_line


@dataclass(frozen=True)
class Source:
    """A model as it was found, with what its origin knows about its input."""

    spec: str
    name: str
    model: Any  # nn.Module
    input_shape: tuple[int, int, int] | None = None
    classes: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    output: str | None = None  # which part of what the model returns holds the logits


def open_source(spec: str) -> Source:
    """Builds the model. Random weights are the same every time: the generator is seeded with 0. ExportError if it
    cannot.
    """
    import torch

    torch.manual_seed(0)
    if spec.lower().endswith(".pt2"):
        return _saved_program(spec)
    origin, _, rest = spec.partition(":")
    if not rest:
        raise ExportError(
            f"{spec!r} names no model: use package.module:callable, torchvision:NAME[:WEIGHTS], timm:NAME, hf:FOLDER, "
            "FILE.pt2 or FILE.onnx"
        )
    if origin == "torchvision":
        return _torchvision(spec, *rest.partition(":")[::2])
    if origin == "timm":
        return _timm(spec, rest)
    if origin == "hf":
        return _hugging_face(spec, rest)
    return _callable(spec, origin, rest)


def _saved_program(spec: str) -> Source:
    import torch

    from .from_torch import quiet

    if not Path(spec).is_file():
        raise ExportError(f"{spec}: no such file")
    try:
        with quiet():
            program = torch.export.load(spec)
            module = torch.export.unflatten(program)
    except Exception as error:
        raise ExportError(f"{spec}: not a torch.export program ({first_line(error)})") from error
    shapes = [v.shape[1:] for v in _example_inputs(program) if v.dim() == 4]
    shape = tuple(int(n) for n in shapes[0]) if len(shapes) == 1 else None
    return Source(spec, Path(spec).stem, module, shape)  # type: ignore[arg-type]


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
        choices = ", ".join(w.name for w in models.get_model_weights(name))
        raise ExportError(f"torchvision has no weights {weights!r} for {name}: it has {choices}, DEFAULT") from None
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
    mean, std, interpolation = tuple(data["mean"]), tuple(data["std"]), data["interpolation"]
    mode = data.get("crop_mode", "center")
    if mode == "squash":
        resized = int(height / data["crop_pct"]), int(width / data["crop_pct"])
        preprocess = Preprocess(resized, mean, std, (height, width), interpolation)
    elif mode == "border":
        preprocess = Preprocess((height, width), mean, std, None, interpolation, "letterbox", 0)
    else:
        preprocess = Preprocess(int(height / data["crop_pct"]), mean, std, (height, width), interpolation)
    return Source(spec, name, model, (channels, height, width), None, preprocess)


def _hugging_face(spec: str, place: str) -> Source:
    """A Hugging Face image classifier, from a folder or by its id, with its image processor's recipe and its class
    names.
    """
    transformers = _module("transformers", "transformers (pip install 'transformers>=4.50')")
    try:
        model = transformers.AutoModelForImageClassification.from_pretrained(place, attn_implementation="eager")
    except Exception as error:
        raise ExportError(
            f"transformers could not open {place!r} as an image classifier ({first_line(error)[:200]})"
        ) from error
    labels = getattr(model.config, "id2label", None)
    classes = tuple(str(labels[i]) for i in sorted(labels)) if labels else None
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(place).to_dict()
    except Exception:  # a folder without one: the user says what the input is
        processor = {}
    shape, preprocess = processed(processor, model.config)
    return Source(spec, Path(place).name, model, shape, classes, preprocess, "logits")


def processed(processor: dict[str, Any], config: Any) -> tuple[tuple[int, int, int] | None, Preprocess | None]:
    """(input shape, recipe) that a Hugging Face image processor's settings mean; None for what they do not say."""
    channels = int(getattr(config, "num_channels", 3))
    size, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    size, crop = ({"height": s, "width": s} if isinstance(s, int) else dict(s) for s in (size, crop))
    resize: tuple[int, int] | int | None = None
    square = None
    if processor.get("do_resize", True) and size:
        if "shortest_edge" in size:
            resize = int(size["shortest_edge"])
            if processor.get("crop_pct"):  # ConvNeXt: the shorter side, then a centre crop, under 384
                square = (resize, resize)
                resize = int(resize / processor["crop_pct"]) if resize < 384 else resize
                if square[0] >= 384:
                    resize = square
        elif "height" in size:
            resize = int(size["height"]), int(size["width"])
    cropped = (int(crop["height"]), int(crop["width"])) if processor.get("do_center_crop") and crop else None
    cropped = cropped or (square if isinstance(resize, int) else None)
    if cropped is not None and any(
        c > r for c, r in zip(cropped, (resize,) * 2 if isinstance(resize, int) else resize or (0, 0), strict=True)
    ):
        warnings.warn(
            "the image processor's crop is larger than its resize, so its recipe is not used: set one with camrt "
            "recipe",
            stacklevel=4,
        )
        return (channels, *cropped), None
    final = cropped if cropped is not None else resize
    if final is None or isinstance(final, int):
        side = getattr(config, "image_size", None)
        if side is None:
            return None, None
        final = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
        return (channels, *final), None
    scaled = processor.get("rescale_factor", 1 / 255) * 255 if processor.get("do_rescale", True) else 255.0
    normalised = processor.get("do_normalize", True) and processor.get("image_mean") is not None
    mean = [m / scaled for m in processor["image_mean"]] if normalised else [0.0] * channels
    std = [s / scaled for s in processor["image_std"]] if normalised else [1 / scaled] * channels
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    interpolation = names.get(int(processor.get("resample") or 2), "bilinear")
    order = "BGR" if processor.get("do_flip_channel_order") else "RGB"
    assert resize is not None
    recipe = Preprocess(resize, tuple(mean), tuple(std), cropped, interpolation, channels=order)
    return (channels, *final), recipe


def _callable(spec: str, module_name: str, attribute: str) -> Source:
    import torch

    sys.path.insert(0, os.getcwd())
    try:
        module = _module(module_name, module_name)
    finally:
        sys.path.remove(os.getcwd())
    try:
        model = getattr(module, attribute)
    except AttributeError:
        raise ExportError(f"module {module_name!r} has no {attribute!r}") from None
    if not isinstance(model, torch.nn.Module):
        try:
            model = model()
        except Exception as error:
            raise ExportError(f"{spec} raised {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, torch.nn.Module):
        raise ExportError(f"{spec} gave a {type(model).__name__}, not a torch.nn.Module")
    return Source(spec, attribute, model)


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"cannot import {name!r} ({first_line(error)}): is {package} installed, or the folder wrong?"
        ) from error
    except Exception as error:  # imported code may raise anything, such as binaries built for another PyTorch
        raise ExportError(
            f"cannot import {name!r} ({type(error).__name__}: {first_line(error)}): does its version fit the other "
            "packages'?"
        ) from error
