"""Opens artifacts and answers from them. No torch, no transformers, no onnx.

    from llava_edge.runtime import LlavaEdge

The public names are loaded when first used, so that reading a manifest needs no inference engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llava_edge.profiles.errors import (
    ArtifactError,
    BudgetError,
    CheckpointError,
    DeadlineError,
    DependencyError,
    EngineError,
    ExportError,
    HubError,
    ImageError,
    LlavaEdgeError,
    OutOfMemoryError,
    OutputError,
    OutputExistsError,
    ProfileError,
    PromptError,
    RequestError,
    UnknownOptionError,
    UsageError,
    VerificationError,
    VideoError,
)

if TYPE_CHECKING:
    from llava_edge.runtime.artifact.open import Artifact, open_artifact
    from llava_edge.runtime.backends.cuda_options import CudaOptions
    from llava_edge.runtime.backends.process import configure_process
    from llava_edge.runtime.chat import Chat, ChatMessage
    from llava_edge.runtime.generation.generation_config import GenerationConfig
    from llava_edge.runtime.generation.output import Answer, PeakMemory, Timings
    from llava_edge.runtime.generation.stream import AnswerStream
    from llava_edge.runtime.model import LlavaEdge
    from llava_edge.runtime.processing.request import VideoInput
    from llava_edge.runtime.processing.tile_preview import draw_tiles
    from llava_edge.runtime.util.limits import Limits

    __version__: str

_HOMES = {
    "Answer": "generation.output",
    "AnswerStream": "generation.stream",
    "Artifact": "artifact.open",
    "Chat": "chat",
    "ChatMessage": "chat",
    "CudaOptions": "backends.cuda_options",
    "GenerationConfig": "generation.generation_config",
    "Limits": "util.limits",
    "LlavaEdge": "model",
    "PeakMemory": "generation.output",
    "Timings": "generation.output",
    "VideoInput": "processing.request",
    "configure_process": "backends.process",
    "draw_tiles": "processing.tile_preview",
    "open_artifact": "artifact.open",
}

__all__ = [
    "Answer",
    "AnswerStream",
    "Artifact",
    "ArtifactError",
    "BudgetError",
    "Chat",
    "ChatMessage",
    "CheckpointError",
    "CudaOptions",
    "DeadlineError",
    "DependencyError",
    "EngineError",
    "ExportError",
    "GenerationConfig",
    "HubError",
    "ImageError",
    "Limits",
    "LlavaEdge",
    "LlavaEdgeError",
    "OutOfMemoryError",
    "OutputError",
    "OutputExistsError",
    "PeakMemory",
    "ProfileError",
    "PromptError",
    "RequestError",
    "Timings",
    "UnknownOptionError",
    "UsageError",
    "VerificationError",
    "VideoError",
    "VideoInput",
    "__version__",
    "configure_process",
    "draw_tiles",
    "open_artifact",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("llava-edge")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
