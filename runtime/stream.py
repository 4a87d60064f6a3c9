"""AnswerStream: the answer as it comes, and the whole of it once it ended."""

from __future__ import annotations

from collections.abc import Generator

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime.answer import Answer


class AnswerStream:
    """Iterate for text, then read ``answer``.

    Closing it, or dropping it, stops the work at the next token and lets the next request run.
    """

    def __init__(self, pieces: Generator[str, None, Answer]) -> None:
        self._pieces = pieces
        self._answer: Answer | None = None

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self._answer = end.value
            raise

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            EngineError: the stream has not ended, or was closed before its end.
        """
        if self._answer is None:
            raise EngineError("the answer is not complete: iterate the stream to its end first")
        return self._answer

    def close(self) -> None:
        """Stop the work; idempotent."""
        self._pieces.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
