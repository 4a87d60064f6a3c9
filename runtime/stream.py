"""AnswerStream: the answer as it comes, and the whole of it once it ended."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime.answer import Answer

Pieces = Generator[str, None, Answer | None]


class StreamHandle:
    """What the work behind a stream knows of it; it does not keep the stream alive."""

    def __init__(self, stream: AnswerStream) -> None:
        self._stream = weakref.ref(stream)
        self._cancelled = threading.Event()

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
    request run.

    Args:
        start: makes the generator of pieces, given a handle on this stream.
    """

    def __init__(self, start: Callable[[StreamHandle], Pieces]) -> None:
        self._handle = StreamHandle(self)
        self._pieces = start(self._handle)
        self._answer: Answer | None = None
        self._failure: BaseException | None = None

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            # A generator that ended before, or was closed, returns nothing.
            if end.value is not None:
                self._answer = end.value
            raise
        except BaseException as error:
            self._failure = error
            raise

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
