"""DeadlineGuard: between pieces of work, is a request still wanted and in time?"""

from __future__ import annotations

from collections.abc import Callable

from llava_edge.runtime.generation.deadline import ThroughputEstimate, TimeBudget
from llava_edge.runtime.util.progress import Progress


class CancelledError(Exception):
    """Nobody waits for the answer any more; stays inside the runtime."""


class TooSlowError(Exception):
    """The first token will come too late, and less could be asked; stays inside the runtime."""


class DeadlineGuard:
    """A progress report that may end the work it is told about.

    What a request may take until its first token is half of its time: an answer has tokens behind
    the first one. That is foreseen before the work begins, from what earlier requests took. Once it
    runs, it is only abandoned where the whole time would not do.

    Args:
        budget: time of the request.
        pace: of earlier requests.
        num_tiles: tiles and frames to be encoded.
        num_tokens: positions to be computed.
        progress: told what this is told.
        is_cancelled: whether the request is still wanted.
        may_lower: less can be asked; else nothing is ``TooSlowError``.

    Raises:
        CancelledError: (each call) it is not wanted.
        DeadlineError: (each call) the time is up.
        TooSlowError: (each call) see there.
    """

    def __init__(
        self,
        budget: TimeBudget,
        pace: ThroughputEstimate,
        num_tiles: int,
        num_tokens: int,
        progress: Progress,
        is_cancelled: Callable[[], bool],
        *,
        may_lower: bool,
    ) -> None:
        self._budget = budget
        self._pace = pace
        self._tiles = num_tiles
        self._tokens = num_tokens
        self._progress = progress
        self._is_cancelled = is_cancelled
        self._may_lower = may_lower and budget.seconds is not None
        self._began: dict[str, float] = {}

    def require_time(self, work: str) -> None:
        """Ask before the work begins."""
        self._look(work)
        remaining = self._budget.remaining
        if remaining is None or not self._may_lower:
            return
        seconds = self._pace.foresee(self._tiles, self._tokens)
        if seconds > remaining / 2:
            raise TooSlowError(
                f"{work} takes about {seconds:.2f} s until its first token; {remaining:.2f} s are "
                "left (deadline_seconds) and at most half of it may go there"
            )

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report; see ``Progress``."""
        self._look(f"{stage} {done} of {total}")
        remaining = self._budget.remaining
        if remaining is not None and self._may_lower:
            self._foresee(stage, done, total, remaining)
        self._progress(stage, done, total)

    def _look(self, where: str) -> None:
        if self._is_cancelled():
            raise CancelledError
        self._budget.require(where)

    def _foresee(self, stage: str, done: int, total: int, remaining: float) -> None:
        """Whether the rest of this stage, and the prompt behind it, come in time at this pace."""
        began = self._began.setdefault(stage, remaining)
        if not 0 < done < total:
            return
        seconds = (began - remaining) / done * (total - done)
        if stage != "prompt":
            seconds += self._pace.foresee(0, self._tokens)
        if seconds > remaining:
            raise TooSlowError(
                f"after {done} of {total} {stage} the rest takes about {seconds:.2f} s until the "
                f"first token; {remaining:.2f} s are left (deadline_seconds)"
            )
