"""What runs the vision tower: TensorRT, TensorRT-RTX or ONNX Runtime, the first that works here.

The decoder always runs in ONNX Runtime. Why a better engine was passed over is kept in one sentence
each, for diagnosis.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from llava_edge.profiles.boards.engines import LIBRARIES, EngineName, LibraryName
from llava_edge.profiles.errors import EngineError, LlavaEdgeError
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.backends.cuda_runtime import CudaRuntime
from llava_edge.runtime.backends.engine_cache import (
    StoredEngine,
    Surroundings,
    built_engine,
    graph_digests,
    mismatch,
    opened_engine,
    shipped_engines,
)
from llava_edge.runtime.backends.onnxruntime import Place
from llava_edge.runtime.backends.tensorrt import TensorRTEngine, open_library
from llava_edge.runtime.util.arrays import DeviceKind
from llava_edge.runtime.util.cache_dir import cache_folder, keep_in_cache
from llava_edge.runtime.util.choices import AskedEngine as AskedEngine
from llava_edge.runtime.util.safe_open import read_bounded
from llava_edge.runtime.util.validation import require_name
from llava_edge.runtime.vision.cuda_encoder import OrtDeviceEncoder
from llava_edge.runtime.vision.encoder_protocols import DeviceEncoder, TileEncoder
from llava_edge.runtime.vision.tensorrt_encoder import TensorRTEncoder

_LOG = logging.getLogger(__name__)
_BUILD = "Build one on this machine: llava-edge build-engine"
_KERNELS_LIMIT = 1 << 30


@dataclass(frozen=True)
class VisionBackend:
    """The encoder that was chosen.

    Attributes:
        encoder: tiles to features.
        engine: what runs it.
        other_engines: why each better engine was not taken, by its name.
        close: to be called when nothing runs any more.
    """

    encoder: TileEncoder | DeviceEncoder
    engine: EngineName
    other_engines: dict[str, str] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


def open_tower(
    artifact: Artifact,
    device: DeviceKind,
    asked: AskedEngine,
    open_ort: Callable[[], TileEncoder | OrtDeviceEncoder],
    *,
    trust_engines: bool = False,
    gpu: int = 0,
) -> VisionBackend:
    """Open the first engine that works.

    Args:
        artifact: opened.
        device: where the decoder runs; TensorRT needs ``cuda``.
        asked: ``auto``, or the one that is wanted.
        open_ort: opens the graph in ONNX Runtime; called only where nothing better works.
        trust_engines: whether engines that came with the artifact may be opened. Opening one runs
            NVIDIA's library over bytes that anyone who made the artifact chose.
        gpu: which one, on ``cuda``.

    Raises:
        RequestError: there is no engine of that name.
        LlavaEdgeError: the engine that was asked for does not work here; says why.
    """
    require_name("engine", "engines", asked, get_args(AskedEngine))
    others: dict[str, str] = {}
    for name in LIBRARIES:
        if asked not in ("auto", name):
            others[name] = f"{asked} was asked for"
            continue
        try:
            return _open_engine(artifact, (device, gpu), name, trust_engines, others)
        except LlavaEdgeError as error:
            if asked == name:
                raise type(error)(f"engine {name} was asked for: {error}") from error
            others[name] = str(error)
            _LOG.info("%s is not used: %s", name, error)
    if device == "cpu":
        others["ort on cuda"] = (
            "the artifact is for the cpu target"
            if artifact.manifest.target == "cpu"
            else "the artifact runs on the CPU"
        )
    encoder = open_ort()
    if isinstance(encoder, OrtDeviceEncoder):
        return VisionBackend(encoder, "ort", others, encoder.close)
    return VisionBackend(encoder, "ort", others)


def _open_engine(
    artifact: Artifact,
    place: Place,
    name: LibraryName,
    trust_engines: bool,
    others: dict[str, str],
) -> VisionBackend:
    if place[0] != "cuda":
        target = artifact.manifest.target
        raise EngineError(
            "the artifact is for the cpu target; TensorRT runs those for the cuda target"
            if target == "cpu"
            else "it needs an NVIDIA GPU, and the artifact runs on the CPU"
        )
    if artifact.manifest.model.takes_video:
        raise EngineError("no engine is built for the tower of a video model, which pools frames")
    library = open_library(name)
    cuda = CudaRuntime.open(index=place[1])
    try:
        here = Surroundings(name, library.version, cuda.compute_capability, cuda.device_name)
        stored = _find(artifact, here, trust_engines)
        kernels = _kernels_path(stored, here)
        vision = artifact.manifest.model.vision
        tile_shape = (3, vision.image_size, vision.image_size)
        feature_shape = (vision.num_patches, artifact.manifest.model.text.hidden_size)
        with opened_engine(stored) as plan:
            engine = TensorRTEngine(
                library, plan, tile_shape, feature_shape, _known_kernels(kernels)
            )
        encoder = TensorRTEncoder(engine, cuda, tile_shape, feature_shape)
        encoder.warm_up()
    except BaseException:
        cuda.close()
        raise
    compiled = engine.kernels()
    if compiled:
        keep_in_cache(kernels, compiled)
    return VisionBackend(encoder, name, others, cuda.close)


def _find(artifact: Artifact, here: Surroundings, trust_engines: bool) -> StoredEngine:
    """The engine to open: one that this machine built, else a trusted one of the artifact.

    Raises:
        ArtifactError: its file or record is damaged.
        EngineError: there is none for this place; says what there is.
    """
    manifest = artifact.manifest
    command = f"{_BUILD} {artifact.folder}"
    built = built_engine(manifest, here)
    if built is not None:
        return _fitting(built, manifest, here, command)
    shipped = [e for e in shipped_engines(artifact) if e.facts.library == here.library]
    if not shipped:
        raise EngineError(
            f"there is no engine of {here.library} for this artifact on this machine. {command}"
        )
    # One for this GPU if there is one; else the reason why another does not do.
    shipped.sort(key=lambda engine: engine.facts.compute_capability != here.compute_capability)
    chosen = _fitting(shipped[0], manifest, here, command)
    if not trust_engines:
        raise EngineError(
            f"the artifact carries an engine ({chosen.path.name}), and engines are opened only "
            "where their maker is trusted. Load with trust_engines=True (--trust-engines), or "
            f"{command[0].lower()}{command[1:]}"
        )
    return chosen


def _fitting(
    engine: StoredEngine, manifest: Manifest, here: Surroundings, command: str
) -> StoredEngine:
    graph = graph_digests(manifest.files, manifest.vision.file)
    if reason := mismatch(engine.facts, graph, here):
        raise EngineError(
            f"the engine {engine.path.name} is not for this place: {reason}. {command}"
        )
    return engine


def _kernels_path(engine: StoredEngine, here: Surroundings) -> Path:
    key = "\n".join((engine.facts.file.sha256, here.device, here.library_version))
    return cache_folder() / "kernels" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"


def _known_kernels(path: Path) -> bytes:
    return read_bounded(path, _KERNELS_LIMIT) if path.is_file() else b""
