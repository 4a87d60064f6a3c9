"""The user's cache folder, where everything lives that can be made again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from llava_edge.runtime.util.atomic_write import atomic_file


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/llava-edge``, by default ``~/.cache/llava-edge``; it need not exist."""
    # The XDG specification says to ignore a relative path.
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "llava-edge"
    return Path(os.path.expanduser("~")) / ".cache" / "llava-edge"


def keep_in_cache(path: Path, contents: str | bytes) -> None:
    """Write a file of the cache whole or not at all, and do without where that is impossible.

    Args:
        path: below ``cache_folder()``.
        contents: text is written in UTF-8.
    """
    # A read-only home or a full disk must not keep an artifact from being opened.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_bytes(contents.encode() if isinstance(contents, str) else contents)
