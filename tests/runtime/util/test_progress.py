"""Progress is shown to people who watch a terminal, and to nobody else."""

from __future__ import annotations

import io
import sys

import pytest

from llava_edge.convert.util.progress import StageBars
from llava_edge.runtime.util.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_process_without_stderr_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # As under pythonw, and in a library whose host closed it.
    monkeypatch.setattr(sys, "stderr", None)
    line = ProgressLine()
    line("tiles", 1, 2)
    line.clear()
    with StageBars() as bars:
        bars("write", 1, 2)
        bars("quantise", 1, 2)
        bars.say("a note")


@pytest.mark.parametrize(("kind", "shows"), [("xterm", True), ("dumb", False)])
def test_a_terminal_that_rewrites_no_line_shows_none(
    monkeypatch: pytest.MonkeyPatch, kind: str, shows: bool
) -> None:
    monkeypatch.setenv("TERM", kind)
    terminal = Terminal()
    line = ProgressLine(terminal)
    line("tiles", 1, 2)
    assert ("tiles" in terminal.getvalue()) == shows
    line.clear()
