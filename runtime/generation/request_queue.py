"""RequestQueue: a first-in-first-out lock that can be closed.

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
from dataclasses import dataclass, field

from llava_edge.profiles.errors import DeadlineError, EngineError

CLOSED = "the model is closed; load the artifact again"

_COLLECT_SECONDS = 5.0
"""How long the first who waits does so before it looks for a holder that nobody can reach."""

_LOCAL = threading.local()


def this_thread() -> object:
    """An object that no other thread ever has; the system gives a thread's number to later ones."""
    if not hasattr(_LOCAL, "token"):
        _LOCAL.token = object()
    token: object = _LOCAL.token
    return token


def _closed_gate() -> threading.Lock:
    gate = threading.Lock()
    gate.acquire()
    return gate


@dataclass(eq=False)
class _Place:
    """A place in the queue. Its gate opens when its turn comes, or when the queue is closed.

    One that ``closes`` gets in although the queue is closed.
    """

    stop: Callable[[], None] | None = None
    thread: Callable[[], object] | None = None
    closes: bool = False
    entered: object = field(default_factory=this_thread)
    gate: threading.Lock = field(default_factory=_closed_gate)

    @property
    def is_mine(self) -> bool:
        """Whether the thread that asks is the one that works on it."""
        return this_thread() is (self.entered if self.thread is None else self.thread())


class RequestQueue:
    """One holder at a time; the others follow in the order in which they came.

    A stream holds its turn between tokens, while its thread does other things. A second request
    from that thread would wait for itself, so it is refused.

    A stream that is dropped gives its turn back at once. One that was dropped inside a reference
    cycle does so when Python's collector finds it. Where all threads wait, none allocates and the
    collector never runs by itself: then the first in the queue, and no other, starts it, after
    pauses that double, since each collection stops the whole application.

    It belongs to the process that made it. ONNX Runtime's threads, the CUDA context and locks that
    other threads held do not exist in a child of ``fork()``, where a request would wait for ever.
    """

    def __init__(self) -> None:
        # Reentrant: the garbage collector may close a stream, and so give its turn back, in the
        # middle of any method here, in the same thread.
        self._mutex = threading.RLock()
        self._waiting: deque[_Place] = deque()
        self._holder: _Place | None = None
        self._closed = False
        self._pid = os.getpid()

    def require_open(self) -> None:
        """Refuse a closed queue and a child of ``fork()``.

        Raises:
            EngineError: says which.
        """
        here = os.getpid()
        if here != self._pid:
            raise EngineError(
                f"the model was loaded in process {self._pid} and is used in {here}, a copy of it "
                "by fork(), where the threads of ONNX Runtime do not exist. Load it in the process "
                "that uses it, or start processes with multiprocessing's method 'spawn'."
            )
        if self._closed:
            raise EngineError(CLOSED)

    @contextmanager
    def turn(
        self,
        stop: Callable[[], None] | None = None,
        thread: Callable[[], object] | None = None,
        seconds: float | None = None,
    ) -> Iterator[None]:
        """Hold the queue, after all who came before.

        Args:
            stop: stops the holder; called by ``closing``.
            thread: what ``this_thread`` gives in the thread that works on it now; the one that
                entered, if left out.
            seconds: how long to wait at most; None for as long as it takes.

        Raises:
            DeadlineError: the turn did not come in that time.
            EngineError: this thread holds it already, it is closed (also while waiting), or this is
                another process.
        """
        self.require_open()
        with self._held(_Place(stop, thread), seconds):
            yield

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Stop the holder, send away all who wait, and let nobody in any more.

        Raises:
            EngineError: called from inside the request that it would have to wait for.
        """
        if os.getpid() != self._pid:
            # Nobody works here, and what the fields hold belongs to the other process.
            self._closed = True
            yield
            return
        with self._mutex:
            self._closed = True
            holder = self._holder
            for place in [place for place in self._waiting if not place.closes]:
                self._waiting.remove(place)
                place.gate.release()
        if holder is not None and holder.stop is not None:
            holder.stop()
        with self._held(_Place(closes=True)):
            yield

    @contextmanager
    def _held(self, place: _Place, seconds: float | None = None) -> Iterator[None]:
        self._refuse_own_thread(place)
        until = math.inf if seconds is None else time.monotonic() + seconds
        try:
            with self._mutex:
                self._waiting.append(place)
                self._next()
            self._wait(place, until)
            if self._closed and not place.closes:
                raise EngineError(CLOSED)
            yield
        finally:
            self._leave(place)

    def _wait(self, place: _Place, until: float) -> None:
        pause = _COLLECT_SECONDS
        while not place.gate.acquire(timeout=max(0.0, min(pause, until - time.monotonic()))):
            if time.monotonic() >= until:
                raise DeadlineError(
                    "the time that was given (deadline_seconds) was over while other requests "
                    "were answered. Give more time, or ask less at once."
                )
            with self._mutex:
                first = bool(self._waiting) and self._waiting[0] is place
            if first:
                gc.collect()
                pause *= 2

    def _refuse_own_thread(self, place: _Place) -> None:
        for collect in (gc.collect, None):
            holder = self._holder
            if holder is None or not holder.is_mine:
                return
            if collect:
                # A kept exception may hold this thread's last stream in a cycle.
                collect()
        raise EngineError(
            "the model cannot be closed from inside a request of it, for which it would have to "
            "wait. The request was told to stop: let it end, then close the model."
            if place.closes
            else "this thread still has an open stream, and one model answers one request at a "
            "time. Iterate that stream to its end or close it first."
        )

    def _leave(self, place: _Place) -> None:
        if os.getpid() != self._pid:
            return
        with self._mutex:
            if self._holder is place:
                self._holder = None
            elif place in self._waiting:
                self._waiting.remove(place)
            self._next()

    def _next(self) -> None:
        if self._holder is None and self._waiting:
            self._holder = self._waiting.popleft()
            self._holder.gate.release()
