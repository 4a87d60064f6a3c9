"""Opens artifacts and answers from them. No torch, no transformers, no onnx.

    from llava_edge.runtime import LlavaEdge

The public names are loaded when first used, so that reading a manifest needs no inference engine.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
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
    VerificationError,
    VideoError,
)

if TYPE_CHECKING:
    from llava_edge.runtime.answer import Answer, PeakMemory, Timings
    from llava_edge.runtime.artifact import Artifact, open_artifact
    from llava_edge.runtime.chat import Chat, ChatMessage
    from llava_edge.runtime.cuda_options import CudaOptions
    from llava_edge.runtime.generation_config import GenerationConfig
    from llava_edge.runtime.limits import Limits
    from llava_edge.runtime.pipeline import LlavaEdge
    from llava_edge.runtime.process import configure_process
    from llava_edge.runtime.request import VideoInput
    from llava_edge.runtime.stream import AnswerStream
    from llava_edge.runtime.tile_picture import draw_tiles

    __version__: str

_HOMES = {
    "Answer": "answer",
    "AnswerStream": "stream",
    "Artifact": "artifact",
    "Chat": "chat",
    "ChatMessage": "chat",
    "CudaOptions": "cuda_options",
    "GenerationConfig": "generation_config",
    "Limits": "limits",
    "LlavaEdge": "pipeline",
    "PeakMemory": "answer",
    "Timings": "answer",
    "VideoInput": "request",
    "configure_process": "process",
    "draw_tiles": "tile_picture",
    "open_artifact": "artifact",
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
        return version("llava-edge")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
