"""What the compiler gives each kernel on each kind of GPU, and whether launches fill a large one."""

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
from camrt.kernels.build import ARCHITECTURES, find_nvcc, known_architectures, options_of

REGISTERS = 65536  # of a multiprocessor, on all of them


class Multiprocessor(NamedTuple):
    """What the CUDA programming guide's table of compute capabilities says; reserved: shared memory of each block."""

    threads: int
    shared: int
    reserved: int = 1024


MULTIPROCESSORS = {
    "7.5": Multiprocessor(1024, 64 << 10, 0),
    "8.0": Multiprocessor(2048, 164 << 10),
    "8.6": Multiprocessor(1536, 100 << 10),
    "8.7": Multiprocessor(1536, 164 << 10),
    "8.9": Multiprocessor(1536, 100 << 10),
    "9.0": Multiprocessor(2048, 228 << 10),
    "10.0": Multiprocessor(2048, 228 << 10),
    "11.0": Multiprocessor(1536, 228 << 10),
    "12.0": Multiprocessor(1536, 100 << 10),
}
OCCUPANCY = 0.5  # at least: threads that are resident, of those that a multiprocessor can hold
MOST_REGISTERS = {  # of a thread; 64 are half of a multiprocessor's threads, where it has 2048
    **dict.fromkeys(("mask_batch_f32", "mask_batch_f32_wide", "mask_batch_f16", "mask_batch_f16_wide"), 64),
    **dict.fromkeys(("accumulate_maps", "accumulate_maps_wide", "resized_extremes", "fuse_layers", "resize_axis"), 64),
    "": 56,  # other kernels
}


class Used(NamedTuple):
    registers: int
    local: int  # bytes of memory for what is not in registers, spilled or not
    shared: int  # bytes, without those that a launch adds


def compiled(source: Path, architectures: list[str], folder: Path) -> dict[tuple[str, str], Used]:
    """What ptxas says of each kernel on each architecture."""
    nvcc = find_nvcc()
    assert nvcc is not None
    numbers = {a.replace(".", ""): a for a in architectures}
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    command = [nvcc, "-fatbin", *options_of(), *codes, "-Xptxas", "-v", "-o", str(folder / source.stem), str(source)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {}
    for part in said.split("Compiling entry function ")[1:]:
        entry = re.match(r"'(\w+)' for 'sm_(\d+)'", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        local = re.findall(r"(\d+) bytes (?:stack frame|spill)", part)
        assert entry is not None and registers is not None and len(local) == 3, part
        used = Used(int(registers[1]), max(map(int, local)), int(shared[1]) if shared else 0)
        found[entry[1], numbers[entry[2]]] = used
    return found


def block_sizes(on: Multiprocessor) -> dict[str, set[tuple[int, int]]]:
    """Kernel -> (threads, bytes of shared memory that the launch adds), where these are not (256, 0)."""
    queue = Ledger()
    queue.shared_limit = on.shared - on.reserved
    for length in (49, 4096, 4097, 112 * 112, 22_000, 50_000):
        kernels.winsorize(queue.empty((64, length)), 90, stream=queue)
    layers = queue.empty((1, 49)), [(7, 7)], queue.empty((1, 1)), (224, 224)
    kernels.fuse_layers(*layers, normalize=True, stream=queue)
    sizes: dict[str, set[tuple[int, int]]] = {}
    for launch in queue.launched:
        sizes.setdefault(launch.kernel, set()).add((launch.threads, launch.shared))
    return sizes


def occupancy(used: Used, threads: int, shared: int, on: Multiprocessor) -> float:
    """Registers are given out to warps in units of 256."""
    warp = -(-used.registers * 32 // 256) * 256
    blocks = [on.threads // threads, REGISTERS // (warp * threads // 32)]
    if used.shared + shared:
        blocks.append(on.shared // (used.shared + shared + on.reserved))
    return min(blocks) * threads / on.threads


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc: the kernels' registers are not counted")
def test_no_kernel_spills_or_leaves_a_multiprocessor_half_empty(tmp_path: Path) -> None:
    assert set(MULTIPROCESSORS) == set(ARCHITECTURES)
    nvcc = find_nvcc()
    assert nvcc is not None
    architectures = known_architectures(nvcc)
    sizes = {a: block_sizes(MULTIPROCESSORS[a]) for a in architectures}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda source: compiled(source, architectures, tmp_path), sorted(SOURCES.glob("*.cu")))
    bad, seen = [], set()
    for (kernel, architecture), used in (item for found in results for item in found.items()):
        seen.add(kernel)
        most = MOST_REGISTERS.get(kernel, MOST_REGISTERS[""])
        if used.registers > most or used.local or used.shared > 48 << 10:
            bad.append(f"{kernel} on {architecture}: {used}, at most {most} registers and none outside")
        for threads, shared in sizes[architecture].get(kernel, {(256, 0)}):
            share = occupancy(used, threads, shared, MULTIPROCESSORS[architecture])
            if share < OCCUPANCY:
                bad.append(f"{kernel} on {architecture}, {threads} threads and {shared} bytes: occupancy {share:.2f}")
    assert len(seen) > 15 and seen >= set(MOST_REGISTERS) - {""} and not bad, "\n".join(bad)


@pytest.mark.parametrize("count", [16, 64, 512])
def test_launches_fill_a_large_gpu(count: int) -> None:
    """Four blocks for each of 132 multiprocessors, at the sizes of ScoreCAM++ on pictures of 224 x 224 pixels."""
    queue = Ledger()
    image, maps = queue.empty((3, 224, 224)), queue.empty((count, 7, 7))
    for dtype in (np.float32, np.float16):
        kernels.mask_batch(image, maps, out=queue.empty((count, *image.shape), dtype), stream=queue)
    kernels.accumulate_maps(queue.empty((1, 224, 224)), queue.empty((1, count)), maps, "minmax", stream=queue)
    grids = {launch.kernel: int(np.prod(launch.grid)) for launch in queue.launched}
    strips = "mask_batch_f32_wide", "mask_batch_f16_wide", "accumulate_maps_wide"
    assert all(grids[kernel] >= 4 * 132 for kernel in strips), grids
    assert grids["resized_extremes"] >= 3 * 132, grids  # a map has rows for 28 blocks
