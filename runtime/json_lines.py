"""JSON lines that people write: objects, one a line, and the pictures that they name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MAX_LINE_CHARACTERS = 1 << 20


def read_objects(
    text: str, name: Callable[[int], str], faults: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a text and what messages call their lines; empty lines are left out.

    Args:
        text: of a whole file.
        name: number of a line, from 1 on, to what it is called.
        faults: told about lines that hold no object.
    """
    # Not splitlines: JSON may hold other separators inside a string.
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            if len(line) > MAX_LINE_CHARACTERS:
                raise ValueError(f"a line of {len(line)} characters; at most {MAX_LINE_CHARACTERS}")
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.append(f"{name(number)}: no JSON ({error})")
            continue
        if not isinstance(entry, dict):
            faults.append(f"{name(number)}: no JSON object")
            continue
        yield name(number), entry


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
