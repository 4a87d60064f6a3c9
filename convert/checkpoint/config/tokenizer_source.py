"""Vocabulary files of a checkpoint, judged before a library opens them.

``tokenizer.json`` passes the same validator as an artifact's; ``vocab.json`` and ``merges.txt`` are
bounded and typed. A ``tokenizer.model`` is read by ``sentencepiece_model``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from tokenizers import Tokenizer as Backend

from llava_edge.convert.util.text_files import read_object, read_text
from llava_edge.profiles.errors import ArtifactError, CheckpointError, shorten
from llava_edge.runtime.processing.text.tokenizer_backend import mapped_errors
from llava_edge.runtime.processing.text.tokenizer_validation import (
    MAX_CONTENT,
    MAX_ID,
    tokenizer_faults,
)
from llava_edge.runtime.util.checksummed_json import parse_strict

_MAX_MERGES = 4 * MAX_ID


def read_tokenizer_json(path: Path) -> str:
    """Text of a ``tokenizer.json`` that the library may open.

    Raises:
        CheckpointError: it cannot be read, or holds what is not let through.
    """
    text = read_text(path)
    judge_tokenizer_json(text, str(path))
    return text


def judge_tokenizer_json(text: str, where: str) -> None:
    """Refuse a ``tokenizer.json`` that the library must not open.

    Raises:
        CheckpointError: names what is not let through.
    """
    try:
        faults = tokenizer_faults(
            parse_strict(text.encode("utf-8", "surrogatepass"), where, judges_numbers=False)
        )
    except ArtifactError as error:
        raise CheckpointError(f"{where} is no valid JSON: {error}") from error
    if faults:
        raise CheckpointError(
            f"{where} is no tokenizer that is opened: {shorten(faults)}. Tokenizers of the "
            "supported language models have none of this: fetch the file again, or give a "
            "checkpoint that you trust."
        )


def open_tokenizer_json(text: str, where: str) -> Backend:
    """Open the text of a ``tokenizer.json`` that was judged.

    Raises:
        CheckpointError: the library refuses it.
    """
    with library_errors(f"{where} is no tokenizer"):
        return Backend.from_str(text)


def read_vocab(path: Path) -> dict[str, int]:
    """Pieces of a ``vocab.json`` and their ids.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    found = read_object(path)
    faults = [
        f"{piece!r:.60} has the id {index!r:.40}"
        for piece, index in found.items()
        if not (type(index) is int and 0 <= index < MAX_ID and len(piece) <= MAX_CONTENT)
    ]
    if not found or len(found) > MAX_ID:
        faults.append(f"it holds {len(found)} pieces; 1 to {MAX_ID} are read")
    if faults:
        raise CheckpointError(f"{path} is no vocabulary: {shorten(faults)}. Fetch it again.")
    return found


def read_merges(path: Path) -> str:
    """Text of a ``merges.txt``: two pieces a line.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    text = read_text(path)
    lines = text.split("\n")
    if len(lines) > _MAX_MERGES:
        raise CheckpointError(
            f"{path} has {len(lines)} lines; at most {_MAX_MERGES} are read. Fetch it again."
        )
    for number, line in enumerate(lines, 1):
        if (
            line.strip()
            and not line.startswith("#")
            and (len(line.split()) != 2 or len(line) > 2 * MAX_CONTENT)
        ):
            raise CheckpointError(
                f"{path} has {line!r:.60} in line {number}, where two pieces are expected. Fetch "
                "it again."
            )
    return text


def library_errors(what: str) -> AbstractContextManager[None]:
    """Errors and panics of libraries that read a checkpoint's files, as ``CheckpointError``."""
    return mapped_errors(what, CheckpointError, "Fetch it again.")
