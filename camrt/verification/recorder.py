"""What an oracle gives for all layers of a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.probes import last_bits
from ..runtime.backends.cpu import give_back_freed
from ..runtime.bundle.kinds import Kind
from ..runtime.bundle.manifest import Tap
from ..runtime.bundle.reading import Bundle
from ..runtime.errors import CamrtError
from .oracle import Oracle, norms_in_graph, own_forward, own_graph

if TYPE_CHECKING:
    from ..export.pytorch.autograd import Record

FLOAT32_RUNS = 8  # samples of PyTorch float32's own distance from float64


class Recorder:
    """Records every layer as it is, and every layer behind the norm that follows it, if one does.

    batch: images like those that are recorded later; seed: the cotangent of their logits (B, classes).
    """

    def __init__(self, bundle: Bundle, oracle: Oracle, batch: np.ndarray, seed: np.ndarray) -> None:
        self._taps = bundle.manifest.taps
        self._seed = seed
        model, own = own_forward(bundle)
        normed = [bundle.manifest.tap(layer) for layer in norms_in_graph(model.graph, own)]
        norms = oracle.norms(batch, normed)
        self._oracle = self._of_norms = oracle
        if norms is None:  # not all of them are batch norm modules
            self._of_norms = own_graph(bundle)
            norms = self._of_norms.norms(batch, normed)
            assert norms is not None
        self._behind = [norms.get(t.name, t) for t in self._taps]
        together = [*norms.values()] if self._of_norms is oracle else []
        self._names = [t.name for t in self._taps] + [t.name for t in together]

    def __call__(self, images: np.ndarray, precise: bool) -> tuple[Record, Record]:
        """(layers, layers behind their norms), both under the layers' names, as maps (B, K, h, w)."""
        return self._record(images, self._seed, precise)

    def stored(self, images: np.ndarray, folder: Path) -> tuple[Record, Record]:
        """As the call, in float64 and with one image at a time; the tensors are in files of the folder."""
        stores = [_Stored(folder, f"{number}", len(images)) for number in range(4)]
        logits = []
        for row in range(len(images)):
            one = slice(row, row + 1)
            records = self._record(images[one], self._seed[one], True)
            logits.append(records[0].logits)
            tensors = [part for record in records for part in (record.activations, record.gradients)]
            for store, part in zip(stores, tensors, strict=True):
                store.put(row, part)
            del records, tensors
            give_back_freed()
        return _record_of(logits, *stores[:2]), _record_of(logits, *stores[2:])

    def _record(self, images: np.ndarray, seed: np.ndarray, precise: bool) -> tuple[Record, Record]:
        recorded = behind = self._oracle.record(images, seed, self._names, precise)
        if self._of_norms is not self._oracle:
            behind = self._of_norms.record(images, seed, [t.name for t in self._behind], precise)
        return self._picked(recorded, self._taps), self._picked(behind, self._behind)

    def singles(self, images: np.ndarray, units: float) -> Iterator[tuple[Record, Record]]:
        """FLOAT32_RUNS records in float32, of images that differ in their last bits by about `units`."""
        for changed in last_bits(images, FLOAT32_RUNS, units):
            records = self(changed, False)
            give_back_freed()
            yield records
            del records

    def _picked(self, recorded: Record, chosen: Sequence[Tap]) -> Record:
        from ..export.pytorch.autograd import Record, as_maps

        parts = recorded.activations, recorded.gradients
        a, g = ({t.name: part[t.name] for t in chosen} for part in parts)
        maps = as_maps(Record(recorded.logits, a, g), chosen)
        a, g = (
            {t.name: part[c.name] for t, c in zip(self._taps, chosen, strict=True)}
            for part in (maps.activations, maps.gradients)
        )
        return Record(maps.logits, a, g)


class _Stored(Mapping[str, Any]):
    """Tensors (B, ...) by name, in files: in float64 those of a whole network may not fit into memory. Each look-up
    opens its file, whose pages are in memory as long as the tensor that it returns.
    """

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self._start = folder / name
        self._count = count
        self._files: dict[str, Path] = {}

    def put(self, row: int, tensors: Mapping[str, Any]) -> None:
        """Stores the tensors (1, ...) of one image, row after row. CamrtError if they cannot be written."""
        for name, tensor in tensors.items():
            path = self._files.setdefault(name, Path(f"{self._start}-{len(self._files)}.npy"))
            values = np.ascontiguousarray(tensor.numpy())
            try:
                with path.open("ab") as file:  # not by a memory map, which ends the process where the disk is full
                    if row == 0:
                        shape = self._count, *values.shape[1:]
                        described = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, described)
                    file.write(values.data)
            except OSError as error:
                raise CamrtError(
                    f"{path.parent}: {error.strerror or error}: the float64 tensors of all layers lie there while they "
                    "are compared: let TMPDIR name a folder with more room"
                ) from None

    def __getitem__(self, name: str) -> Any:
        import torch

        return torch.from_numpy(np.load(self._files[name], mmap_mode="c"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _record_of(logits: Sequence[Any], activations: Mapping[str, Any], gradients: Mapping[str, Any]) -> Record:
    import torch

    from ..export.pytorch.autograd import Record

    return Record(torch.cat(list(logits)), activations, gradients)


def seeds_for(oracle: Oracle, batch: np.ndarray, classes: int, layers: Sequence[str]) -> np.ndarray:
    """Seeds (B, classes): +1 for the top class of each image; from the second image on also -1 for its second class."""
    seed = np.zeros((len(batch), classes), np.float32)
    for i in range(len(batch)):
        (row,) = oracle.record(batch[i : i + 1], seed[i : i + 1], layers[-1:], True).logits.numpy()
        order = row.argsort()
        seed[i, order[-1]] = 1
        if i and classes > 1:
            seed[i, order[-2]] = -1
    return seed


def is_quantised(bundle: Bundle) -> bool:
    """Whether the network's activations are quantised: its forward pass has QuantizeLinear nodes."""
    import onnx_ir as ir

    graph = ir.load(bundle.file(bundle.program(Kind.ACTIVATIONS))).graph  # float32 in every precision
    return any(node.op_type == "QuantizeLinear" for node in graph)
