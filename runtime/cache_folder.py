"""The user's cache folder, where everything lives that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/llava-edge``, by default ``~/.cache/llava-edge``; it need not exist."""
    # The XDG specification says to ignore a relative path.
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "llava-edge"
    return Path(os.path.expanduser("~")) / ".cache" / "llava-edge"
