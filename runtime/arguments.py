"""Checks of plain arguments, so that a wrong type is an error of ours and not of what it meets."""

from __future__ import annotations

import contextlib

from llava_edge.profiles.errors import RequestError


def require_count(name: str, value: object, smallest: int, largest: int | None = None) -> None:
    """Refuse what is no whole number in a range; True is no number.

    Raises:
        RequestError: names the argument, the value and the range.
    """
    if (
        isinstance(value, int)
        and not isinstance(value, bool)
        and smallest <= value
        and (largest is None or value <= largest)
    ):
        return
    upto = "" if largest is None else f" and at most {largest}"
    raise RequestError(
        f"{name} is {_shown(value)}; it must be a whole number, at least {smallest}{upto}"
    )


def require_number(name: str, value: object) -> None:
    """Refuse what is no real number.

    Raises:
        RequestError: names the argument and the value.
    """
    with contextlib.suppress(OverflowError):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            float(value)
            return
    raise RequestError(f"{name} is {_shown(value)}; it must be a number that a float holds")


def require_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        RequestError: names the argument and the value.
    """
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {value!r:.60}; it must be True or False")


def require_callable(name: str, value: object) -> None:
    """Refuse what cannot be called.

    Raises:
        RequestError: names the argument and the value.
    """
    if not callable(value):
        raise RequestError(f"{name} is {value!r:.60}; it must be a function")


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 128:
        # Python does not even write the longest out.
        return f"a whole number of {value.bit_length()} bits"
    return f"{value!r:.60}"
