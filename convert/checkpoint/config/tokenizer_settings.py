"""Small tokenizer files of a checkpoint: ``tokenizer_config.json`` and what stands beside it.

They come from elsewhere, and libraries trust them: paths to other files, names of classes with
code of their own, ids of any size. So each is read once, here: keys that say nothing about text
are left out, values must have the type that their key has in released checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava_edge.convert.util.text_files import read_object
from llava_edge.profiles.errors import CheckpointError, shorten
from llava_edge.runtime.processing.text.tokenizer_validation import (
    MAX_ADDED_TOKENS,
    MAX_CONTENT,
    MAX_ID,
)

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"

CLASSES = frozenset(
    {
        *("LlamaTokenizer", "CodeLlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer"),
        *("PreTrainedTokenizer", "TokenizersBackend"),
    }
)
"""Tokenizer classes of transformers that the supported language models have, without ``Fast``."""

_NAMED = re.compile(r"[a-z][a-z_]{0,40}_token")
_FLAGS = frozenset(
    {
        *("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"),
        *("clean_up_tokenization_spaces", "split_special_tokens", "use_default_system_prompt"),
        "spaces_between_special_tokens",
    }
)
_SIDES = frozenset({"padding_side", "truncation_side"})
_LISTS = frozenset({"additional_special_tokens", "extra_special_tokens"})
_TOKEN_FLAGS = frozenset({"lstrip", "rstrip", "normalized", "single_word", "special"})


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` without what is no setting of a tokenizer; empty where missing.

    Classes are left out where they are none of ``CLASSES``; see ``declared_class``.

    Raises:
        CheckpointError: a setting is malformed, or the file cannot be read.
    """
    raw = read_object(folder / CONFIG)
    kept = _settings(raw, folder / CONFIG)
    kept.pop("tokenizer_class", None)
    if is_known(name := raw.get("tokenizer_class")):
        kept["tokenizer_class"] = name
    return kept


def read_special_tokens(folder: Path) -> dict[str, Any]:
    """Tokens of ``special_tokens_map.json`` by name; empty where there is no file.

    Raises:
        CheckpointError: a token is malformed, or the file cannot be read.
    """
    found = _settings(read_object(folder / SPECIAL), folder / SPECIAL)
    return {key: value for key, value in found.items() if _NAMED.fullmatch(key) or key in _LISTS}


def read_added_tokens(folder: Path) -> dict[str, int]:
    """Ids of ``added_tokens.json`` by content; empty where there is no file.

    Raises:
        CheckpointError: a content or an id is malformed, or the file cannot be read.
    """
    path = folder / ADDED
    found = read_object(path)
    faults = [
        f"{content!r:.60} has the id {index!r:.40}"
        for content, index in found.items()
        if not (_is_content(content) and _is_id(index))
    ]
    if len(found) > MAX_ADDED_TOKENS:
        faults.append(f"it lists {len(found)} tokens; at most {MAX_ADDED_TOKENS} are read")
    _refuse(path, faults)
    return dict(found)


def declared_class(folder: Path) -> str | None:
    """Name of the tokenizer class that ``tokenizer_config.json`` asks for, whatever it is.

    Where no class is named, ``auto_map`` names one of the checkpoint's own files.
    """
    raw = read_object(folder / CONFIG)
    name = raw.get("tokenizer_class")
    if name is None and (mapped := raw.get("auto_map")) is not None:
        if isinstance(mapped, Mapping):
            mapped = mapped.get("AutoTokenizer")
        listed = mapped if isinstance(mapped, list) else [mapped]
        named = [each for each in listed if isinstance(each, str)]
        name = named[-1].rpartition(".")[2] if named else None
    return None if name is None else str(name)


def refuse_foreign_class(folder: Path) -> None:
    """Refuse a tokenizer class that is none of ``CLASSES``.

    Raises:
        CheckpointError: names the class and what to do.
    """
    name = declared_class(folder)
    if name is not None and not is_known(name):
        raise CheckpointError(
            f"{folder / CONFIG} asks for the tokenizer class {name!r:.80}; known are "
            f"{', '.join(sorted(CLASSES))}. Code of a checkpoint is never run. Where one of these "
            "reads the same files, name it as tokenizer_class and remove auto_map."
        )


def is_known(name: object) -> bool:
    """Whether a tokenizer class is one of transformers that is used here."""
    return isinstance(name, str) and name.removesuffix("Fast") in CLASSES


def _settings(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    faults: list[str] = []
    for key, value in raw.items():
        check = _check(key)
        if check is None or value is None:
            # A null overrules a default, which matters for named tokens alone.
            if check is not None and _NAMED.fullmatch(key):
                kept[key] = None
            continue
        if not check(value):
            faults.append(f"{key} is {value!r:.60}")
        kept[key] = value
    _refuse(path, faults)
    return kept


def _check(key: str) -> Callable[[Any], bool] | None:
    """How the value of a key is checked; None for keys that are not read."""
    if key in _FLAGS:
        return lambda value: isinstance(value, bool)
    if key in _SIDES:
        return lambda value: value in ("left", "right")
    if key in _LISTS:
        return _are_tokens
    if _NAMED.fullmatch(key):
        return _is_token
    return {
        "added_tokens_decoder": _are_added,
        "chat_template": lambda value: isinstance(value, (str, list)),
        "model_max_length": lambda value: type(value) in (int, float) and value > 0,
        "tokenizer_class": lambda value: isinstance(value, str),
    }.get(key)


def _is_content(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_CONTENT


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_ID


def _is_token(value: object) -> bool:
    if not isinstance(value, dict):
        # An empty text names no token.
        return value == "" or _is_content(value)
    flags = {key: flag for key, flag in value.items() if key not in ("content", "__type", "id")}
    return (
        _is_content(value.get("content"))
        and value.get("__type", "AddedToken") == "AddedToken"
        and flags.keys() <= _TOKEN_FLAGS
        and all(isinstance(flag, bool) for flag in flags.values())
    )


def _are_tokens(value: object) -> bool:
    listed = list(value.values()) if isinstance(value, dict) else value
    return (
        isinstance(listed, list)
        and len(listed) <= MAX_ADDED_TOKENS
        and all(_is_token(token) for token in listed)
    )


def _are_added(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_ADDED_TOKENS
        and all(
            re.fullmatch(r"[0-9]{1,8}", index) and int(index) < MAX_ID and _is_token(token)
            for index, token in value.items()
        )
        and all(isinstance(token, dict) for token in value.values())
    )


def _refuse(path: Path, faults: list[str]) -> None:
    if faults:
        raise CheckpointError(
            f"{path} is malformed: {shorten(faults)}. Fetch it again, or write the values as "
            "transformers' save_pretrained does."
        )
