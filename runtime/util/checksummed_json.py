"""Sealed JSON: documents that carry the SHA-256 of their own bytes, and a strict parser for them.

The seal: the writer serialises the document with ``"self_sha256": ""``, hashes those bytes, and
puts the digest between the two quotes. The reader cuts the digest out of the bytes it was given and
hashes the rest; it never serialises anything again, so spacing and key order are the writer's own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from llava_edge.profiles.errors import ArtifactError, ExportError

_SEAL = re.compile(rb'"self_sha256"[ \t\r\n]*:[ \t\r\n]*"([0-9a-f]{64})?"')
_MAX_DIGITS = 20


def seal(document: Mapping[str, Any]) -> bytes:
    """Serialise a document (sorted keys, ASCII, two spaces, final newline) with its own digest.

    Raises:
        ExportError: a value has no JSON form (a non-finite number, a foreign object), or a nested
            object has a field ``self_sha256`` as well.
    """
    try:
        text = json.dumps(
            {**document, "self_sha256": ""},
            indent=2,
            sort_keys=True,
            ensure_ascii=True,
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise ExportError(f"the document cannot be written as JSON: {error}") from error
    blank = text.encode("ascii") + b"\n"
    if len(_SEAL.findall(blank)) != 1:
        raise ExportError("only the document itself may have a field self_sha256")
    digest = hashlib.sha256(blank).hexdigest()
    return _SEAL.sub(f'"self_sha256": "{digest}"'.encode("ascii"), blank)


def check_seal(data: bytes, document: Any, where: str) -> None:
    """Compare the digest that a sealed document carries with that of its bytes.

    Args:
        data: the bytes as they lie in the file.
        document: what ``parse_strict`` made of them.
        where: name of the file, for messages.

    Raises:
        ArtifactError: there is no such field, or more than one, or the digests differ.
    """
    found = list(_SEAL.finditer(data))
    carried = document.get("self_sha256") if isinstance(document, dict) else None
    if len(found) != 1 or not found[0][1] or found[0][1].decode("ascii") != carried:
        raise ArtifactError(
            f"{where} does not carry exactly one digest of itself (field self_sha256). "
            "Copy or convert the artifact again."
        )
    start, end = found[0].span(1)
    actual = hashlib.sha256(data[:start] + data[end:]).hexdigest()
    if actual != carried:
        raise ArtifactError(
            f"{where} was changed after it was written: self_sha256 says {carried}, its bytes "
            f"give {actual}. Copy or convert the artifact again."
        )


def parse_strict(data: bytes, where: str, *, judges_numbers: bool = True) -> Any:
    """Parse JSON as its specification has it and as every reader understands it alike.

    Refused are duplicate keys, ``NaN`` and infinities (also ``1e999``), integers of more than 20
    digits, half surrogates, nesting beyond the interpreter's stack, and anything but UTF-8.

    Args:
        data: the text.
        where: name of the file, for messages.
        judges_numbers: refuse numbers that are out of range; false where the caller looks at each
            number, since a call for each takes half of the time that a large vocabulary needs.

    Raises:
        ArtifactError: the text is refused; the message names ``where`` and the reason.
    """
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite if judges_numbers else None,
            parse_int=_bounded_int if judges_numbers else None,
        )
        # A half surrogate parses, and then breaks anyone who encodes the string; in UTF-8 itself
        # there is none.
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{where} is not valid JSON: {error}. Copy or convert the artifact again."
        ) from error
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r:.80} stands twice in one object")
    return document


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text:.40} is out of range")
    return value


def _bounded_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"integer of {len(text)} digits; at most {_MAX_DIGITS} are read")
    return int(text)
