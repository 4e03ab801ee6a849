"""camrt build."""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.errors import EngineError, InputError, UnknownName, near
from .comparison_table import print_device_report
from .progress import Progress

if TYPE_CHECKING:
    from ..runtime.backends.tensorrt.bindings import Capability, Library
    from ..runtime.backends.tensorrt.target import Profile, Target
    from ..runtime.bundle.manifest import Program
    from ..runtime.bundle.reading import Bundle


HELP = "build TensorRT engines, for this GPU, where they are then checked, or ahead of time for others"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--compute-capability",
        nargs="+",
        metavar="X.Y",
        help="GPUs to build for, e.g. 8.6 8.9 12.0 (default: this one's)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        help="only the programs that run in it (default: all that the bundle has)",
    )
    parser.add_argument("--max-batch", type=int, default=16, help="images or targets in one run (default: 16)")
    parser.add_argument("--mask-batch", type=int, help="masked images in one run (default: 64, or --max-batch)")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be built, and about how much memory it takes"
    )
    parser.add_argument(
        "--programs",
        nargs="+",
        metavar="FILE",
        help="'all', or files as 'camrt info' lists them (default: those of winsor_cam and score_cam_pp)",
    )


def run(options: argparse.Namespace) -> int:
    from ..runtime.backends import masks_on_gpu
    from ..runtime.backends.tensorrt.bindings import find_library
    from ..runtime.backends.tensorrt.build import expected_size
    from ..runtime.backends.tensorrt.cache import EngineCache
    from ..runtime.backends.tensorrt.target import engine_key, profiles_of
    from ..runtime.bundle.reading import read_bundle

    masks = masks_on_gpu(options.max_batch, options.mask_batch)
    for name, value in (("max-batch", options.max_batch), ("mask-batch", masks)):
        if value < 1:
            raise InputError(f"--{name} {value}: use 1 or more")
    bundle = read_bundle(options.bundle)
    programs = _programs(bundle, options)
    library = find_library("tensorrt_rtx" if options.compute_capability else None)
    cache = EngineCache()
    warned: dict[str, None] = {}
    total = 0
    for target, program in itertools.product(targets(library, options.compute_capability), programs):
        profiles = profiles_of(bundle, program, options.max_batch, masks)
        key, started = engine_key(library, bundle, program, target, profiles), time.perf_counter()
        engine, how = cache.get(key), "was built before"
        if engine is not None:
            size = len(engine)
        elif options.dry_run:
            size, how = expected_size(bundle, program, profiles), "would be built (size estimated)"
        else:
            scratch: list[int] = []
            make = functools.partial(_make, library, bundle, program, target, profiles, warned, scratch)
            size = len(cache.fetch(key, make))
            how = f"built in {time.perf_counter() - started:.1f} s"
            if scratch:
                how += f"; scratch memory on the GPU {', '.join(f'{s / 1e6:.0f}' for s in scratch)} MB"
        total += size
        what = f"{program.file:26}{program.precision:9}{', '.join(map(str, profiles)):34}"
        print(f"{what}{target!s:26}{size / 1e6:8.1f} MB  {how}", flush=True)
    for warning in warned:
        print(f"{library.name} warns: {warning}")
    print(f"{library.name} {library.version}: {total / 1e6:.1f} MB in {cache.folder}")
    return 0 if options.dry_run or options.compute_capability else check_built(bundle, programs, options)


def check_built(bundle: Bundle, programs: Sequence[Program], options: argparse.Namespace) -> int:
    """Compares what the engines compute on this GPU with the bundle's references, if it has some."""
    from ..verification.device.check import check

    if bundle.manifest.references is None:
        print("The engines were not checked: the bundle has no references, which 'camrt export' stores.")
        return 0
    precisions = None if options.precision is None else [options.precision]
    files = {program.file for program in programs}
    with Progress() as progress:
        report = check(bundle.path, "tensorrt", precisions, files, options.max_batch, options.mask_batch, progress)
    return print_device_report(report, every=False)


def _make(
    library: Library,
    bundle: Bundle,
    program: Program,
    target: Target,
    profiles: Sequence[Profile],
    warned: dict[str, None],
    scratch: list[int],
) -> bytes:
    from ..runtime.backends.tensorrt.build import build_engine

    with Progress() as progress:
        progress(f"building {program.file} for {target}")
        built = build_engine(library, bundle.file(program), program, target, profiles, progress.detail)
    warned.update(dict.fromkeys(built.warnings))
    scratch += built.scratch
    return built.engine


def _programs(bundle: Bundle, options: argparse.Namespace) -> list[Program]:
    """The programs to build. InputError if the bundle lacks the precision, UnknownName for an unknown file."""
    from ..runtime.bundle.kinds import KINDS, Kind

    programs = list(bundle.manifest.programs)
    if options.precision is not None:
        programs = bundle.programs(bundle.chosen_precision(options.precision, masks=True))
    if options.programs is None:
        leading = [p for p in programs if KINDS[p.kind].engine]
        fewest_taps = min((len(p.taps) for p in leading if p.kind == Kind.ACTIVATIONS), default=0)
        return [p for p in leading if p.kind != Kind.ACTIVATIONS or len(p.taps) == fewest_taps]
    if options.programs == ["all"]:
        return programs
    program_by_file = {p.file: p for p in programs}
    for name in options.programs:
        if name not in program_by_file:
            raise UnknownName(f"{bundle.path} has no program {name!r}{near(name, list(program_by_file))}")
    return [program_by_file[name] for name in dict.fromkeys(options.programs)]


def targets(library: Library, wanted: list[str] | None) -> list[Target]:
    """The GPUs to build for: this machine's GPU, or every GPU of the named compute capabilities ("8.9").

    EngineError if there is no GPU here; InputError for a compute capability that the library does not know.
    """
    from ..runtime.backends.tensorrt.target import Target

    if wanted is None:
        from ..kernels import DeviceError
        from ..kernels.gpu.device import device

        try:
            card = device()
        except DeviceError as error:
            hint = (
                ", or name --compute-capability"
                if library.ahead_of_time
                else ": TensorRT builds engines only on the GPU that runs them"
            )
            raise EngineError(f"{error}{hint}") from None
        return [Target.of(library, card)]
    named_targets: list[Target] = []
    for text in dict.fromkeys(wanted):
        major, _, minor = text.partition(".")
        capability = (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
        if capability not in library.capabilities:
            capabilities = ", ".join(map(_dotted, library.capabilities))
            raise InputError(f"--compute-capability {text}: {library.name} {library.version} builds for {capabilities}")
        assert capability is not None
        named_targets.append(Target(capability, None))
    return named_targets


def _dotted(capability: Capability) -> str:
    return "{}.{}".format(*capability)
