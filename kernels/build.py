"""Compiles the kernels for all supported GPUs: python -m camrt.kernels.build. Needs only nvcc."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "cuda"
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "11.0", "12.0")
OLDEST_CUDA = 12


class BuildError(RuntimeError):
    """nvcc is missing, too old, or refused a source. Its text is shown."""


def find_nvcc() -> str | None:
    """nvcc on the PATH or in CUDA_HOME."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def sources_hash() -> str:
    """Hash of all CUDA sources. build.json records it, so that old binaries are never run with new arguments."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.glob("*.cu*")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}".strip())
    return done.stdout + done.stderr


def options_of(*warnings: str) -> list[str]:
    """nvcc's options, without those for its output and its targets."""
    # fmad=false: only fmaf in the sources is fused, so results are the same as on the host
    return ["-std=c++17", "-O3", "--fmad=false", *warnings]


def known_architectures(nvcc: str) -> list[str]:
    """Those of ARCHITECTURES that this nvcc compiles for. BuildError."""
    supported = set(re.findall(r"compute_(\d+)", _run([nvcc, "--list-gpu-arch"])))
    return [a for a in ARCHITECTURES if a.replace(".", "") in supported]


def build(
    out: Path = SOURCES,
    architectures: Sequence[str] | None = None,
    nvcc: str | None = None,
    warnings: Sequence[str] = (),
) -> list[Path]:
    """Writes one fat binary per .cu, and build.json, into `out`.

    architectures: in ascending order, by default those of ARCHITECTURES that this nvcc knows. warnings: nvcc's options
    for them. BuildError.
    """
    nvcc = nvcc or find_nvcc()
    if nvcc is None:
        raise BuildError(f"no nvcc on the PATH or in CUDA_HOME: install the CUDA toolkit, {OLDEST_CUDA}.0 or later")
    release = re.search(r"release ([\d.]+)", _run([nvcc, "--version"]))
    version = release[1] if release else "0"
    if int(version.split(".")[0]) < OLDEST_CUDA:
        raise BuildError(f"{nvcc} is of CUDA {version}, needed {OLDEST_CUDA} or later")
    architectures = known_architectures(nvcc) if architectures is None else architectures
    targets = [(a.replace(".", ""), "sm") for a in architectures]
    targets.append((targets[-1][0], "compute"))  # PTX, which the driver compiles for newer GPUs
    codes = [f"-gencode=arch=compute_{a},code={kind}_{a}" for a, kind in targets]
    out.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        binary = out / f"{source.stem}.fatbin"
        unfinished = binary.with_suffix(f".{os.getpid()}.tmp")
        options = ["-fatbin", *options_of(*warnings), *codes]
        try:
            _run([nvcc, *options, "-o", str(unfinished), str(source)])
            unfinished.replace(binary)
        finally:
            unfinished.unlink(missing_ok=True)
        return binary

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        binaries = list(pool.map(compile_one, sorted(SOURCES.glob("*.cu"))))
    described = {"cuda": version, "architectures": list(architectures), "sources": sources_hash()}
    (out / "build.json").write_text(json.dumps(described) + "\n")
    return binaries


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m camrt.kernels.build", description=__doc__)
    parser.add_argument(
        "--architectures", nargs="+", help="compute capabilities, in ascending order (default: all that nvcc knows)"
    )
    parser.add_argument("--out", type=Path, default=SOURCES, help="folder (default: where the runtime looks)")
    arguments = parser.parse_args()
    try:
        for binary in build(arguments.out, arguments.architectures):
            print(f"{binary}  {binary.stat().st_size / 1024:.0f} KiB")
    except BuildError as error:
        print(f"build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
