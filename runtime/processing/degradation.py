"""Degradation: a request that degrades where memory, time or a bound on tokens does not suffice.

The same question is asked of fewer tiles, or of fewer frames, one step at a time; the answer then
says so. What each step would be is known from the start, it is made only when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_edge.profiles.errors import OutOfMemoryError
from llava_edge.runtime.processing.request import Request
from llava_edge.runtime.util.allocation import translate_oom


@dataclass(frozen=True)
class Fallback:
    """One way to ask for less.

    Attributes:
        what: is left, for people.
        max_tiles: most tiles of one image.
        max_frames: most frames of one video.
        make: makes the request.
    """

    what: str
    max_tiles: int
    max_frames: int
    make: Callable[[], Request]


class Degradation:
    """A request, and what it can still give up.

    Args:
        make: makes it as it was asked.
        steps: returns ways to ask for less, each less than the one before; asked once the request
            is known to be sound.
        lowered: what was reduced before that, and why.

    Raises:
        OutOfMemoryError: even the last step's pixels find no room.
    """

    def __init__(
        self,
        make: Callable[[], Request],
        steps: Callable[[], Sequence[Fallback]] = tuple,
        lowered: str = "",
    ) -> None:
        self._request: Request | None = None
        self._before = lowered
        self._lowered = ""
        try:
            self._request = _made(make)
        except OutOfMemoryError as error:
            self._steps = list(steps())
            if not self._steps:
                raise
            reason = str(error)
        if self._request is None:
            self.lower(reason)
        else:
            self._steps = list(steps())

    @property
    def request(self) -> Request:
        """As it stands now."""
        assert self._request is not None
        return self._request

    @property
    def degraded(self) -> tuple[str, ...]:
        """What was reduced and why; empty if nothing."""
        return tuple(given_up for given_up in (self._before, self._lowered) if given_up)

    @property
    def can_lower(self) -> bool:
        """Whether a step is left that asks for less than the request does now."""
        while self._steps and not self._is_less(self._steps[0]):
            del self._steps[0]
        return bool(self._steps)

    def lower(self, reason: str) -> None:
        """Take the next step whose pixels find room.

        Args:
            reason: goes into ``degraded``.

        Raises:
            OutOfMemoryError: none does.
            ValueError: no step is left.
        """
        if not self.can_lower:
            raise ValueError("no step is left")
        # Pixels of before make room for those that come.
        self._request = None
        while True:
            step = self._steps.pop(0)
            try:
                self._request = _made(step.make)
            except OutOfMemoryError:
                if not self._steps:
                    raise
                continue
            self._lowered = f"{step.what}: {reason}"
            return

    def settle(self) -> None:
        """Nothing more will be reduced: let go of pixels, and of the images for other steps."""
        self._steps = []
        self._request = self.request.without_pixels()

    def _is_less(self, step: Fallback) -> bool:
        if self._request is None:
            return True
        tiles = max((layout.num_tiles for layout in self._request.layouts), default=0)
        frames = max((len(pixels) for pixels in self._request.frame_pixels), default=0)
        return step.max_tiles < tiles or step.max_frames < frames


def _made(make: Callable[[], Request]) -> Request:
    with translate_oom("while the request was prepared"):
        return make()
