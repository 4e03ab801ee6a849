"""An actor for pipelines of Ray Data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .mapping.rows import Wanted, explain_rows, prepare
from .method_choice import parse_method
from .questions import class_number
from .runtime.explainer import load
from .tensors import PIXELS


class Explain:
    """Explains batches of pictures:

        dataset.map_batches(camrt.ray.Explain, fn_constructor_args=("net.camrt",), batch_size=16,
                            compute=ray.data.ActorPoolStrategy(size=2), num_cpus=1)

    A batch has the column `bytes`, files of pictures, or `image`, uint8 arrays (H, W, 3) of any sizes. Its other
    columns stay, and it gets target (n,) int64, -1 where a picture could not be explained; probabilities (n, classes),
    layer_weights (n, layers) and map (n, H, W) float32, NaN there; and error (n,), "" or what was wrong.
    """

    def __init__(
        self,
        bundle: str | Path,
        method: str = "winsor_cam",
        target: str | int | None = None,
        layers: Sequence[str] | str | None = None,
        backend: str = "auto",
        precision: str | None = None,
        threads: int | None = 1,
        max_batch: int = 16,
        pixels: int = PIXELS,
        **options: Any,
    ) -> None:
        """bundle: a folder that every node has. method: NAME or NAME:option=value,...; options: of the method, too.
        target: a class by number or name, by default each image's top class. The rest as camrt.load. CamrtError.
        """
        choice = parse_method(method)
        self._explainer = load(bundle, backend, max_batch, precision, threads)
        number = class_number(target, self._explainer.manifest)
        self._wanted = Wanted(choice.name, {**choice.options, **options}, layers, number, "float32", pixels=pixels)
        self._explainer.check_arguments(choice.name, number, layers, dict(self._wanted.options))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of columns -> the same with those of the explanations."""
        name = "bytes" if "bytes" in batch else "image"
        images = [prepare("", _encoded(picture), self._explainer.manifest, self._wanted) for picture in batch[name]]
        problems, columns = explain_rows(self._explainer, images, self._wanted)
        good = np.array([not problem for problem in problems], bool)
        manifest = self._explainer.manifest
        shapes = {
            "probabilities": (manifest.num_classes,),
            "layer_weights": columns["layer_weights"].shape[1:] if columns else (0,),
            "map": manifest.input_shape[1:],
        }
        result = {key: values for key, values in batch.items() if key != name}
        result["target"] = np.full(len(images), -1, np.int64)
        for key, shape in shapes.items():
            result[key] = np.full((len(images), *shape), np.nan, np.float32)
        if good.any():
            for key in ("target", *shapes):
                result[key][good] = columns[key]
        return {**result, "error": np.array(problems, object)}


def _encoded(picture: Any) -> Any:
    return bytes(picture) if isinstance(picture, bytes | bytearray | memoryview) else np.asarray(picture)
