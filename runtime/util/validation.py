"""Checks of plain arguments, so that a wrong type is an error of ours and not of what it meets.

Numbers come from numpy, pandas and torch as well as from Python, so they are told by what they can
do, not by their class: a whole number has ``__index__``, a real one ``__float__``. What passes is
handed on as Python's own ``int``, ``float`` and ``bool``, which JSON can write.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from llava_edge.profiles.errors import RequestError, UnknownOptionError, did_you_mean


def require_count(name: str, value: object, smallest: int, largest: int | None = None) -> int:
    """A whole number in a range, as an ``int``.

    ``int``, numpy's integers and any scalar with ``__index__`` pass; True, 2.0 and "2" do not.

    Raises:
        RequestError: names the argument, the value and the range.
    """
    whole = _whole(value)
    if whole is not None and smallest <= whole and (largest is None or whole <= largest):
        return whole
    upto = "" if largest is None else f" and at most {largest}"
    raise RequestError(
        f"{name} is {_shown(value)}; it must be a whole number, at least {smallest}{upto}"
    )


def require_counts(name: str, values: object) -> tuple[int, ...]:
    """Whole numbers of at least 0, as ``require_count`` takes each; a text is none.

    Raises:
        RequestError: names the argument, the first wrong value and the rule.
    """
    if isinstance(values, (str, bytes, bytearray)) or not isinstance(values, Iterable):
        raise RequestError(f"{name} is {_shown(values)}; it must be a list of whole numbers")
    return tuple(require_count(f"{name}[{i}]", value, 0) for i, value in enumerate(values))


def require_number(name: str, value: object) -> float:
    """A real number, as a ``float``; infinite ones and NaN are left to the caller's range.

    ``int``, ``float``, numpy's numbers, ``Fraction``, ``Decimal`` and any scalar with
    ``__float__`` pass; True, "0.5" and complex numbers do not.

    Raises:
        RequestError: names the argument and the value.
    """
    try:
        if _kind(value) in "iuf" and hasattr(value, "__float__"):
            return float(value)
    except (OverflowError, TypeError, ValueError, RuntimeError):
        pass
    raise RequestError(f"{name} is {_shown(value)}; it must be a number that a float holds")


def require_flag(name: str, value: object) -> bool:
    """True or False, numpy's as well, as a ``bool``; 1 and "yes" are neither.

    Raises:
        RequestError: names the argument and the value.
    """
    if _kind(value) == "b":
        return bool(value)
    raise RequestError(f"{name} is {_shown(value)}; it must be True or False")


def require_callable(name: str, value: object) -> None:
    """Refuse what cannot be called.

    Raises:
        RequestError: names the argument and the value.
    """
    if not callable(value):
        raise RequestError(f"{name} is {_shown(value)}; it must be a function")


def require_name(what: str, kinds: str, asked: object, known: Sequence[str]) -> None:
    """Refuse what is not one of some names.

    Raises:
        RequestError: lists them.
    """
    # Not "in" alone: an array answers it with an array.
    if not isinstance(asked, str) or asked not in known:
        raise RequestError(f"{what} {asked!r:.40} is unknown; {kinds} are {', '.join(known)}")


def refuse_unknown(call: str, given: Mapping[str, object], known: Iterable[str]) -> None:
    """Refuse options that a call does not have.

    Args:
        call: for the message, for instance ``stream()``.
        given: options that were left over.
        known: the options that there are.

    Raises:
        UnknownOptionError: names each, the nearest known one, and all known ones.
    """
    if not given:
        return
    known = sorted(known)
    named = []
    for name in given:
        named.append(f"{name!r:.60}{did_you_mean(name, known)}")
    raise UnknownOptionError(f"{call} has no option {', '.join(named)}; it has {', '.join(known)}")


_Options = TypeVar("_Options", bound="NamedOptions")


class NamedOptions:
    """Base of a dataclass of options: a misspelt one is told as in ``refuse_unknown``."""

    def __new__(cls: type[_Options], *_: object, **options: object) -> _Options:
        """Look at names alone; the dataclass checks values, and static checks see its fields."""
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        unknown = {name: value for name, value in options.items() if name not in known}
        refuse_unknown(f"{cls.__name__}()", unknown, known)
        return object.__new__(cls)


def settle(options: object, **values: object) -> None:
    """Set fields of a frozen dataclass from its ``__post_init__``."""
    for name, value in values.items():
        object.__setattr__(options, name, value)


def _whole(value: Any) -> int | None:
    try:
        return operator.index(value) if _kind(value) in "iu" else None
    except (TypeError, ValueError, RuntimeError):
        return None


def _kind(value: Any) -> str:
    """A letter as numpy's ``dtype.kind``: b, i, f for a scalar of that kind, else another."""
    if isinstance(value, (bool, str, bytes, bytearray, complex)):
        return "b" if isinstance(value, bool) else "?"
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return "i" if hasattr(value, "__index__") else "f"
    if getattr(value, "ndim", 1) != 0:
        return "?"
    kind = getattr(dtype, "kind", None)
    if isinstance(kind, str):
        return kind
    # A tensor's type has only its name, as torch.int64.
    name = str(dtype).rpartition(".")[2]
    known = (("bool", "b"), ("uint", "u"), ("int", "i"), ("float", "f"), ("bfloat", "f"))
    return next((letter for start, letter in known if name.startswith(start)), "?")


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 128:
        # Python does not even write the longest out.
        return f"a whole number of {value.bit_length()} bits"
    try:
        return f"{value!r:.60}"
    except Exception:
        # A broken __repr__ shall not hide which argument is wrong.
        return f"a {type(value).__name__}"
