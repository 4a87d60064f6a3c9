"""The three standard streams of a command, whatever the process that started it left of them.

A parent may have closed one (``2>&-``, a daemon), its reader may go away, its disk may be full. A
command then still ends as it should: what is lost of stdout is an error, what is lost of stderr
changes nothing.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from llava_edge.profiles.errors import OutputError, plain_reason

SUBSTITUTES = "llava_edge_substitutes"
"""Error handler of output streams: see ``_substitute``."""
_ASCII = {
    **dict(zip("‘’‚“”„«»‐‑‒–—−", '\'\',"""""------', strict=True)),
    **dict(zip("×·•█░ ", "x**#. ", strict=True)),
    **{"…": "...", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "≈": "~", "±": "+-", "€": "EUR"},
}


def _substitute(error: UnicodeError) -> tuple[str, int]:
    """Punctuation as ASCII has it, every other character as its escape of Python."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    parts = (
        _ASCII.get(character) or character.encode("ascii", "backslashreplace").decode()
        for character in error.object[error.start : error.end]
    )
    return "".join(parts), error.end


codecs.register_error(SUBSTITUTES, _substitute)


class ReaderGoneError(Exception):
    """Nobody reads stdout any more, as after ``| head -1``; ends the command quietly."""


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make stdin, stdout and stderr usable; give them back as they were at the end.

    Streams that an application has put in place of the process's own are left alone.

    Raises:
        OutputError: (each write to stdout) it cannot be written.
        ReaderGoneError: (each write to stdout) its reader has gone.
    """
    _reserve_descriptors()
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        sys.stdout = _text(_CheckedWriter(1), sys.stdout)
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        sys.stderr = _text(_QuietWriter(2), sys.stderr)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            # A terminal that is not UTF-8 shows what can be read rather than ending the answer.
            output.reconfigure(errors=SUBSTITUTES)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text then reach the prompt's own check, which names them.
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        yield
    finally:
        # A stream that something still refers to is never flushed by itself.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def _reserve_descriptors() -> None:
    """Open what is closed of 0, 1 and 2.

    The next file that is opened would get that number, and whatever a library prints would be
    written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null == descriptor:
                os.set_inheritable(null, True)
            else:
                os.dup2(null, descriptor)
                os.close(null)


def _text(raw: io.RawIOBase, old: TextIO | None) -> TextIO:
    if isinstance(old, io.TextIOWrapper):
        old.flush()
        return io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=old.encoding,
            # Python's stderr writes through, and the buffer below would hold its lines back.
            line_buffering=old.line_buffering or old.write_through,
        )
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", line_buffering=True)


class _CheckedWriter(io.FileIO):
    """Stdout. Once a write failed, nothing more is tried, so that leaving is quiet."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._failed = False

    def write(self, data: object) -> int:
        """Write all that fits; wait where the other end is a full pipe that must not block."""
        size = memoryview(data).nbytes  # type: ignore[arg-type]
        if self._failed:
            return size
        try:
            while (written := super().write(data)) is None:  # type: ignore[arg-type]
                select.select((), (self,), ())
            return written
        except BrokenPipeError as error:
            self._failed = True
            raise ReaderGoneError from error
        except OSError as error:
            self._failed = True
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> Exception:
        return OutputError(
            f"the output could not be written: {plain_reason(error)}. What was asked was done as "
            "far as it is written; make room, or send the output elsewhere."
        )


class _QuietWriter(_CheckedWriter):
    """Stderr: what cannot be written is dropped."""

    def write(self, data: object) -> int:
        """Write, or pretend to."""
        try:
            return super().write(data)
        except (OutputError, ReaderGoneError):
            return memoryview(data).nbytes  # type: ignore[arg-type]
