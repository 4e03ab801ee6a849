"""The number of masked images in one run that is quickest on this machine: measured when asked for, and kept."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import install
from .errors import CamrtError, InputError
from .user_cache import cache_folder

if TYPE_CHECKING:
    from .backends import Backend
    from .bundle.reading import Bundle
    from .explainer import Explainer

SIZES: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
MASKS = 64  # of one measurement
ROUNDS = 3  # of which the quickest counts


def tune(explainer: Explainer, progress: Callable[[str], None] = lambda _: None) -> dict[int, float]:
    """Measures ScoreCAM++'s masked images in runs of SIZES, {size: ms per mask}, and keeps the quickest size.

    Every later `load` of this bundle takes it as its mask_batch, on the same backend with as many threads, in the same
    precision, of the same user on the same machine; maps differ in their last bits from those before. `explainer` keeps
    its own. InputError on a GPU, and for a network that takes one image at a time; CamrtError if it cannot be kept.
    """
    session, manifest = explainer.session, explainer.manifest
    if explainer.backend.gpu is not None:
        raise InputError("on a GPU there is nothing to tune: mask_batch is 64, or less where memory does not suffice")
    if manifest.batch == 1:
        raise InputError(f"{manifest.name}: takes one image at a time (batch 1): there is nothing to tune")
    program = session.bundle.mask_program(explainer.precision, False)
    executable, ((name, shape),) = session.open_for_masks(program), program.inputs.items()
    images = np.random.default_rng(0).random((max(SIZES), *shape[1:]), dtype=np.float32).astype(program.input_dtype)

    def seconds(size: int) -> float:
        parts = [images[:size]] * (MASKS // size)
        started = time.perf_counter()
        session.lanes.map(lambda part: executable.run({name: part}), parts)
        return (time.perf_counter() - started) / MASKS

    for size in SIZES:
        progress(f"preparing runs of {size} masks")
        seconds(size)
    found = dict.fromkeys(SIZES, np.inf)
    for number in range(ROUNDS):
        for size in SIZES:
            progress(f"round {number + 1} of {ROUNDS}: runs of {size} masks")
            found[size] = min(found[size], 1e3 * seconds(size))
    _keep(_key(explainer.bundle, explainer.backend, explainer.precision), min(found, key=lambda size: found[size]))
    return found


def tuned_mask_batch(bundle: Bundle, backend: Backend, precision: str) -> int | None:
    """What `tune` kept; None where it never ran."""
    try:
        kept = _read(cache_folder() / "tuned.json")
    except CamrtError:  # no cache folder
        return None
    size = kept.get(_key(bundle, backend, precision)) if kept else None
    return size if type(size) is int and size in SIZES else None


def _key(bundle: Bundle, backend: Backend, precision: str) -> str:
    return f"{bundle.sha256} {precision} {backend} {install.processor()}"


def _read(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        return kept if isinstance(kept, dict) else {}
    return {}


def _keep(key: str, size: int) -> None:
    file = cache_folder() / "tuned.json"
    text = json.dumps(_read(file) | {key: size}, indent=1) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{os.getpid()}.{file.name}")
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        raise CamrtError(f"{file}: cannot be written ({error.strerror})") from None
