"""Objects of a file that people write, one a line or in one list, and the files that they name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llava_edge.profiles.errors import plain_reason
from llava_edge.profiles.sizes import format_above, format_bytes
from llava_edge.runtime.util.safe_open import NotRegularError, open_plain

MAX_LINE_BYTES = 1 << 22
MAX_FILE_BYTES = 1 << 31
"""The largest public data set in this form, of 665,000 conversations, has half of it."""

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class NoEntriesError(Exception):
    """A file is not read at all; says why, for the caller, who names the file."""


def read_entries(path: Path, faults: list[str], label: str = "") -> Iterator[tuple[str, Any]]:
    """The objects of a file and what messages call them.

    The content decides: a file that begins with ``[`` is one list, any other is JSON Lines, in
    which empty lines are left out.

    Args:
        path: a regular file of UTF-8 text, with or without a byte order mark.
        faults: told about lines and entries that are no object.
        label: stands before ``:17`` of a line or `` entry 17`` of a list; they are called
            ``line 17`` and ``entry 17`` without one.

    Raises:
        NoEntriesError: the file cannot be read, is too large, or holds one object.
    """
    try:
        with _open(path) as file:
            start = file.read(4096)
            if start.startswith(_UTF16):
                raise NoEntriesError("it is UTF-16 text; save it as UTF-8")
            skipped = len(_BOM) if start.startswith(_BOM) else 0
            file.seek(skipped)
            if start[skipped:].lstrip().startswith(b"["):
                yield from _list(file, faults, label)
            else:
                yield from _lines(file, path, faults, label)
    except (OSError, ValueError) as error:
        raise NoEntriesError(plain_reason(error)) from error


def _open(path: Path) -> BinaryIO:
    try:
        file = os.fdopen(open_plain(path), "rb")
    except NotRegularError as error:
        raise NoEntriesError("it is no regular file") from error
    size = os.fstat(file.fileno()).st_size
    if size > MAX_FILE_BYTES:
        file.close()
        raise NoEntriesError(
            f"it has {format_above(size, MAX_FILE_BYTES)}; at most {format_bytes(MAX_FILE_BYTES)} "
            "are read"
        )
    return file


def _lines(
    file: BinaryIO, path: Path, faults: list[str], label: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    # Not splitlines: JSON may hold other separators inside a string.
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        name = f"{label}:{number}" if label else f"line {number}"
        if len(line) > MAX_LINE_BYTES:
            faults.append(f"{name}: a line of more than {format_bytes(MAX_LINE_BYTES)}")
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            continue
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if number == 1 and path.suffix.lower() == ".json" and _is_object(file):
                raise NoEntriesError(
                    "it holds one object; a list of entries, or one entry a line, is read"
                ) from error
            faults.append(f"{name}: no JSON ({plain_reason(error)})")
            continue
        if isinstance(entry, dict):
            yield name, entry
        else:
            faults.append(f"{name}: no JSON object")


def _is_object(file: BinaryIO) -> bool:
    """Whether a file is one object over several lines."""
    file.seek(0)
    try:
        return isinstance(json.loads(file.read(MAX_FILE_BYTES).decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False
    finally:
        file.seek(0)
        file.readline(MAX_LINE_BYTES + 1)


def _list(file: BinaryIO, faults: list[str], label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Entries one after another: all of them as objects would need many times the file's size."""
    text = file.read(MAX_FILE_BYTES).decode("utf-8")
    decoder, at, number = json.JSONDecoder(), _next(text, text.index("[") + 1), 0
    while not text.startswith("]", at):
        number += 1
        name = f"{label} entry {number}" if label else f"entry {number}"
        try:
            entry, at = decoder.raw_decode(text, at)
            at = _next(text, at)
            if text.startswith(",", at):
                at = _next(text, at + 1)
            elif not text.startswith("]", at):
                raise json.JSONDecodeError("a comma or ] is missing", text, at)
        except (ValueError, RecursionError) as error:
            # What follows cannot be told apart any more.
            faults.append(f"{name}: no JSON ({plain_reason(error)})")
            return
        if isinstance(entry, dict):
            yield name, entry
        else:
            faults.append(f"{name}: no JSON object")
    if _next(text, at + 1) < len(text):
        faults.append(f"{label or 'the file'}: there is more after its list")


def _next(text: str, at: int) -> int:
    """Where the next character stands that is no white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def path_inside(folder: Path, value: object) -> Path | None:
    """A file that an object names, None where that is no path inside the folder."""
    if not isinstance(value, str) or not value:
        return None
    path = folder / value
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    # A null byte or a lone surrogate is a ValueError.
    except (OSError, RuntimeError, ValueError):
        return None
    return path if is_inside else None
