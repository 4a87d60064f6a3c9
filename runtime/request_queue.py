"""Turnstile: one request at a time, the others in the order in which they came.

An open stream never blocks its own thread, a closed model lets nobody wait, and after ``fork()``
the child is told so.
"""

from __future__ import annotations

import gc
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llava_edge.profiles.errors import DeadlineError, EngineError

_LOOK_SECONDS = 5.0
"""How often whoever waits looks for a stream that nobody can reach any more."""


class Turnstile:
    """A lock that is fair and knows who holds it.

    A stream holds it between tokens, while its thread does other things. A second request from
    that thread would wait for itself, so it is refused; requests of other threads queue, first come
    first served.

    It belongs to the process that made it. ONNX Runtime's threads, the CUDA context and locks that
    other threads held do not come along to a child of ``fork()``, where a request would wait for
    ever.
    """

    def __init__(self) -> None:
        # Reentrant: the garbage collector may close a stream, and so give its turn back, in the
        # middle of any method here, in the same thread.
        self._mutex = threading.RLock()
        self._waiting: deque[_Ticket] = deque()
        self._holder: _Ticket | None = None
        self._closed = False
        self._pid = os.getpid()

    def require_own_process(self) -> None:
        """Refuse a child of ``fork()``.

        Raises:
            EngineError: this is not the process in which the model was loaded.
        """
        here = os.getpid()
        if here != self._pid:
            raise EngineError(
                f"the model was loaded in process {self._pid} and is used in {here}, a copy of it "
                "by fork(), where the threads of ONNX Runtime do not exist. Load it in the process "
                "that uses it, or start processes with multiprocessing's method 'spawn'."
            )

    @contextmanager
    def turn(
        self,
        stop: Callable[[], None] | None = None,
        thread: Callable[[], int] | None = None,
        seconds: float | None = None,
    ) -> Iterator[None]:
        """Hold the turnstile, after all who came before.

        Args:
            stop: stops whoever holds it; called by ``closing``.
            thread: says which thread works on it, where that may change; the one that entered, if
                left out.
            seconds: how long to wait at most; None for as long as it takes.

        Raises:
            DeadlineError: the turn did not come in that time.
            EngineError: this thread holds it already, it is closed (also while waiting), or this is
                another process.
        """
        ticket = self._enter(_Ticket(stop, thread), seconds)
        try:
            yield
        finally:
            self._leave(ticket)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Stop whoever holds it, send away who waits, and let nobody in any more.

        Raises:
            EngineError: called from inside the request that it would have to wait for.
        """
        if os.getpid() != self._pid:
            # Nobody works here, and what the locks say is the other process's matter.
            self._closed = True
            yield
            return
        with self._mutex:
            self._closed = True
            holder = self._holder
            for ticket in [ticket for ticket in self._waiting if not ticket.closes]:
                self._waiting.remove(ticket)
                ticket.gate.release()
        if holder is not None and holder.stop is not None:
            holder.stop()
        ticket = self._enter(_Ticket(closes=True))
        try:
            yield
        finally:
            self._leave(ticket)

    def _enter(self, ticket: _Ticket, seconds: float | None = None) -> _Ticket:
        """Wait for the turn of a ticket."""
        until = math.inf if seconds is None else time.monotonic() + seconds
        self.require_own_process()
        if self._is_mine():
            # A stream that was dropped in a reference cycle, as an exception makes them, is still
            # there until the collector finds it.
            gc.collect()
            if self._is_mine():
                raise EngineError(
                    "the model cannot be closed from inside a request of it, for which it would "
                    "have to wait. The request was told to stop: let it end, then close the model."
                    if ticket.closes
                    else "this thread still has an open stream, and one model answers one request "
                    "at a time. Iterate that stream to its end or close it first."
                )
        with self._mutex:
            self._waiting.append(ticket)
            self._next()
        try:
            while not ticket.gate.acquire(timeout=_until(until)):
                if time.monotonic() >= until:
                    raise DeadlineError(
                        "the time that was given (deadline_seconds) was over while other requests "
                        "were answered. Give more time, or ask less at once."
                    )
                # As above, for a stream of another thread: who only waits allocates nothing, so
                # the collector would never run by itself.
                gc.collect()
            if self._closed and not ticket.closes:
                raise EngineError("the model is closed; load the artifact again")
        except BaseException:
            self._leave(ticket)
            raise
        return ticket

    def _is_mine(self) -> bool:
        holder = self._holder
        return holder is not None and holder.thread() == threading.get_ident()

    def _leave(self, ticket: _Ticket) -> None:
        if os.getpid() != self._pid:
            return
        with self._mutex:
            if self._holder is ticket:
                self._holder = None
            elif ticket in self._waiting:
                self._waiting.remove(ticket)
            self._next()

    def _next(self) -> None:
        if self._holder is None and self._waiting:
            self._holder = self._waiting.popleft()
            self._holder.gate.release()


def _until(moment: float) -> float:
    """Seconds to wait before looking again."""
    return max(0.0, min(_LOOK_SECONDS, moment - time.monotonic()))


class _Ticket:
    """A place in the queue. Its gate opens when its turn comes, or when there is none any more.

    One that ``closes`` gets in although the turnstile is closed.
    """

    def __init__(
        self,
        stop: Callable[[], None] | None = None,
        thread: Callable[[], int] | None = None,
        *,
        closes: bool = False,
    ) -> None:
        entered = threading.get_ident()
        self.thread = thread or (lambda: entered)
        self.stop = stop
        self.closes = closes
        self.gate = threading.Lock()
        self.gate.acquire()
