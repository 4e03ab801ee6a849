"""Reads a bundle and refuses a damaged one."""

from __future__ import annotations

import functools
import hashlib
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BundleError, CamrtError, InputError
from .kinds import KINDS, Kind
from .manifest import MANIFEST, PRECISIONS, RUN_PRECISIONS, Manifest, Program, check_recipe, parse
from .onnx_check import check_program

_LONGEST = 1 << 26  # characters of a manifest


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. The hash of every file was compared with the manifest."""

    path: Path
    manifest: Manifest
    _checked: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False)  # file -> its `contents`

    @functools.cached_property
    def sha256(self) -> str:
        """Of its manifest, which holds the hashes of all other files."""
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    @property
    def precisions(self) -> list[str]:
        """The precisions that the bundle has, "fp32" and/or "fp16", fp32 first."""
        classify = {p.precision for p in self.manifest.programs if p.kind == Kind.CLASSIFY}
        return [name for name, recorded in PRECISIONS.items() if recorded in classify]

    @property
    def mask_precisions(self) -> list[str]:
        """`precisions`, and "int8" if masked images can run in it."""
        return [*self.precisions, *(["int8"] if any(p.precision == "int8" for p in self.manifest.programs) else [])]

    def chosen_precision(self, precision: str | None, masks: bool = False) -> str:
        """The precision, by default the bundle's first. masks: "int8" will do, where the bundle has it, and "bf16",
        where it has "fp32".

        InputError if the bundle does not have the precision.
        """
        known = self.mask_precisions if masks else self.precisions
        if precision == "bf16" and masks and "fp32" in known:
            return precision
        if precision is not None and precision not in known:
            raise InputError(
                f"{self.path} has no {precision} programs, it has {' and '.join(known)}: export it with "
                f"precision={precision!r} (--precision {precision})"
            )
        return precision or known[0]

    def file(self, program: Program) -> Path:
        """The path of a program's file, checked on first use. BundleError if it holds what camrt does not write."""
        path = self.path / program.file
        if program.file not in self._checked:
            weights = self.manifest.weights["file"]
            self._checked[program.file] = check_program(path, weights, (self.path / weights).stat().st_size)
        return path

    def contents(self, program: Program) -> tuple[int, int]:
        """(bytes of the bundle's weights that a program reads, how many nodes it has). BundleError as `file`."""
        self.file(program)
        return self._checked[program.file]

    def program(self, kind: str, layers: Sequence[str] = (), precision: str = "fp32") -> Program:
        """The program of a kind with the fewest taps that has all the layers.

        precision: "fp32", "fp16", "int8" or "bf16"; a kind that has no such program gives its float32 one. CamrtError
        if the bundle has none.
        """
        fitting = [p for p in self.manifest.programs if p.kind == kind and set(layers) <= set(p.taps)]
        in_precision = [p for p in fitting if p.precision == RUN_PRECISIONS[precision]]
        fitting = in_precision or [p for p in fitting if p.precision == "float32"]
        if not fitting:
            of = f" for {', '.join(layers)}" if layers else ""
            raise CamrtError(f"{self.path}: has no program {str(kind)!r}{of}: {KINDS[kind].missing}")
        return min(fitting, key=lambda p: len(p.taps))

    def programs(self, precision: str) -> list[Program]:
        """Every program that runs in a precision: its own, and the float32 ones that it does without its own."""
        own = [p for p in self.manifest.programs if p.precision == RUN_PRECISIONS[precision]]
        covered = {(p.kind, p.taps) for p in own}
        others = (p for p in self.manifest.programs if p.precision == "float32" and (p.kind, p.taps) not in covered)
        return sorted([*own, *others], key=self.manifest.programs.index)

    def mask_program(self, precision: str, on_gpu: bool) -> Program:
        """The program that scores masked images. On a CPU, which has no arithmetic of float16, "fp16" takes the one
        whose input is float32.
        """
        kind = Kind.CLASSIFY if self.manifest.normalized is None else Kind.SCORE
        exists = any(p.kind == Kind.MASKED and p.precision == RUN_PRECISIONS[precision] for p in self.manifest.programs)
        return self.program(Kind.MASKED if exists and (on_gpu or precision == "int8") else kind, (), precision)


def read_bundle(path: str | Path) -> Bundle:
    """Opens a bundle folder. BundleError if it is missing or of another format, or a file has changed since export."""
    path = Path(path)
    if not path.exists():
        raise BundleError(f"{path}: no such bundle: make one with 'camrt export'")
    if not (path / MANIFEST).is_file() or (path / MANIFEST).is_symlink():
        raise BundleError(f"{path}: not a bundle, it has no {MANIFEST}: make one with 'camrt export'")
    try:
        with (path / MANIFEST).open(encoding="utf-8") as file:
            text = file.read(_LONGEST)
        if len(text) == _LONGEST:
            raise BundleError(f"{path / MANIFEST}: too long for a manifest: export the bundle again")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path / MANIFEST}: cannot be read ({error}): export the bundle again") from None
    manifest = parse(text, str(path / MANIFEST))
    for file, digest in [
        (manifest.weights["file"], manifest.weights["sha256"]),
        *((p.file, p.sha256) for p in manifest.programs),
    ]:
        if _sha256(path / file) != digest:
            raise BundleError(
                f"{path / file}: damaged, its contents are not what was exported: export the bundle again"
            )
    return Bundle(path, manifest)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replaces a bundle's manifest in one step: a reader sees the old one or the new one.

    InputError if the manifest contradicts itself; BundleError if it cannot be written.
    """
    check_recipe(manifest.preprocess, manifest.input_shape)
    text = manifest.to_json()
    try:
        parse(text, str(path / MANIFEST))
    except BundleError as error:
        raise InputError(str(error).removesuffix(": export the bundle again")) from None
    beside = path / f".{MANIFEST}.new"
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path / MANIFEST)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise BundleError(f"{path / MANIFEST}: cannot be written ({error.strerror})") from None


def _sha256(path: Path) -> str:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a link may leave the bundle; reading a pipe never ends
            raise BundleError(f"{path}: not a file of the bundle's own: export the bundle again")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}): export the bundle again") from None
