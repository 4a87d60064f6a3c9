"""Progress of a conversion or a verification, as bars on stderr."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_MINUTES_FROM = 90
"""Seconds from which on a time is shown in minutes."""
_STEPS = ("quantise", "engine", "quality")


def spoken_seconds(seconds: float) -> str:
    """``83 s``, ``12 min``."""
    return f"{seconds:.0f} s" if seconds < _MINUTES_FROM else f"{seconds / 60:.0f} min"


class StageBars:
    """One progress bar a stage, on stderr."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Advance a stage; another first word closes the bar before it."""
        name = stage.split(" ")[0]
        if name != self._stage:
            self.close()
            self._stage = name
            unit = "B" if name not in _STEPS else "steps"
            # None: no bar where nobody watches, which is also so where there is no stderr.
            disable = True if sys.stderr is None else None
            self._bar = tqdm(total=total, unit=unit, unit_scale=True, leave=False, disable=disable)
        assert self._bar is not None
        self._bar.set_description_str(f"{stage:<10}", refresh=False)
        self._bar.update(done - self._bar.n)

    def say(self, line: str) -> None:
        """Print a line on stderr, above the bar."""
        if sys.stderr is not None:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> StageBars:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
