"""Reads a bundle and refuses a damaged one."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BundleError, CamrtError, InputError
from .kinds import KINDS, Kind
from .manifest import MANIFEST, PRECISIONS, Manifest, Program, check_recipe, parse
from .onnx_check import check_program

_LONGEST = 1 << 26  # characters of a manifest


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every file was checked against its recorded hash."""

    path: Path
    manifest: Manifest
    _checked: set[str] = field(default_factory=set, compare=False)

    @property
    def precisions(self) -> list[str]:
        """Precisions that it can be run in, as users say it, float32 first."""
        classify = {p.precision for p in self.manifest.programs if p.kind == Kind.CLASSIFY}
        return [name for name, recorded in PRECISIONS.items() if recorded in classify]

    def file(self, program: Program) -> Path:
        """A program's file, for an engine to read. BundleError if it is not as camrt writes them."""
        path = self.path / program.file
        if program.file not in self._checked:
            weights = self.manifest.weights["file"]
            check_program(path, weights, (self.path / weights).stat().st_size)
            self._checked.add(program.file)
        return path

    def program(self, kind: str, layers: Sequence[str] = (), precision: str = "fp32") -> Program:
        """The smallest program of a kind that covers the layers, in a precision; in fp16 some kinds are float32 all
        the same.

        CamrtError if there is none.
        """
        fitting = [p for p in self.manifest.programs if p.kind == kind and set(layers) <= set(p.taps)]
        wanted = [p for p in fitting if p.precision == PRECISIONS[precision]]
        fitting = wanted or [p for p in fitting if p.precision == "float32"]
        if not fitting:
            of = f" for {', '.join(layers)}" if layers else ""
            raise CamrtError(f"{self.path}: has no program {str(kind)!r}{of}: {KINDS[kind].missing}")
        return min(fitting, key=lambda p: len(p.taps))


def read_bundle(path: str | Path) -> Bundle:
    """Opens a bundle folder. BundleError if it is missing, of another format, or any file is not as it was written."""
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
    """Puts another manifest in the place of a bundle's, at once. InputError if it does not hold together;
    BundleError.
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
        if not stat.S_ISREG(path.lstat().st_mode):  # a link leads out of the bundle, a pipe waits for ever
            raise BundleError(f"{path}: not a file of the bundle's own: export the bundle again")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}): export the bundle again") from None
