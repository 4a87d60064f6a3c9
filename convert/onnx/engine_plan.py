"""The vision engine of an artifact: whether one is built, for which GPU, and its two files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llava_edge.convert.onnx.tensorrt import build_vision_engine
from llava_edge.profiles.boards.engines import LIBRARIES, LibraryName, rtx_target
from llava_edge.profiles.boards.hardware import HardwareProfile
from llava_edge.profiles.errors import DependencyError, EngineError, RequestError
from llava_edge.profiles.memory.buffers import tiles_per_batch
from llava_edge.profiles.plan import DeploymentPlan
from llava_edge.profiles.plan_request import Engine
from llava_edge.runtime.artifact.hashing import hash_file
from llava_edge.runtime.artifact.manifest import FileEntry
from llava_edge.runtime.backends.engine_cache import (
    SCHEMA_VERSION,
    EngineFacts,
    engine_stem,
    facts_bytes,
)
from llava_edge.runtime.backends.tensorrt import TensorRTLibrary, open_library
from llava_edge.runtime.util.atomic_write import write_atomic
from llava_edge.runtime.util.progress import Progress

ON_DEVICE = "llava-edge build-engine"
NO_VIDEO_ENGINE = (
    "the tower of a video model runs in ONNX Runtime; no engine is built for a graph that pools "
    "frames. Leave --engine out."
)


@dataclass(frozen=True)
class EngineTarget:
    """What to build.

    Attributes:
        library: imported already, so that a missing one is noticed before work starts.
        compute_capability: of the GPUs that shall run it.
        device: the GPU model it is bound to; None where it is not.
        max_tiles: tiles that one run takes at most.
    """

    library: TensorRTLibrary
    compute_capability: str
    device: str | None
    max_tiles: int

    @property
    def unproven(self) -> bool:
        """Outside NVIDIA's support matrix of TensorRT-RTX."""
        return self.library.name == "tensorrt-rtx" and rtx_target(self.compute_capability) is None

    @property
    def key(self) -> list[object]:
        """What the engine's bytes depend on besides the graph."""
        library = self.library
        return [library.name, library.version, self.compute_capability, self.max_tiles]


def plan_engine(
    plan: DeploymentPlan, profile: HardwareProfile, asked: Engine, *, takes_video: bool = False
) -> tuple[DeploymentPlan, EngineTarget | None, tuple[str, ...]]:
    """Decide whether the artifact carries an engine.

    Args:
        plan: names the engine that shall run the tower.
        profile: the board.
        asked: what the request said; a library that nobody named may be missing.
        takes_video: the tower's graph pools frames as well, for which no engine is built.

    Returns:
        The plan (its engine is ``ort`` where none can be built), what to build, what to say of it.

    Raises:
        DependencyError: the library was named and is not installed.
        EngineError: the library was named and cannot be loaded.
        RequestError: the library was named and the model is one for video.
    """
    if takes_video and plan.engine in LIBRARIES:
        if asked != "auto":
            raise RequestError(f"engine {asked} was asked: {NO_VIDEO_ENGINE}")
        return replace(plan, engine="ort"), None, (NO_VIDEO_ENGINE,)
    if plan.engine == "tensorrt":
        note = (
            "TensorRT tunes an engine on the GPU that runs it, so the artifact carries none; on "
            f"the device run {ON_DEVICE} OUT once. Until then ONNX Runtime runs the tower."
        )
        return plan, None, (note,)
    if plan.engine != "tensorrt-rtx" or profile.compute_capability is None:
        return plan, None, ()
    try:
        library = open_library("tensorrt-rtx")
    except (DependencyError, EngineError) as error:
        if asked != "auto":
            raise
        note = f"no engine for {profile.name} is built, ONNX Runtime runs the tower: {error}"
        return replace(plan, engine="ort"), None, (note,)
    max_tiles = tiles_per_batch(profile.target, plan.max_tiles)
    return plan, EngineTarget(library, profile.compute_capability, None, max_tiles), ()


def write_vision_engine(
    onnx_file: Path,
    graph: Mapping[str, str],
    target: EngineTarget,
    folder: Path,
    report: Progress,
    timing_cache: Path | None = None,
) -> EngineFacts:
    """Build an engine and write it with its record.

    Args:
        onnx_file: the vision graph.
        graph: SHA-256 of the graph and its weights, by name in the artifact.
        target: what to build.
        folder: where both files go; it is created.
        report: told about steps.
        timing_cache: see ``build_vision_engine``.

    Raises:
        EngineError: the library refuses or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library = target.library
    stem = engine_stem(library.name, target.compute_capability)
    path = folder / f"{stem}.engine"
    build_vision_engine(
        onnx_file,
        library,
        target.max_tiles,
        path,
        report,
        compute_capability=_compiled_for(library.name, target.compute_capability),
        timing_cache=timing_cache,
    )
    facts = EngineFacts(
        schema_version=SCHEMA_VERSION,
        library=library.name,
        library_version=library.version,
        compute_capability=target.compute_capability,
        device=target.device,
        graph=dict(graph),
        max_tiles=target.max_tiles,
        unproven=target.unproven,
        file=FileEntry(path.stat().st_size, hash_file(path)),
    )
    write_atomic(path.with_suffix(".json"), facts_bytes(facts))
    return facts


def _compiled_for(library: LibraryName, compute_capability: str) -> str | None:
    """TensorRT has no choice of target: it builds for the GPU that is there."""
    return compute_capability if library == "tensorrt-rtx" else None
