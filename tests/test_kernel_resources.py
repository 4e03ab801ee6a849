"""What the compiler gives each kernel on each kind of GPU, and whether a launch fills a large one."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from emulator import SOURCES, Ledger

from camrt import kernels
from camrt.kernels.build import ARCHITECTURES, find_nvcc, options_of

REGISTERS = 65536  # of a multiprocessor, on all of them


class Multiprocessor(NamedTuple):
    """What the CUDA programming guide's table of compute capabilities says."""

    threads: int
    shared: int


MULTIPROCESSORS = {
    "7.5": Multiprocessor(1024, 64 << 10),
    "8.0": Multiprocessor(2048, 164 << 10),
    "8.6": Multiprocessor(1536, 100 << 10),
    "8.7": Multiprocessor(1536, 164 << 10),
    "8.9": Multiprocessor(1536, 100 << 10),
    "9.0": Multiprocessor(2048, 228 << 10),
    "10.0": Multiprocessor(2048, 228 << 10),
    "11.0": Multiprocessor(1536, 228 << 10),
    "12.0": Multiprocessor(1536, 100 << 10),
}
THREADS = {"layer_scales": 1024, "winsorize_short": 1024}  # of a block; of other kernels 256
OCCUPANCY = 0.5  # warps that are resident, of those that a multiprocessor can hold


class Used(NamedTuple):
    registers: int
    spilled: int
    shared: int


def compiled(source: Path, architecture: str, folder: Path) -> dict[str, Used]:
    """What ptxas says of each kernel."""
    nvcc = find_nvcc()
    assert nvcc is not None
    out = folder / f"{source.stem}.{architecture}.cubin"
    target = f"-arch=sm_{architecture.replace('.', '')}"
    command = [nvcc, "-cubin", *options_of(), target, "-Xptxas", "-v", "-o", str(out), str(source)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {}
    for part in said.split("Function properties for ")[1:]:
        name, numbers = part.split(None, 1)
        spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", numbers)]
        registers, shared = re.search(r"Used (\d+) registers", numbers), re.search(r"(\d+) bytes smem", numbers)
        assert registers is not None and len(spilled) == 2
        found[name] = Used(int(registers[1]), max(spilled), int(shared[1]) if shared else 0)
    return found


def occupancy(used: Used, threads: int, there: Multiprocessor) -> float:
    """Registers are given out to warps in units of 256, shared memory to blocks with 1 KiB of the system's own."""
    warp = -(-used.registers * 32 // 256) * 256
    most = min(there.threads // threads, REGISTERS // (warp * threads // 32), there.shared // (used.shared + 1024))
    return most * threads / there.threads


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc: the kernels' registers are not counted")
def test_no_kernel_spills_or_leaves_a_multiprocessor_half_empty(tmp_path: Path) -> None:
    assert set(MULTIPROCESSORS) == set(ARCHITECTURES)
    todo = [(source, a) for source in sorted(SOURCES.glob("*.cu")) for a in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compiled(job[0], job[1], tmp_path), todo))
    bad, seen = [], set()
    for (_, architecture), found in zip(todo, results, strict=True):
        for kernel, used in found.items():
            share = occupancy(used, THREADS.get(kernel, 256), MULTIPROCESSORS[architecture])
            seen.add(kernel)
            if used.spilled or used.shared > 48 << 10 or share < OCCUPANCY:
                bad.append(f"{kernel} on {architecture}: {used}, occupancy {share:.2f}")
    assert len(seen) > 15 and not bad, "\n".join(bad)


def test_launches_fill_a_large_gpu() -> None:
    """132 multiprocessors, several blocks each, at the sizes of ScoreCAM++ on 16 masks of 224 x 224 pixels."""
    queue = Ledger()
    image, maps = queue.empty((3, 224, 224)), queue.empty((16, 7, 7))
    kernels.mask_batch(image, maps, stream=queue)
    kernels.accumulate_maps(queue.empty((1, 224, 224)), queue.empty((1, 16)), maps, stream=queue)
    blocks = {launch.kernel: int(np.prod(launch.grid)) for launch in queue.launched}
    assert blocks["mask_batch_f32_wide"] >= 4 * 132 and blocks["accumulate_maps_wide"] >= 4 * 132, blocks
