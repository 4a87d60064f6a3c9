"""The half of ``llava-edge build-engine`` that opens the GPU and builds."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llava_edge.convert.onnx.engine_plan import NO_VIDEO_ENGINE, EngineTarget, write_vision_engine
from llava_edge.profiles.boards.engines import LIBRARIES, LibraryName, rtx_target
from llava_edge.profiles.command_line import wrapped
from llava_edge.profiles.errors import (
    ArtifactError,
    DependencyError,
    EngineError,
    LlavaEdgeError,
    RequestError,
)
from llava_edge.profiles.memory.buffers import tiles_per_batch
from llava_edge.profiles.sizes import format_bytes
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.backends.cuda_runtime import CudaRuntime
from llava_edge.runtime.backends.engine_cache import (
    EngineFacts,
    Surroundings,
    built_engine,
    built_engine_path,
    graph_digests,
)
from llava_edge.runtime.backends.tensorrt import TensorRTLibrary, open_library
from llava_edge.runtime.util.cache_dir import cache_folder
from llava_edge.runtime.util.json_codec import to_json
from llava_edge.runtime.util.progress import Progress, ProgressLine


def build_and_print(options: argparse.Namespace, artifact: Artifact, gpu: int) -> int:
    """Build, print, and return the exit code.

    Raises:
        LlavaEdgeError: see ``build_here``.
    """
    progress = ProgressLine()
    started = time.perf_counter()
    path, facts, is_new = build_here(
        artifact,
        options.engine,
        progress,
        force=options.force,
        open_cuda=lambda: CudaRuntime.open(index=gpu),
    )
    progress.clear()
    seconds = time.perf_counter() - started
    what = f"built in {seconds:.1f} s" if is_new else "there already (--force builds it again)"
    line = (
        f"{facts.library} {facts.library_version} engine for {facts.device or 'GPUs'} of compute "
        f"capability {facts.compute_capability}, 1 to {facts.max_tiles} tiles, "
        f"{format_bytes(facts.file.bytes)}: {what}"
    )
    print(wrapped(line), file=sys.stderr)
    if options.json:
        result = {"engine": str(path), "built": is_new, "seconds": seconds, "facts": to_json(facts)}
        print(json.dumps(result))
    else:
        print(path)
    return 0


def build_here(
    artifact: Artifact,
    asked: LibraryName | None,
    progress: Progress,
    *,
    force: bool = False,
    open_cuda: Callable[[], CudaRuntime] = CudaRuntime.open,
) -> tuple[Path, EngineFacts, bool]:
    """Build the engine of an artifact for one GPU, unless there is one that fits.

    Args:
        artifact: opened.
        asked: which library; None takes the first that is installed and supports the GPU.
        progress: told about steps.
        force: build also where there is one.
        open_cuda: opens the CUDA runtime on that GPU, the first unless said otherwise.

    Returns:
        The engine's file, what it is bound to, and whether it was built now.

    Raises:
        RequestError: the artifact is for the cpu target, or of a video model.
        DependencyError: no library is installed.
        EngineError: there is no GPU, the library does not support it, or building failed.
    """
    manifest = artifact.manifest
    if manifest.target != "cuda":
        raise RequestError(
            f"{artifact.folder} is for the cpu target; TensorRT runs those for the cuda target. "
            "Convert for the profile of a GPU."
        )
    if manifest.model.takes_video:
        raise RequestError(f"{artifact.folder}: {NO_VIDEO_ENGINE}")
    cuda = open_cuda()
    capability, device = cuda.compute_capability, cuda.device_name
    cuda.close()
    library = _library(asked, capability, device)
    here = Surroundings(library.name, library.version, capability, device)
    path = built_engine_path(manifest, here)
    if not force:
        try:
            known = built_engine(manifest, here)
        except ArtifactError:
            known = None
        if known is not None:
            return known.path, known.facts, False
    # Without its record an engine does not count; the record is written last.
    path.with_suffix(".json").unlink(missing_ok=True)
    target = EngineTarget(
        library,
        capability,
        device if library.name == "tensorrt" else None,
        tiles_per_batch(manifest.target, int(manifest.plan["max_tiles"])),
    )
    timing = cache_folder() / "timing" / f"{library.name}-{library.version}.bin"
    graph = graph_digests(manifest.files, manifest.vision.file)
    onnx_file = artifact.path(manifest.vision.file)
    facts = write_vision_engine(onnx_file, graph, target, path.parent, progress, timing)
    return path, facts, True


def _library(asked: LibraryName | None, capability: str, device: str) -> TensorRTLibrary:
    faults: list[LlavaEdgeError] = []
    for name in LIBRARIES if asked is None else (asked,):
        try:
            library = open_library(name)
        except (DependencyError, EngineError) as error:
            faults.append(error)
            continue
        if name == "tensorrt-rtx" and rtx_target(capability, unproven=True) is None:
            faults.append(
                EngineError(
                    f"{library} does not compile for {device} (compute capability {capability})"
                )
            )
            continue
        return library
    if len(faults) == 1:
        raise faults[0]
    kind = DependencyError if all(isinstance(f, DependencyError) for f in faults) else EngineError
    raise kind("no TensorRT builds an engine here: " + " ".join(map(str, faults)))
