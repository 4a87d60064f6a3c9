"""Which parameters of a test are left to the slow tier.

``make test`` proves each kind of thing by one of it; ``make test-slow`` goes through the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
ParameterSet = type(pytest.param())


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
    """Parameters, all of them slow but the first of each kind.

    Args:
        kind: of a value; of the values of a ``pytest.param``.
        values: tuples are several parameters.
    """
    seen: set[Hashable] = set()
    found = []
    for value in values:
        this = kind(value.values if isinstance(value, ParameterSet) else value)  # type: ignore[arg-type]
        found.append(_param(value, is_quick=this not in seen))
        seen.add(this)
    return found


def _param(value: Any, *, is_quick: bool) -> Any:
    marks = () if is_quick else (pytest.mark.slow,)
    if isinstance(value, ParameterSet):
        return value._replace(marks=(*value.marks, *marks))
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks)
