"""Loads a bundle and explains images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..kernels import OutOfMemory
from .backends import Backend, Settings, create, masks_on_gpu
from .bundle.kinds import Kind
from .bundle.manifest import Manifest
from .bundle.reading import Bundle, read_bundle
from .cams import GRADIENT_AGGREGATIONS, LayerMaps, MaskedRuns, Method, Result, join, method_named
from .cams.data.layer_maps import noise_of
from .errors import CamrtError, InputError, UnknownMethod, warn
from .explanation import Explanation
from .images.image_batch import ImageBatch
from .layer_choice import chosen_layers
from .scores import probabilities
from .session.batches import batches, top_class_where_zero
from .session.explaining import explain_batch
from .session.session import Session
from .session.timing import Stages
from .targets import Targets, read_targets
from .tuning import tuned_mask_batch


class Explainer:
    """Explains images with the programs of one bundle. May be used from several threads.

    backend: an opened backend; max_batch: the most images or targets in one run; precision: "fp32", "fp16", "int8" or
    "bf16" (ScoreCAM++ and Score-CAM run masked images so, all else is float32), by default the bundle's first;
    mask_batch: the most masked images in one run, by default what `tune` kept or max_batch on a CPU, and 64 on a GPU.
    session: runs the programs. InputError if max_batch or mask_batch is below 1 or the bundle does not have the
    precision.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        max_batch: int = 16,
        precision: str | None = None,
        mask_batch: int | None = None,
    ):
        self.precision = bundle.chosen_precision(precision, masks=True)
        if mask_batch is None and backend.gpu is None:
            mask_batch = tuned_mask_batch(bundle, backend, self.precision) or max_batch
        elif mask_batch is None:
            mask_batch = masks_on_gpu(max_batch, None)
        for name, value in (("max_batch", max_batch), ("mask_batch", mask_batch)):
            if value < 1:
                raise InputError(f"{name} {value}: use 1 or more")
        self.bundle = bundle
        self.backend = backend
        self.manifest: Manifest = bundle.manifest
        self.session = Session(bundle, backend, max_batch, mask_batch, self.precision)
        self._settings: tuple[int | None, int] = (None, 0)  # threads and device, as `load` took them

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the bundle's taps."""
        return tuple(t.name for t in self.manifest.taps)

    def classify(self, images: Any) -> np.ndarray:
        """Logits (B, classes) float32. images: as for `explain`. InputError, CamrtError."""
        pictures = ImageBatch(images, self.manifest)
        return self._within_memory(lambda: self.session.logits(self._placed(pictures)))

    def explain(
        self,
        images: Any,
        method: str = "winsor_cam",
        target: Any = None,
        layers: Sequence[str] | str | None = None,
        **options: Any,
    ) -> Explanation:
        """Maps that show which parts of an image raise the score of its target.

        images: float32 NCHW arrays or tensors, taken as they are; or paths, bytes of image files, file objects, Pillow
        images, uint8 or uint16 HWC arrays, which are preprocessed by the bundle's recipe. target: None (each image's
        top class), a class (its number or name), one per image (None: its top class), K per image (B, K), or a float
        seed array (classes,), (B, classes) or (B, K, classes): the cotangent of the logits. target="not", only for a
        network with a single score: explains what lowers it. layers: names, or a role ("conv", "last"); by default the
        method's own. options: the method's, e.g. percentile=90.

        InputError, UnknownMethod, UnknownLayer for arguments that do not fit; CamrtError if the network gives NaN or
        infinity or the GPU fails. An error in one image means no result for any image.
        """
        chosen, names = self._checked(method, layers, options)
        with self.session.stage("preprocess"):
            pictures = ImageBatch(images, self.manifest)
        targets = read_targets(target, len(pictures), self.manifest)
        masks = issubclass(chosen.data(options), MaskedRuns)
        return self._within_memory(lambda: self._explained(pictures, chosen, targets, names, options), masks)

    def check_arguments(
        self, method: str, target: Any, layers: Sequence[str] | str | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        """All options of the method for an `explain` of one image with these arguments. Errors as there, without an
        image.
        """
        chosen, _ = self._checked(method, layers, options)
        read_targets(target, 1, self.manifest)
        return chosen.options | options

    def _checked(
        self, method: str, layers: Sequence[str] | str | None, options: dict[str, Any]
    ) -> tuple[Method, tuple[str, ...]]:
        """The method and the names of its layers."""
        chosen = method_named(method)
        chosen.check_options(options)
        aggregation = str(options.get("gradient_aggregation", "mean"))
        if aggregation not in GRADIENT_AGGREGATIONS:
            raise UnknownMethod(f"gradient_aggregation {aggregation!r}: use {', '.join(GRADIENT_AGGREGATIONS)}")
        return chosen, chosen_layers(self.manifest, chosen, layers)

    def _explained(
        self, pictures: ImageBatch, method: Method, targets: Targets, names: Sequence[str], options: dict[str, Any]
    ) -> Explanation:
        with self.session.stage("preprocess"):
            images = self._placed(pictures)
        seeds = targets.seeds
        if method.seeds is not None:
            seeds = self._seeds_of(method, images, seeds, options)

        logits = np.empty((len(pictures), self.manifest.num_classes), np.float32)
        results = []
        by_image = method.data(options).by_image
        equal = self.backend.gpu is not None
        for batch in batches(images, seeds, by_image, self.session.max_batch, equal):
            result, found = explain_batch(self.session, method, batch, names, options)
            if batch.repeats:
                result = result.rows(slice(batch.repeats, None))
            if len(batch.images) > 1:
                found = found[batch.repeats :]
                logits[batch.first : batch.first + len(found)] = found
            else:
                logits[batch.first] = found[0]
            results.append(result)
        result = join(results)
        details = result.checked()
        if issubclass(method.data(options), LayerMaps):
            self._warn_of_noise(method.name, names, options)
        _warn_of_constant_maps(method.name, result, seeds.shape[1])

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
            layers=tuple(t.name for t in self.session.taps(names)),
            layer_weights=result.layer_weights.reshape(*leading, -1) if names else np.zeros((*leading, 0), np.float32),
            options=method.options | options,
            images=pictures,
            manifest=self.manifest,
            provenance=self.provenance,
            details={name: values.reshape(leading) for name, values in details.items()},
            _retune=result.retune,
        )

    def _warn_of_noise(self, method: str, names: Sequence[str], options: dict[str, Any]) -> None:
        """Names the layers whose alphas are rounding noise, and therefore count as zero."""
        aggregation = str(options.get("gradient_aggregation", "mean"))

        def found() -> list[str]:
            precision = self.session.program(Kind.LAYER_MAPS, names).precision
            return [t.name for t in self.session.taps(names) if noise_of(t, precision, aggregation).alone]

        layers = self.session.once(("alone", aggregation, *names), found)
        if layers:
            warn(
                f"{method}: zero counts instead of {', '.join(layers[:5])}{', ...' if len(layers) > 5 else ''}: the "
                "mean over the grid of the gradient there is zero by construction, as in front of an instance norm, "
                "and rounding alone would draw the map"
            )

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """What every explanation says of what made it. bundle_sha256: of its manifest, which holds all other hashes."""
        return {
            "camrt": __version__,
            "bundle": self.manifest.name,
            "bundle_sha256": self.bundle.sha256,
            "engine": str(self.backend),
            "precision": self.precision,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is a bundle's path and settings: the bundle is opened again where it is loaded."""
        path = str(self.bundle.path.resolve())
        batches = self.session.max_batch, self.session.mask_batch
        return _loaded_again, (path, self.backend.name, self.precision, *batches, *self._settings)

    def _placed(self, images: ImageBatch) -> Any:
        """The network's input, on the host or the GPU."""
        stream = self.session.memory.stream
        return images.on_host() if stream is None else images.on_gpu(stream)

    def _within_memory(self, work: Callable[[], Any], masks: bool = False) -> Any:
        """Returns work(). If the GPU's memory runs out, frees some or halves the batch, and tries again. CamrtError.

        masks: the work's largest runs are of masked images.
        """
        while True:
            try:
                with self.session.exclusive(halving=True):
                    return work()
            except OutOfMemory as error:
                problem = CamrtError(str(error))
            if not self.session.make_room(masks):
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
        return self._within_memory(lambda: self.session.memory.get(self.session.normalized(self._placed(pictures)))[0])

    def normalized_probabilities(self, normalized: np.ndarray) -> np.ndarray:
        """Probabilities (B, classes) of tensors (B, C', H, W) as `normalized` returns them, masked or not."""
        if self.manifest.normalized is None:
            return self.probabilities(normalized)
        return probabilities(self._within_memory(lambda: self.session.scored(normalized)), self.manifest)

    def _seeds_of(self, method: Method, images: Any, seeds: np.ndarray, options: dict[str, Any]) -> np.ndarray:
        """Seeds (B, K, classes) from the method's own `seeds` function, which needs the logits."""
        assert method.seeds is not None
        logits = np.repeat(self.session.exact_logits(images), seeds.shape[1], axis=0)
        given = top_class_where_zero(seeds.reshape(logits.shape), logits)
        return method.seeds(logits, given, **options).reshape(seeds.shape)


def _warn_of_constant_maps(method: str, result: Result, targets: int) -> None:
    """A constant map shows nothing. What a method's own check warns of, maps without a layer, is left to it."""
    maps = result.maps.reshape(len(result.maps), -1)
    constant = (maps == maps[:, :1]).all(axis=1)
    if result.check is not None:
        constant &= result.layer_weights.any(axis=1)
    if constant.any():
        images = np.unique(np.flatnonzero(constant) // targets)
        which = ", ".join(map(str, images[:5])) + (", ..." if len(images) > 5 else "")
        warn(
            f"{method}: the map of image {which} is constant, so it shows nothing: the score does not depend on where "
            "these layers are active, or its gradient is zero"
        )


def load(
    path: str | Path,
    backend: str = "auto",
    max_batch: int = 16,
    precision: str | None = None,
    threads: int | None = None,
    device: int = 0,
    progress: Callable[[str], None] = lambda _: None,
    mask_batch: int | None = None,
) -> Explainer:
    """Opens a bundle.

    path: the bundle's folder. backend: "tensorrt", "onnxruntime-cuda", "onnxruntime", or "auto": the first of these
    that works on this machine; or "openvino". max_batch: the most images or targets in one run. precision: "fp32",
    "fp16", or "int8" or "bf16" (ScoreCAM++ and Score-CAM run masked images so and say in `details` what that changed,
    all else is float32; bf16 needs OpenVINO and a CPU that has it, and no programs of its own), by default the first
    that the bundle has. threads: CPU threads of one run, by default one per core.
    device: the GPU's number. progress: called with one line of text before work that takes seconds, e.g. building an
    engine. mask_batch: the most masked images in one run, by default what `tune` kept or max_batch on a CPU, and 64 on
    a GPU.

    BundleError if the bundle is missing or damaged; BackendUnavailable if no backend can run it here; UnknownName for
    an unknown backend; InputError for a precision that the bundle does not have.
    """
    engine = create(backend, Settings(threads, device, max_batch, progress, masks_on_gpu(max_batch, mask_batch)))
    explainer = Explainer(read_bundle(path), engine, max_batch, precision, mask_batch)
    explainer._settings = threads, device
    return explainer


def _loaded_again(
    path: str, backend: str, precision: str, max_batch: int, mask_batch: int, threads: int | None, device: int
) -> Explainer:
    """What a pickled Explainer becomes."""
    return load(path, backend, max_batch, precision, threads, device, mask_batch=mask_batch)
