"""Progress and messages: what is told about work under way, and a line on stderr that shows it."""

from __future__ import annotations

import os
import sys
from typing import Protocol, TextIO


class Progress(Protocol):
    """A function that is called as work goes on."""

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """``done`` of ``total`` steps or bytes of a stage are finished."""


class Notify(Protocol):
    """A function that shows a user what was decided or found."""

    def __call__(self, line: str, /) -> None:
        """One message, without a line end."""


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
