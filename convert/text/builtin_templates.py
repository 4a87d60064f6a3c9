"""Prompt families: the formats that the released LLaVA-NeXT models were trained with.

Used where a checkpoint has no chat template. Sources: LLaVA ``llava/conversation.py`` and
``convert_llava_next_weights_to_hf.py`` of transformers 4.47.1; Llama-3 and Qwen chat templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.artifact.manifest import PromptFormat, Turn

FAMILIES = ("mistral_instruct", "vicuna", "chatml_direct", "llama3", "chatml_newline")

_YI_VOCAB = range(64000, 65000)
_LLAMA3_VOCAB = range(128000, 130000)
_LLAMA3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)


def detect_family(config: Mapping[str, Any], source_id: str = "") -> str:
    """Which prompt format a checkpoint was trained with.

    Args:
        config: ``config.json`` in the words of Hugging Face.
        source_id: hub id or folder name; decides only where the configuration leaves it open.

    Returns:
        One of ``FAMILIES``.

    Raises:
        CheckpointError: the language model belongs to no known family.
    """
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else {}
    model_type = text.get("model_type", "llama")
    if model_type == "mistral":
        return "mistral_instruct"
    if model_type == "qwen2":
        return "chatml_newline"
    if model_type != "llama":
        raise CheckpointError(
            f"The language model is {model_type!r}; prompt families are known for llama, mistral "
            f"and qwen2. Name one of {', '.join(FAMILIES)}."
        )
    vocab = text.get("vocab_size", 32000)
    if vocab in _YI_VOCAB:
        return "chatml_direct"
    if vocab in _LLAMA3_VOCAB:
        return "llama3"
    name = source_id.lower()
    # Small models under a family's name: the vocabulary says nothing there.
    for family, hints in (
        ("llama3", ("llama3", "llama-3")),
        ("chatml_direct", ("34b", "hermes")),
    ):
        if vocab not in range(32000, 33000) and any(hint in name for hint in hints):
            return family
    return "vicuna"


def stop_tokens(family: str) -> tuple[str, ...]:
    """Tokens that end an answer of the family, whatever the checkpoint's files say."""
    return {
        "mistral_instruct": ("</s>",),
        "vicuna": ("</s>",),
        "chatml_direct": ("<|im_end|>",),
        "llama3": ("<|eot_id|>", "<|end_of_text|>"),
        "chatml_newline": ("<|im_end|>",),
    }.get(family, ())


def builtin_format(family: str, video: bool = False) -> PromptFormat:
    """The format a family was trained with.

    Args:
        family: one of ``FAMILIES``.
        video: the model is a LLaVA-NeXT-Video one, which names a user where others name a human.

    Raises:
        CheckpointError: the family is unknown.
    """
    if family == "mistral_instruct":
        return _make(
            family,
            system=Turn("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
            user=Turn("[INST] ", " [/INST]"),
            user_after_system="",
            assistant=Turn(" ", " </s>"),
            special_tokens=("</s>",),
        )
    if family == "vicuna":
        person = "user" if video else "human"
        return _make(
            family,
            default_system=(
                f"A chat between a curious {person} and an artificial intelligence assistant. "
                f"The assistant gives helpful, detailed, and polite answers to the {person}'s "
                "questions. "
            ),
            system=Turn("", " "),
            user=Turn("USER: ", " "),
            assistant=Turn("ASSISTANT: ", "</s>"),
            generation_prompt="ASSISTANT:",
            special_tokens=("</s>",),
        )
    if family == "chatml_direct":
        return _chat_markup(family, "<|im_start|>", "\n", "<|im_end|>", "Answer the questions.")
    if family == "chatml_newline":
        system = "You are a helpful assistant."
        return _chat_markup(family, "<|im_start|>", "\n", "<|im_end|>\n", system)
    if family == "llama3":
        return _chat_markup(
            family,
            "<|start_header_id|>",
            "<|end_header_id|>\n\n",
            "<|eot_id|>",
            _LLAMA3_SYSTEM,
            "<|begin_of_text|>",
        )
    raise CheckpointError(
        f"The prompt family {family!r} is unknown; known are {', '.join(FAMILIES)}."
    )


def _chat_markup(
    family: str, opening: str, named: str, end: str, system_text: str, prefix: str = ""
) -> PromptFormat:
    """Formats that put the role's name between two marks and an end mark behind the text."""

    def role(name: str) -> Turn:
        return Turn(f"{opening}{name}{named}", end)

    tokens = (prefix, opening, named, end)
    return _make(
        family,
        prefix=prefix,
        default_system=f"{role('system').before}{system_text}{end}",
        system=role("system"),
        user=role("user"),
        assistant=role("assistant"),
        generation_prompt=role("assistant").before,
        special_tokens=tuple(t.strip() for t in tokens if t.strip()),
    )


def _make(
    family: str,
    *,
    system: Turn,
    user: Turn,
    assistant: Turn,
    special_tokens: tuple[str, ...],
    prefix: str = "",
    default_system: str = "",
    user_after_system: str | None = None,
    generation_prompt: str = "",
) -> PromptFormat:
    return PromptFormat(
        source="builtin",
        family=family,
        prefix=prefix,
        default_system=default_system,
        system=system,
        user=user,
        user_after_system=user.before if user_after_system is None else user_after_system,
        assistant=assistant,
        generation_prompt=generation_prompt,
        image="<image>\n",
        video="<video>\n",
        special_tokens=special_tokens,
    )
