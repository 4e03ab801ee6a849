"""Builds a TensorRT engine of a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...bundle.manifest import Program
from ...bundle.reading import Bundle
from ...errors import EngineError, first_line
from .bindings import Library, compute_capability_member, first_line_of, logger
from .target import Profile, Target

Progress = Callable[[str], None]


@dataclass
class BuiltEngine:
    """An engine's bytes, and what the library said while it built it: warnings, and for each profile the bytes of
    scratch memory that its largest run takes on the GPU (none if it did not say).
    """

    engine: bytes
    warnings: list[str] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)


def build_engine(
    library: Library,
    file: Path,
    program: Program,
    target: Target,
    profiles: Sequence[Profile],
    progress: Progress = lambda _: None,
) -> BuiltEngine:
    """Builds a program's engine with these optimization profiles; TensorRT for RTX needs no GPU for it.

    progress: called with the name of each step.

    float32 stays float32: TF32 is off. EngineError, with the failing ONNX node if the file cannot be parsed.
    """
    trt = library.trt
    log = logger(trt)
    try:
        builder = trt.Builder(log)
    except (RuntimeError, TypeError) as error:
        raise EngineError(
            f"{library.name} {library.version} cannot build here: {log.problem() or first_line(error)}"
        ) from error
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 has no other kind
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(file.read_bytes(), str(file)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        messages = [f"{e.node_operator() or 'node'} {e.node_name()!r}: {first_line_of(e.desc())}" for e in errors]
        raise EngineError(
            f"{file}: {library.name} {library.version} does not take it: {'; '.join(messages) or log.problem()}"
        )
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    resizing = getattr(trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10", None)
    if resizing is not None:  # small runs then take less scratch memory than the largest
        config.set_preview_feature(resizing, True)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # an engine that allocates during a run cannot be captured
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if library.ahead_of_time:
        config.num_compute_capabilities = 1
        config.set_compute_capability(compute_capability_member(library, target.capability), 0)
    for wanted in profiles:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            least, most = wanted.of_input(program.inputs[tensor.name])
            profile.set_shape(tensor.name, least, most, most)
        config.add_optimization_profile(profile)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if engine is None:
        raise EngineError(f"{file}: {library.name} {library.version} could not build it: {log.problem()}")
    return BuiltEngine(bytes(engine), list(log.warned), list(log.scratch))


def expected_size(bundle: Bundle, program: Program, profiles: Sequence[Profile]) -> int:
    """Bytes of a program's engine, about, before it is built.

    From the weights that the program reads and, for each profile, the code of its nodes. Fitted to 152 engines of
    TensorRT for RTX 1.7: half of the estimates are within 13 percent, the worst is 49 percent off.
    """
    weights, nodes = bundle.contents(program)
    half = program.precision == "float16"
    if "seed" in program.inputs and len(program.taps) > 1:  # most weights in two layouts
        share = 1.5 if half else 2.0
    else:
        share = 0.5 if half and "seed" not in program.inputs else 1.0
    return int(share * weights + len(profiles) * (350_000 + 12_000 * nodes))


def _monitor(trt: Any, progress: Progress) -> Any:
    """A progress monitor: reports the builder's phases; Ctrl-C ends the build at its next step."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self.steps: dict[str, int] = {}

        def _tell(self, text: str) -> None:
            try:
                progress(text)
            except KeyboardInterrupt:  # it must not pass through the library's C++ code
                self.interrupted = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(f"{phase_name} {step + 1}/{self.steps.get(phase_name, 0)}")
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()
