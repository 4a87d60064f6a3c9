"""Byte counts as people write them: ``24GiB``, ``8 GB``, ``512MiB``."""

from __future__ import annotations

import re
from fractions import Fraction

from llava_edge.profiles.errors import RequestError, printable

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(text: str) -> int:
    """Bytes in ``text``; decimal units (GB) are powers of ten, binary ones (GiB) powers of two.

    Raises:
        RequestError: the text is no size or comes to less than one byte.
    """
    match = _SIZE.fullmatch(text)
    factor = _UNITS.get(match[2].lower()) if match else None
    # Longer digit strings than any memory are refused before arithmetic touches them.
    size = int(Fraction(match[1]) * factor) if match and factor and len(text) <= 40 else 0
    if size < 1:
        raise RequestError(
            f"{printable(text[:40])!r} is not a memory size. Write a number and a unit: "
            f"{_example(text)}."
        )
    return size


def _example(text: str) -> str:
    """What was probably meant: a bare number of at most four digits is one of GiB."""
    number = text.strip()
    if re.fullmatch("[1-9][0-9]{0,3}", number, re.ASCII):
        return f"{number}GiB, if that is what you mean"
    return "24GiB, 16GB or 512MiB"


def format_bytes(count: int) -> str:
    """Readable size with a binary unit, such as ``14.1 GiB``; for people, never parsed back."""
    for unit, size in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def format_above(count: int, limit: int) -> str:
    """A size that is above a limit; where both would be shown alike: ``more than 1.0 MiB``."""
    shown, most = format_bytes(count), format_bytes(limit)
    return f"more than {most}" if shown == most else shown
