"""Opens artifacts and answers from them. No torch, no transformers, no onnx.

    from llava_edge.runtime import LlavaEdge

The public names are loaded when first used, so that reading a manifest needs no inference engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_edge.runtime.answer import Answer, Timings
    from llava_edge.runtime.chat import Chat, ChatMessage
    from llava_edge.runtime.limits import Limits
    from llava_edge.runtime.pipeline import LlavaEdge
    from llava_edge.runtime.stream import AnswerStream

_HOMES = {
    "Answer": "answer",
    "AnswerStream": "stream",
    "Chat": "chat",
    "ChatMessage": "chat",
    "Limits": "limits",
    "LlavaEdge": "pipeline",
    "Timings": "answer",
}

__all__ = ["Answer", "AnswerStream", "Chat", "ChatMessage", "Limits", "LlavaEdge", "Timings"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
