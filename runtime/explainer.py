"""Loads a bundle and explains images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels import OutOfMemory
from .backends import Backend, Settings, create
from .bundle.manifest import Manifest
from .bundle.reading import Bundle, read_bundle
from .cams import GRADIENT_AGGREGATIONS, Method, join, method_named
from .errors import CamrtError, InputError, UnknownLayer, UnknownMethod, near
from .explanation import Explanation
from .images.preprocess import ImageBatch
from .scores import probabilities
from .session.batches import batches, check_finite, top_class_where_zero
from .session.explaining import explain_batch
from .session.session import Session
from .session.timing import Stages


@dataclass(frozen=True)
class Targets:
    """What to explain. seeds (B, K, classes) float32: cotangents of the logits; a row of zeros means the top class."""

    seeds: np.ndarray
    classes: np.ndarray | None  # (B, K) int64; None for seed arrays; -1 where the top class was asked for
    several: bool  # maps are (B, K, H, W) rather than (B, H, W)


class Explainer:
    """Explains images with the programs of one bundle. May be used from several threads.

    backend: an opened backend; max_batch: the most images, targets or masked images in one run; precision: "fp32" or
    "fp16", by default the bundle's first. session: runs the programs. InputError if max_batch is below 1 or the bundle
    does not have the precision.
    """

    def __init__(self, bundle: Bundle, backend: Backend, max_batch: int = 16, precision: str | None = None):
        if max_batch < 1:
            raise InputError(f"max_batch {max_batch}: use 1 or more")
        if precision is not None and precision not in bundle.precisions:
            raise InputError(
                f"{bundle.path} has no {precision} programs, it has {' and '.join(bundle.precisions)}: export it with "
                f"precision={precision!r} (--precision {precision})"
            )
        self.bundle = bundle
        self.backend = backend
        self.manifest: Manifest = bundle.manifest
        self.precision = precision or bundle.precisions[0]
        self.session = Session(bundle, backend, max_batch, self.precision)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the bundle's taps."""
        return tuple(t.name for t in self.manifest.taps)

    def classify(self, images: Any) -> np.ndarray:
        """Logits (B, classes) float32. images: as for `explain`. InputError, CamrtError."""
        pictures = ImageBatch(images, self.manifest)
        return self._within_memory(lambda: self.session.logits(self._placed(pictures)[0]))

    def explain(
        self,
        images: Any,
        method: str = "winsor_cam",
        target: Any = None,
        layers: Sequence[str] | str | None = None,
        **options: Any,
    ) -> Explanation:
        """Maps that show which parts of an image raise the score of its target.

        images: float32 NCHW arrays, taken as they are; or uint8 HWC arrays, paths or Pillow images, which are
        preprocessed by the bundle's recipe. target: None (each image's top class), an int, one int per image, K ints
        per image (B, K), or a float seed array (classes,), (B, classes) or (B, K, classes): the cotangent of the
        logits. target="not", only for a network with a single score: explains what lowers it. layers: names, or a
        role ("conv", "last"); by default the method's own. options: the method's, e.g. percentile=90.

        InputError, UnknownMethod, UnknownLayer for arguments that do not fit; CamrtError if the network gives NaN or
        infinity or the GPU fails. An error in one image means no result for any image.
        """
        chosen = method_named(method)
        chosen.check_options(options)
        names = self._layers(chosen, layers)
        with self.session.stage("preprocess"):
            pictures = ImageBatch(images, self.manifest)
        targets = self.targets(target, len(pictures))
        aggregation = str(options.get("gradient_aggregation", "mean"))
        if aggregation not in GRADIENT_AGGREGATIONS:
            raise UnknownMethod(f"gradient_aggregation {aggregation!r}: use {', '.join(GRADIENT_AGGREGATIONS)}")
        return self._within_memory(lambda: self._explained(pictures, chosen, targets, names, options))

    def _explained(
        self, pictures: ImageBatch, method: Method, targets: Targets, names: Sequence[str], options: dict[str, Any]
    ) -> Explanation:
        with self.session.stage("preprocess"):
            images, draw = self._placed(pictures)
        seeds = targets.seeds
        if method.seeds is not None:
            seeds = self._seeds_of(method, images, seeds, options)

        logits = np.empty((len(pictures), self.manifest.num_classes), np.float32)
        results = []
        for batch in batches(images, seeds, method.by_image, self.session.max_batch):
            result, found = explain_batch(self.session, method, batch, names, options)
            logits[batch.first : batch.first + len(batch.images)] = found[: len(batch.images)]
            results.append(result)
        result = join(results)
        check_finite(result.maps)
        if result.check is not None:
            result.check(result)

        count, several = seeds.shape[:2], targets.several
        leading = count if several else count[:1]
        classes = targets.classes
        if classes is not None:
            classes = np.where(classes < 0, logits.argmax(axis=1)[:, None], classes).reshape(leading)
        return Explanation(
            method=method.name,
            maps=result.maps.reshape(*leading, *result.maps.shape[1:]),
            target=classes,
            logits=logits,
            layers=tuple(t.name for t in self.manifest.taps if t.name in names),
            layer_weights=result.layer_weights.reshape(*leading, -1) if names else np.zeros((*leading, 0), np.float32),
            options=method.options | options,
            _draw=draw,
            details={name: values.reshape(leading) for name, values in result.details.items()},
            _retune=result.retune,
        )

    def _placed(self, images: ImageBatch) -> tuple[Any, Callable[[], list[np.ndarray]]]:
        """(the network's input, on the host or the GPU; a function that draws the pictures under the maps)."""
        stream = self.session.memory.stream
        return images.on_host() if stream is None else images.on_gpu(stream)

    def _within_memory(self, work: Callable[[], Any]) -> Any:
        """Returns work(). If the GPU's memory runs out, frees some or halves the batch, and tries again. CamrtError."""
        while True:
            try:
                with self.session.exclusive(halving=True):
                    return work()
            except OutOfMemory as error:
                problem = CamrtError(str(error))
            if not self.session.make_room():
                raise problem

    @contextmanager
    def timed(self) -> Iterator[Stages]:
        """A context that measures the stages of the calls inside it. Use it from one thread.

        On a GPU it waits after each stage and replays no CUDA graph, so calls take longer than usual.
        """
        stream = self.session.memory.stream
        self.session.stages = stages = Stages() if stream is None else Stages(lambda: stream.event().synchronize())
        try:
            yield stages
        finally:
            self.session.stages = None

    def probabilities(self, images: Any) -> np.ndarray:
        """Probabilities (B, classes) float32: the softmax or sigmoid of the logits, as Manifest.probability says.

        images: as for `explain`. InputError, CamrtError.
        """
        return probabilities(self.classify(images), self.manifest)

    def normalized(self, images: Any) -> np.ndarray:
        """The tensor that masks multiply, (B, C', H, W) float32: the network's input; or, if the network normalises
        its input itself, the tensor that its first layer reads. images: as for `explain`.
        """
        pictures = ImageBatch(images, self.manifest)
        return self._within_memory(
            lambda: self.session.memory.get(self.session.normalized(self._placed(pictures)[0]))[0]
        )

    def normalized_probabilities(self, normalized: np.ndarray) -> np.ndarray:
        """Probabilities (B, classes) of tensors (B, C', H, W) as `normalized` returns them, masked or not."""
        if self.manifest.normalized is None:
            return self.probabilities(normalized)
        return probabilities(self._within_memory(lambda: self.session.scored(normalized)), self.manifest)

    def _seeds_of(self, method: Method, images: Any, seeds: np.ndarray, options: dict[str, Any]) -> np.ndarray:
        """Seeds (B, K, classes) from the method's own `seeds` function, which needs the logits."""
        assert method.seeds is not None
        logits = np.repeat(self.session.logits(images), seeds.shape[1], axis=0)
        given = top_class_where_zero(seeds.reshape(logits.shape), logits)
        return method.seeds(logits, given, **options).reshape(seeds.shape)

    def targets(self, target: Any, images: int) -> Targets:
        """Converts the `target` of `explain` to Targets for that many images.

        InputError for a class out of range or a shape that does not fit.
        """
        classes = self.manifest.num_classes
        if isinstance(target, str):
            if target != "not":
                raise InputError(
                    f"target {target!r}: pass class numbers, or 'not' for what speaks against a single class"
                )
            if classes != 1:
                raise InputError(
                    f"target 'not' is for networks with a single score, this one has {classes} classes: name one"
                )
            return Targets(np.full((images, 1, 1), -1, np.float32), None, False)
        if target is None:
            return Targets(np.zeros((images, 1, classes), np.float32), np.full((images, 1), -1), False)
        try:
            given = np.asarray(target)
        except ValueError:
            raise InputError(
                "target: every image needs the same number of classes: pass one, one per image, or (images, targets)"
            ) from None
        if given.dtype.kind == "f":
            if given.ndim == 1:
                given = np.repeat(given[None], images, axis=0)
            seeds = given[:, None] if given.ndim == 2 else given
            seeds = seeds.astype(np.float32)  # before the check: a seed that underflows to 0 would mean the top class
            if seeds.ndim != 3 or len(seeds) != images or seeds.shape[2] != classes or not seeds.size:
                raise InputError(
                    f"seed array of shape {given.shape}: pass ({images}, {classes}) or ({images}, targets, {classes})"
                )
            if not np.isfinite(seeds).all() or not np.abs(seeds).max(axis=2, initial=0).all():
                raise InputError("seed array: every row needs finite entries, not all of them zero")
            return Targets(seeds, None, given.ndim == 3)
        if given.dtype.kind not in "iu":
            raise InputError(f"target {target!r}: pass None, class numbers, or a float seed array")
        if given.ndim == 0:
            given = np.full(images, int(given))
        if given.ndim not in (1, 2) or len(given) != images or given.size == 0:
            raise InputError(
                f"target of shape {given.shape}: pass one class, one per image ({images}), or ({images}, targets)"
            )
        wrong = given[(given < 0) | (given >= classes)]
        if wrong.size:
            raise InputError(f"class {wrong.flat[0]} is out of range: the network has classes 0..{classes - 1}")
        grid = given.reshape(images, -1).astype(np.int64)
        seeds = np.zeros((*grid.shape, classes), np.float32)
        np.put_along_axis(seeds, grid[..., None], 1, axis=2)
        return Targets(seeds, grid, given.ndim == 2)

    def _layers(self, method: Method, layers: Sequence[str] | str | None) -> tuple[str, ...]:
        if method.layers is None:
            if layers is not None:
                raise InputError(f"{method.name} reads the whole network: leave layers out")
            return ()
        wanted = method.layers if layers is None else layers
        if isinstance(wanted, str) and wanted in ("conv", "last"):
            names = tuple(t.name for t in self.manifest.taps if wanted in t.roles)
            if not names:
                own = self.manifest.last_layer
                if wanted == "conv":
                    add = "export it with --layers conv"
                elif own is None:
                    add = "export it with --layers last, which fails with a reason if the network has no such layer"
                else:
                    add = f"export it with layer {own!r} as well"
                raise UnknownLayer(
                    f"{method.name} needs the layers {wanted!r}, which this bundle lacks: {add}, or name layers, it "
                    f"has {', '.join(self.layers[:5])}"
                )
            return names
        names = (wanted,) if isinstance(wanted, str) else tuple(dict.fromkeys(wanted))
        for name in names:
            if name not in self.layers:
                raise UnknownLayer(
                    f"the bundle has no layer {name!r}{near(name, self.layers)}; 'camrt info' lists them"
                )
        if not names:
            raise UnknownLayer("layers is empty: name layers, or leave the argument out for the method's own")
        for name in names:
            if method.layers == "last" and self.manifest.tap(name).grid == (1, 1):
                raise UnknownLayer(
                    f"layer {name!r} has no grid, it is 1 x 1, so its map would be constant: name another layer"
                )
        return names


def load(
    path: str | Path,
    backend: str = "auto",
    max_batch: int = 16,
    precision: str | None = None,
    threads: int | None = None,
    device: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Explainer:
    """Opens a bundle.

    path: the bundle's folder. backend: "tensorrt", "onnxruntime-cuda", "onnxruntime", or "auto": the first of these
    that works on this machine. max_batch: the most images, targets or masked images in one run. precision: "fp32" or
    "fp16", by default the first that the bundle has. threads: CPU threads of one run, by default one per core. device:
    the GPU's number. progress: called with one line of text before work that takes seconds, e.g. building an engine.

    BundleError if the bundle is missing or damaged; BackendUnavailable if no backend can run it here; UnknownName for
    an unknown backend; InputError for a precision that the bundle does not have.
    """
    return Explainer(
        read_bundle(path), create(backend, Settings(threads, device, max_batch, progress)), max_batch, precision
    )
