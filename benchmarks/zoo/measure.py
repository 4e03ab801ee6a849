"""Exports and verifies every network of a folder, and writes the result of each.

python benchmarks/zoo/measure.py FOLDER [--only WORD ...] [--out docs/models.json]

Files are named NETWORK@EXPORTER@OPSET@BATCH[@HxW].onnx; folders hf-NAME hold a Hugging Face model. A line is printed
for each, and written at once: an interrupted run keeps what it has. Needs the test extra, and transformers for the
folders.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support import import_torchvision

import camrt
from camrt.export.probes import as_pixels, smooth_images
from camrt.verification.verify import verify


def measured(source: Path, work: Path) -> dict[str, Any]:
    """The result of exporting and verifying one network: a row of docs/models.json."""
    row, bundle = described(source), work / "network.camrt"
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            export(source, bundle)
            manifest = camrt.load(bundle, backend="onnxruntime").manifest
            row |= {"batch": manifest.batch, "last": manifest.last_layer, "layers": len(manifest.taps)}
            row["export_seconds"] = round(time.perf_counter() - started, 1)
            images = smooth_images(manifest.input_shape)
            if row["exporter"] == "tf2onnx":  # Keras's networks take pixels
                images = as_pixels(images)
            report = verify(bundle, f"hf:{source}" if source.is_dir() else None, images, backend="onnxruntime")
            failed = [
                r.problem or f"{r.subject} ({r.distance:.1g}, of PyTorch's float32 {r.torch_float32:.1g})"
                for r in report.rows
                if not r.passed
            ]
            row |= {"comparisons": len(report.rows), "failed": failed}
        except camrt.CamrtError as error:
            row["refused"] = str(error).replace(str(source), source.name)
    row["said"] = [str(w.message) for w in said if w.category is UserWarning]
    return row


def described(source: Path) -> dict[str, Any]:
    if source.is_dir():
        return {"network": source.name, "exporter": "camrt export hf:", "opset": None}
    name, exporter, opset, batch, *_ = source.stem.split("@")
    return {"network": name, "exporter": exporter, "opset": int(opset), "batch_in_file": batch}


def export(source: Path, bundle: Path) -> None:
    """As `camrt export` does."""
    if source.is_dir():
        from camrt.export.pytorch.sources import open_source

        opened = open_source(f"hf:{source}")
        assert opened.input_shape is not None
        camrt.export_model(
            opened.model,
            bundle,
            opened.input_shape,
            output=opened.output,
            classes=opened.classes,
            preprocess=opened.preprocess,
            source=opened.spec,
        )
        return
    sizes = source.stem.split("@")[4:]
    shape = (3, *map(int, sizes[0].split("x"))) if sizes else None
    camrt.export_onnx(source, bundle, input_shape=shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    import_torchvision()
    sources = sorted([*given.folder.glob("*.onnx"), *given.folder.glob("hf-*")])
    rows = []
    for source in sources:
        if given.only and not any(word in source.name for word in given.only):
            continue
        with tempfile.TemporaryDirectory() as work:
            row = measured(source, Path(work))
        rows.append(row)
        result = row.get("refused") or (
            f"failed: {row['failed']}" if row["failed"] else f"{row['comparisons']} comparisons pass"
        )
        print(f"{source.name}: {result}", flush=True)
        if given.out is not None:
            given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
