"""TimeBudget: how long an answer may take, and what is foreseen from how fast this machine was."""

from __future__ import annotations

import time
from collections.abc import Callable

from llava_edge.profiles.errors import DeadlineError, RequestError
from llava_edge.runtime.util.validation import require_number


class ThroughputEstimate:
    """Seconds that a tile and a position of a prompt took lately; None before the first.

    Attributes:
        tile_seconds: of a tile or frame in the tower.
        token_seconds: of a position in prefill.
    """

    def __init__(self) -> None:
        self.tile_seconds: float | None = None
        self.token_seconds: float | None = None

    def report(self, num_tiles: int, seconds: float, num_tokens: int, prefill: float) -> None:
        """Tiles and positions that were computed in so many seconds; what is 0 says nothing.

        The latest counts half, so that a clock that drops with heat is noticed.
        """
        self.tile_seconds = _mixed(self.tile_seconds, seconds, num_tiles)
        self.token_seconds = _mixed(self.token_seconds, prefill, num_tokens)

    def foresee(self, num_tiles: int, num_tokens: int) -> float:
        """Seconds until the first token; what is not known counts as nothing."""
        return num_tiles * (self.tile_seconds or 0.0) + num_tokens * (self.token_seconds or 0.0)


def _mixed(before: float | None, seconds: float, count: int) -> float | None:
    if not count:
        return before
    latest = seconds / count
    return latest if before is None else (before + latest) / 2


class TimeBudget:
    """Time of one request, from when it was asked.

    Args:
        seconds: until the last token; None for as long as it takes.
        clock: seconds that only go up.

    Raises:
        RequestError: it is no positive number.
    """

    def __init__(
        self, seconds: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if seconds is not None:
            seconds = require_number("deadline_seconds", seconds)
            # Written this way round, so that NaN is refused.
            if not seconds > 0:
                raise RequestError(
                    f"deadline_seconds is {seconds!r}; it must be a positive number of seconds, "
                    "or None for as long as it takes"
                )
        self.seconds = seconds
        self._clock = clock
        self._asked = clock()
        self._until = None if seconds is None else self._asked + seconds

    @property
    def elapsed(self) -> float:
        """Seconds since it was asked."""
        return self._clock() - self._asked

    @property
    def remaining(self) -> float | None:
        """Seconds left; negative once it is over, None where there is no deadline."""
        return None if self._until is None else self._until - self._clock()

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        remaining = self.remaining
        return remaining is not None and remaining <= 0

    def require(self, where: str) -> None:
        """Stop where the time is up.

        Args:
            where: the work had come to.

        Raises:
            DeadlineError: it is, and there is no token yet.
        """
        if self.is_over:
            raise DeadlineError(
                f"{self.seconds:g} s were given (deadline_seconds) and were over at {where}, "
                "before the first token. Give more time, fewer pictures, or a lower grid "
                "(grid, max_image_tokens)."
            )
