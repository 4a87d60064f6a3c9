"""CUDA's rules for which GPUs a process sees, for machines where CUDA itself cannot be asked.

Source: CUDA C++ Programming Guide, "CUDA Environment Variables" (CUDA_VISIBLE_DEVICES,
CUDA_DEVICE_ORDER), and what the driver does where the guide is silent: a device that is named twice
hides all, and numbers are read up to the first other character, as by ``strtoul``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PREFIXES = ("GPU-", "MIG-")
_NUMBER = re.compile(r"\s*\+?([0-9]{1,9})")


def visible_places(value: str | None, uuids: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """Which GPUs are seen, in their order.

    Args:
        value: of ``CUDA_VISIBLE_DEVICES``; None where it is not set.
        uuids: names of each GPU, ``GPU-…`` and those of its MIG instances, ``MIG-…``.

    Returns:
        Places in ``uuids``.
    """
    if value is None:
        return tuple(range(len(uuids)))
    by_name = value.lstrip().startswith(_PREFIXES)
    named: list[tuple[int, str]] = []
    for part in value.split(","):
        found = _by_name(part.strip(), uuids) if by_name else _by_number(part, len(uuids))
        if found is None:
            # What stands in front of the first invalid name counts.
            break
        if found in named:
            return ()
        named.append(found)
        if part.strip().startswith("MIG-"):
            # A process sees one instance.
            break
    return tuple(place for place, _ in named)


def _by_number(text: str, count: int) -> tuple[int, str] | None:
    found = _NUMBER.match(text)
    number = int(found[1]) if found else count
    return (number, "") if number < count else None


def _by_name(text: str, uuids: Sequence[Sequence[str]]) -> tuple[int, str] | None:
    """The one GPU or instance whose name begins so."""
    if not text.startswith(_PREFIXES):
        return None
    begun = text.lower()
    found = [
        (place, name)
        for place, names in enumerate(uuids)
        for name in names
        if name.lower().startswith(begun)
    ]
    return found[0] if len(found) == 1 else None
