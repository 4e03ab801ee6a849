"""Writes a bundle: a folder with manifest.json, one ONNX file a program and one weights file that they share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..runtime.bundle.manifest import MANIFEST, WEIGHTS, Manifest, Program
from ..runtime.errors import BundleError, first_line
from .folder import whole_folder
from .programs import BuiltProgram

_INLINE_BYTES = 1024  # smaller constants stay inside the program
_ALIGNMENT = 4096  # a memory-mapped tensor starts on a page


class WeightsFile:
    """Appends each distinct tensor once; equal bytes share one place."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("wb")
        self._places: dict[bytes, tuple[int, int]] = {}
        self._digest = hashlib.sha256()
        self._known: dict[int, tuple[object, bytes]] = {}

    def add(self, tensor: Any) -> tuple[int, int]:
        """(offset, length) of the tensor's bytes."""
        entry = self._known.get(id(tensor))
        key = entry[1] if entry else None
        if key is None:
            data = memoryview(tensor.numpy().reshape(-1).view("uint8"))
            key = hashlib.sha256(data).digest()
            self._known[id(tensor)] = (tensor, key)
            if key not in self._places:
                self._write(b"\0" * (-self._file.tell() % _ALIGNMENT))
                self._places[key] = (self._file.tell(), len(data))
                self._write(data)
        return self._places[key]

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> dict[str, Any]:
        size = self._file.tell()
        self._file.close()
        return {"file": self._path.name, "sha256": self._digest.hexdigest(), "bytes": size}


def write_bundle(
    path: str | Path,
    manifest: Manifest,
    programs: Sequence[BuiltProgram],
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    check: Callable[[Path, Manifest], Manifest] = lambda folder, manifest: manifest,
) -> Path:
    """Writes into a hidden folder beside `path`, then moves it to `path`, which never holds an incomplete bundle.

    `manifest`: without programs and weights, which are filled in here. check(folder, manifest): returns the manifest
    with what it measured; raises if the bundle must not be moved to `path`. BundleError if `path` exists (and may not
    be overwritten, or is not a bundle) or cannot be written.
    """
    path = Path(path)
    check_target(path, overwrite)
    try:
        with whole_folder(path.resolve() if path.is_symlink() else path, overwrite) as folder:
            progress("writing the weights")
            weights = WeightsFile(folder / WEIGHTS)
            written = []
            for built in programs:
                _externalise(built.model, weights)
                data = ir.to_proto(built.model).SerializeToString()
                (folder / built.file).write_bytes(data)
                written.append(
                    Program(
                        kind=built.kind,
                        file=built.file,
                        sha256=hashlib.sha256(data).hexdigest(),
                        taps=built.taps,
                        inputs={str(v.name): _shape(v) for v in built.model.graph.inputs},
                        outputs={str(v.name): _shape(v) for v in built.model.graph.outputs},
                        precision=built.precision,
                    )
                )
            complete = replace(manifest, programs=tuple(written), weights=weights.close())
            (folder / MANIFEST).write_text(check(folder, complete).to_json(), encoding="utf-8")
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error.strerror}): free space or choose another path") from None
    return path


def check_target(path: Path, overwrite: bool) -> None:
    """BundleError if `path` exists and may not be overwritten, is not a bundle, or holds other files, too; or if it
    cannot exist.
    """
    if any(parent.exists() and not parent.is_dir() for parent in path.parents):
        raise BundleError(f"{path}: cannot be written (a file is where its folder would be): choose another path")
    if path.exists() or path.is_symlink():
        if not overwrite:
            raise BundleError(f"{path}: exists already: choose another path, or overwrite=True (--force)")
        if not (path / MANIFEST).is_file():
            raise BundleError(f"{path}: exists and is not a bundle: choose another path")
        others = sorted({f.name for f in path.iterdir()} - _own_files(path))
        if others:
            raise BundleError(f"{path}: holds {others[0]!r}, which is not of the bundle: move it to another folder")


def _own_files(path: Path) -> set[str]:
    """The names of a bundle's files, by its manifest."""
    try:
        said = json.loads((path / MANIFEST).read_bytes())
        files = [p["file"] for p in said["programs"]] + [said["weights"]["file"]]
        files += [said["references"]["file"]] if said.get("references") else []
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise BundleError(f"{path}: exists and is not a bundle ({first_line(error)}): choose another path") from None
    return {MANIFEST, *files}


def _externalise(model: ir.Model, weights: WeightsFile) -> None:
    """Replaces every sizeable initializer by a reference into the weights file."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes < _INLINE_BYTES:
            if isinstance(tensor, ir.ExternalTensor):  # it lies beside the model that was exported
                value.const_value = ir.tensor(tensor.numpy(), name=str(name))
            continue
        offset, length = weights.add(tensor)
        value.const_value = ir.ExternalTensor(
            WEIGHTS, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=str(name)
        )


def _shape(value: ir.Value) -> list[Any]:
    assert value.shape is not None
    return [d if isinstance(d, int) else str(d.value) for d in value.shape]
