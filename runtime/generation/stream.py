"""AnswerStream: the answer as it comes, and the whole of it once it ended."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Generator

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime.generation.output import Answer
from llava_edge.runtime.generation.request_queue import this_thread

Pieces = Generator[str, None, Answer | None]


class StreamHandle:
    """What the work behind a stream knows of it; it does not keep the stream alive."""

    def __init__(self, stream: AnswerStream) -> None:
        self._stream = weakref.ref(stream)
        self._cancelled = threading.Event()
        self._thread = this_thread()

    def goes_on(self) -> None:
        """The thread that calls works on it from here on."""
        self._thread = this_thread()

    def thread(self) -> object:
        """What ``this_thread`` gave in the thread that worked on it last."""
        return self._thread

    def cancel(self) -> None:
        """Ask the work to stop at the next token."""
        self._cancelled.set()

    def is_cancelled(self) -> bool:
        """Whether it was asked to."""
        return self._cancelled.is_set()

    def close(self) -> None:
        """Close the stream, if it is still there."""
        stream = self._stream()
        if stream is not None:
            stream.close()


class AnswerStream:
    """Iterate for text, then read ``answer``.

    Closing it, from any thread, or dropping it stops the work at the next token and lets the next
    request run. One thread after another may iterate it, but not two at once.

    Args:
        start: makes the generator of pieces, given a handle on this stream.
    """

    def __init__(self, start: Callable[[StreamHandle], Pieces]) -> None:
        self._handle = StreamHandle(self)
        self._pieces = start(self._handle)
        self._pid = os.getpid()
        self._iterating = threading.Lock()
        self._answer: Answer | None = None
        self._failure: str | None = None

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        if os.getpid() != self._pid:
            raise EngineError(
                f"the stream was begun in process {self._pid} and goes on there; this is "
                f"{os.getpid()}, a copy of it by fork(). Load the model here and ask again."
            )
        if not self._iterating.acquire(blocking=False):
            raise EngineError(
                "the next piece of this stream is being made already; iterate it in one "
                "thread at a time"
            )
        self._handle.goes_on()
        try:
            return next(self._pieces)
        except StopIteration as end:
            # A generator that ended before, or was closed, returns nothing.
            if end.value is not None:
                self._answer = end.value
            raise
        except BaseException as error:
            # The error itself would keep the frames it came through, with pixels and features.
            self._failure = str(error)
            raise
        finally:
            self._iterating.release()

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            EngineError: the stream has not ended, failed, or was closed before its end.
        """
        if self._answer is not None:
            return self._answer
        if self._failure is not None:
            raise EngineError(f"there is no answer: the stream failed ({self._failure})")
        if self._handle.is_cancelled():
            raise EngineError("there is no answer: the stream was closed before its end")
        raise EngineError("the answer is not complete: iterate the stream to its end first")

    def close(self) -> None:
        """Stop the work; idempotent."""
        self._handle.cancel()
        try:
            self._pieces.close()
        except ValueError:
            # Another thread is inside the generator; it sees the flag at the next token.
            return

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
