"""A progress line on stderr for people; silent when nobody watches."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TextIO

ReportProgress = Callable[[str, int, int], None]
"""``report(stage, done, total)``."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


class ProgressLine:
    """Rewrites one line of a terminal; ``clear`` before anything else is printed."""

    WIDTH = 24

    def __init__(self, stream: TextIO | None = None) -> None:
        # None where the process was started without stderr; then nobody watches.
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._active = (
            self._stream is not None and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        )
        self._shown = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show a bar for one stage."""
        if not self._active or self._stream is None:
            return
        filled = self.WIDTH * done // max(total, 1)
        bar = "█" * filled + "░" * (self.WIDTH - filled)
        self._stream.write(f"\r\x1b[2K{stage:<12} {bar} {done}/{total}")
        self._stream.flush()
        self._shown = True

    def clear(self) -> None:
        """Remove the line."""
        if self._shown and self._stream is not None:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
            self._shown = False
