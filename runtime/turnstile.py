"""Turnstile: one request at a time, others queue; an open stream never blocks its own thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llava_edge.profiles.errors import EngineError


class Turnstile:
    """A lock that knows who holds it.

    A stream holds it between tokens, while its thread does other things. A second request from
    that thread would wait for itself, so it is refused; requests of other threads wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._stop: Callable[[], None] | None = None
        self._closed = False

    @contextmanager
    def turn(self, stop: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold the turnstile.

        Args:
            stop: stops whoever holds it; called by ``close``.

        Raises:
            EngineError: this thread holds it already, or it is closed.
        """
        thread = threading.get_ident()
        if not self._lock.acquire(blocking=False):
            if self._owner == thread:
                raise EngineError(
                    "this thread still has an open stream, and one model answers one request at a "
                    "time. Iterate that stream to its end or close it first."
                )
            self._lock.acquire()
        try:
            if self._closed:
                raise EngineError("the model is closed; load the artifact again")
            self._owner, self._stop = thread, stop
            yield
        finally:
            self._owner = self._stop = None
            self._lock.release()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Stop whoever holds it, wait for them, and let nobody in any more."""
        stop = self._stop
        if stop is not None:
            stop()
        with self._lock:
            self._closed = True
            yield
