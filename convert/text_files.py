"""Text files of a checkpoint, read with a bound. Hub caches link to them, so links are fine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_edge.profiles.errors import CheckpointError

MAX_TEXT_BYTES = 128 << 20
"""More than any tokenizer.json of the supported models; such files are read whole."""


def read_text(path: Path) -> str:
    """Contents of a UTF-8 file; line ends come back as newlines, as the reference reads them.

    Raises:
        CheckpointError: the file is too large, unreadable or no UTF-8.
    """
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise CheckpointError(
                f"{path} has more than {MAX_TEXT_BYTES} bytes, which no such file has. "
                "Fetch it again."
            )
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Fetch it again.") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file.

    Raises:
        CheckpointError: as ``read_text``, or the file holds no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}. Fetch it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object. Fetch it again.")
    return value
