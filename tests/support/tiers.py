"""Which parameters of a test are left to the slow tier.

``make test`` proves each kind of thing by one of it; ``make test-slow`` goes through the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def slow_but(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters, all of them slow but those named.

    Args:
        quick: values that stay in the quick tier; each must be one of ``values``.
        values: tuples are several parameters.
    """
    known = list(values)
    assert all(value in known for value in quick), [v for v in quick if v not in known]
    return [_param(value, is_quick=value in quick) for value in known]


def one_of_each(kind: Callable[[T], Hashable], values: Iterable[T]) -> list[Any]:
    """Parameters, all of them slow but the first of each kind."""
    seen: set[Hashable] = set()
    found = []
    for value in values:
        found.append(_param(value, is_quick=kind(value) not in seen))
        seen.add(kind(value))
    return found


def _param(value: Any, *, is_quick: bool) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=() if is_quick else pytest.mark.slow)
