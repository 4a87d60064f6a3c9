"""Files of a checkpoint, opened once and read with a bound. Links of hub caches are followed.

A folder from elsewhere may hold anything under a name that is expected: a pipe, a device, a file
of terabytes that are holes, JSON that exhausts the parser's memory or stack. Whatever is read of a
checkpoint folder is opened here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from llava_edge.profiles.errors import CheckpointError, printable
from llava_edge.profiles.sizes import format_above, format_bytes
from llava_edge.runtime.util.safe_open import open_regular, read_at

MAX_TEXT_BYTES = 128 << 20
"""More than any tokenizer.json of the supported models; such files are read whole."""

MAX_JSON_BYTES = 16 << 20
"""More than any other JSON file of a checkpoint has; parsed, it needs up to 25 times as much."""

MAX_TEMPLATE_BYTES = 1 << 20
"""More than any chat template has."""

_MAX_DEPTH = 100
_MAX_DIGITS = 100
_STEP = "Fetch it again."
_LARGE = ("tokenizer.json", "tokenizer.model", "merges.txt", "vocab.json", "vocab.txt")


def open_file(path: Path) -> AbstractContextManager[int]:
    """Yield a read-only descriptor of a regular file, or of the one that a link leads to.

    Raises:
        CheckpointError: the file is missing, unreadable, or a folder, pipe, socket or device.
    """
    return open_regular(path, follow_link=True, kind=CheckpointError, step=_STEP)


def exists(path: Path) -> bool:
    """Whether anything has this name; what it is, opening it tells."""
    return os.path.lexists(path)


def size_limit(name: str) -> int:
    """Most bytes that a text file of this name may have."""
    if name in _LARGE:
        return MAX_TEXT_BYTES
    return MAX_TEMPLATE_BYTES if name.endswith(".jinja") else MAX_JSON_BYTES


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """Whole contents of a file.

    Args:
        path: the file.
        limit: most bytes it may have; by its name (``size_limit``) where left out.

    Raises:
        CheckpointError: as ``open_file``, or the file is larger.
    """
    limit = size_limit(path.name) if limit is None else limit
    with open_file(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise CheckpointError(
                f"{path} has {format_above(size, limit)}; such a file may have "
                f"{format_bytes(limit)}. {_STEP}"
            )
        return read_at(descriptor, 0, limit, path, CheckpointError)


def read_text(path: Path) -> str:
    """Contents of a UTF-8 file; line ends come back as newlines, as the reference reads them.

    Raises:
        CheckpointError: the file is too large, unreadable or no UTF-8.
    """
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is no UTF-8 text: {error}. {_STEP}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file.

    Raises:
        CheckpointError: as ``read_text``, or the file holds no JSON object, one that is nested
            without end, or numbers and texts that nothing can write again.
    """
    if not exists(path):
        return {}
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object. {_STEP}")
    return value


def parse_json(
    text: str,
    where: str,
    pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None,
) -> Any:
    """Parse JSON of bounded depth, without numbers of endless digits or halves of characters.

    Args:
        text: the document.
        where: what it is, for messages.
        pairs: makes an object of its pairs, and may raise ValueError.

    Raises:
        CheckpointError: it is no such JSON.
    """
    try:
        value = json.loads(text, parse_int=_integer, object_pairs_hook=pairs)
        _check(value)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{where} is no valid JSON ({reason}). {_STEP}") from error
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _check(value: Any) -> None:
    """Level by level, so that depth costs no stack."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, list):
        yield from value
    elif isinstance(value, dict):
        for key in value:
            _check_text(key)
        yield from value.values()


def _check_text(text: str) -> None:
    if not text.isascii() and any("\ud800" <= mark <= "\udfff" for mark in text):
        raise ValueError(f"{printable(text)!r} holds half a character")
