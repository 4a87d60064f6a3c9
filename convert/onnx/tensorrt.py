"""Building a vision engine: an ONNX file and a target become a serialised TensorRT plan.

Strongly typed: every tensor keeps the type that the ONNX file gives it, so a float16 file makes a
float16 engine and Q/DQ nodes make int8 or FP8 ones; there are no precision flags. TensorRT-RTX
compiles for any target without a GPU; TensorRT tunes on the GPU that will run the engine.

Needs neither torch nor onnx, so it runs on devices as well.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from llava_edge.profiles.boards.engines import RTX_CAPABILITIES, RTX_UNPROVEN, rtx_target
from llava_edge.profiles.errors import EngineError, RequestError
from llava_edge.runtime.backends.tensorrt import PIXELS, TensorRTLibrary, one_line
from llava_edge.runtime.util.atomic_write import write_atomic
from llava_edge.runtime.util.progress import Progress

STAGE = "engine"


def build_vision_engine(
    onnx_file: Path,
    library: TensorRTLibrary,
    max_tiles: int,
    out: Path,
    report: Progress,
    *,
    compute_capability: str | None = None,
    timing_cache: Path | None = None,
) -> None:
    """Build one engine.

    Args:
        onnx_file: the vision graph; its weights lie beside it.
        library: which TensorRT builds.
        max_tiles: the optimisation profile holds 1 to this many tiles and is tuned for the most.
        out: where the plan is written; it appears whole or not at all.
        report: told about steps of the build.
        compute_capability: target of TensorRT-RTX, such as ``8.9``; None for the GPU in this
            machine, which is all that TensorRT can build for.
        timing_cache: file that keeps measured kernels between builds of TensorRT. TensorRT-RTX
            measures nothing.

    Raises:
        RequestError: the target is none of the library's.
        EngineError: the library refuses the graph or fails.
    """
    trt = library.module
    target = _target(library, compute_capability)
    library.messages.clear()
    builder = trt.Builder(library.logger)
    if builder is None:
        raise _failure(library, "cannot start its builder")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, library.logger)
    if not parser.parse_from_file(os.fspath(onnx_file)):
        faults = [one_line(parser.get_error(i).desc()) for i in range(parser.num_errors)]
        raise EngineError(f"{library} cannot read {onnx_file}: {'; '.join(faults)[:300]}.")
    config = builder.create_builder_config()
    _add_profile(library, builder, config, network, max_tiles)
    if target is not None:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, target), 0):
            raise _failure(library, f"does not take {target} as its target")
    monitor = _monitor(trt, report)
    config.progress_monitor = monitor
    timed = timing_cache if library.name == "tensorrt" else None
    if timed is not None:
        _load_timing_cache(config, timed)
    plan = builder.build_serialized_network(network, config)
    if monitor.interrupted is not None:
        raise monitor.interrupted
    if plan is None:
        raise _failure(library, f"cannot build an engine of {onnx_file}")
    write_atomic(out, memoryview(plan))
    if timed is not None:
        timed.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(timed, memoryview(config.get_timing_cache().serialize()))
    report(STAGE, monitor.total, monitor.total)


def _target(library: TensorRTLibrary, compute_capability: str | None) -> str | None:
    if compute_capability is None:
        return None
    if library.name != "tensorrt-rtx":
        raise RequestError(
            f"an engine for compute capability {compute_capability} was asked; {library} builds "
            "for the GPU of the machine it runs on only. Build on the device: llava-edge "
            "build-engine."
        )
    target = rtx_target(compute_capability, unproven=True)
    if target is None or not hasattr(library.module.ComputeCapability, target):
        raise RequestError(
            f"an engine for compute capability {compute_capability} was asked; {library} compiles "
            f"for {', '.join(sorted((*RTX_CAPABILITIES, *RTX_UNPROVEN), key=float))}. Leave "
            "--engine out; ONNX Runtime runs the tower there."
        )
    return target


def _add_profile(
    library: TensorRTLibrary, builder: Any, config: Any, network: Any, max_tiles: int
) -> None:
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    if set(inputs) != {PIXELS}:
        raise EngineError(f"the graph takes {', '.join(inputs)[:200]}; a tower takes {PIXELS}.")
    tile = tuple(inputs[PIXELS].shape)[1:]
    profile = builder.create_optimization_profile()
    most = (max_tiles, *tile)
    profile.set_shape(PIXELS, (1, *tile), most, most)
    if config.add_optimization_profile(profile) < 0:
        raise _failure(library, f"refuses a profile of 1 to {max_tiles} tiles")


def _monitor(trt: Any, report: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the library has no types
        """Counts finished steps; phases announce theirs as they begin, from several threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.done = self.total = 0
            self.interrupted: BaseException | None = None
            self._lock = threading.Lock()

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            with self._lock:
                self.total += num_steps

        def step_complete(self, phase: str, step: int) -> bool:
            with self._lock:
                self.done += 1
                try:
                    report(STAGE, min(self.done, self.total), self.total)
                # An exception must not travel through the library; no ends the build.
                except BaseException as error:
                    self.interrupted = error
            return self.interrupted is None

        def phase_finish(self, phase: str) -> None:
            return None

    return Monitor()


def _load_timing_cache(config: Any, path: Path) -> None:
    known = path.read_bytes() if path.is_file() else b""
    # A cache of another GPU or version is refused, and then begun anew.
    if not known or not config.set_timing_cache(config.create_timing_cache(known), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _failure(library: TensorRTLibrary, what: str) -> EngineError:
    return EngineError(f"{library} {what}: {library.reason('no reason given')}.")
