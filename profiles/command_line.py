"""CommandParser: the command line as every subcommand reads it, and what its options accept.

Standard library alone, so that a wrong command line is refused before anything large is imported.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from llava_edge.profiles.errors import UsageError, did_you_mean, printable

COLUMNS = 80
"""Help and tables are no wider."""

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", re.ASCII)
_LONGEST_NUMBER = 40


class CommandParser(argparse.ArgumentParser):
    """Options are written in full; an unknown one is refused with the nearest that exists.

    Args:
        name: of the subcommand.
        summary: one sentence; ``llava-edge --help`` shows the same.
        usage: what is typed behind the name.

    Raises:
        UsageError: (while parsing) the command line is malformed.
    """

    def __init__(self, name: str, summary: str, usage: str) -> None:
        super().__init__(
            prog=f"llava-edge {name}",
            usage=f"llava-edge {name} {usage}",
            description=summary,
            formatter_class=_Help,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UsageError(f"{message.removesuffix('.')}. See {self.prog} --help.")

    def parse_known_args(  # type: ignore[override]  # argparse types it by overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse; an option that does not exist is found before one that is missing."""
        given = sys.argv[1:] if args is None else list(args)
        known = self._option_string_actions
        for text in given:
            if text == "--":
                break
            name = text.partition("=")[0]
            if re.fullmatch(r"--?[A-Za-z][^ ]*", name) and name not in known:
                self.error(f"there is no option {name!r:.60}{did_you_mean(name, known)}")
        return super().parse_known_args(given, namespace)


class _Help(argparse.HelpFormatter):
    """80 columns at most, and defaults behind the text of each option."""

    def __init__(self, prog: str, **options: Any) -> None:
        width = min(shutil.get_terminal_size().columns, COLUMNS)
        super().__init__(prog, **{**options, "max_help_position": 26, "width": max(width, 40) - 1})

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if "default" in text or not action.option_strings or default is argparse.SUPPRESS:
            return text
        # A switch is off and a list is empty unless given, which needs no words.
        if default is None or default is False or default == []:
            return text
        return f"{text} (default: %(default)s)"


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """For ``type=``: one of the names; see ``bar`` for a fitting ``metavar``."""
    known = tuple(names)

    def read(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(
                f"{printable(text[:40])!r} is none of {', '.join(known)}{did_you_mean(text, known)}"
            )
        return text

    return read


def bar(names: Iterable[str]) -> str:
    """Names as a metavar: ``fp16|int8|int4``."""
    return "|".join(names)


def whole_number(smallest: int, largest: int | None = None) -> Callable[[str], int]:
    """For ``type=``: a whole number within bounds."""

    def read(text: str) -> int:
        value = int(text) if _WHOLE.fullmatch(text) else smallest - 1
        if value < smallest or (largest is not None and value > largest):
            most = "" if largest is None else f" and at most {largest}"
            raise argparse.ArgumentTypeError(
                f"{text!r:.40} is no whole number of at least {smallest}{most}"
            )
        return value

    return read


def real_number(
    smallest: float, largest: float | None = None, *, above: bool = False
) -> Callable[[str], float]:
    """For ``type=``: a finite number within bounds.

    Args:
        smallest: the bound below.
        largest: the bound above, or None.
        above: ``smallest`` itself is refused.
    """
    rule = f"above {smallest:g}" if above else f"of at least {smallest:g}"
    if largest is not None:
        rule += f" and at most {largest:g}"

    def read(text: str) -> float:
        short = len(text) <= _LONGEST_NUMBER
        value = float(text) if short and _NUMBER.fullmatch(text) else float("nan")
        low = value > smallest if above else value >= smallest
        # Written so that what is no number is refused.
        if not (low and value <= (sys.float_info.max if largest is None else largest)):
            raise argparse.ArgumentTypeError(f"{text!r:.40} is no number {rule}")
        return value

    return read


def wrapped(text: str, *, hang: int = 2) -> str:
    """A line of a report in as many as 80 columns need; further ones are set in by ``hang``."""
    lead = len(text) - len(text.lstrip(" "))
    return "\n".join(
        textwrap.wrap(
            text.lstrip(" "),
            COLUMNS - 1,
            initial_indent=" " * lead,
            subsequent_indent=" " * (lead + hang),
            break_long_words=False,
            break_on_hyphens=False,
        )
    )
