from __future__ import annotations

import numpy as np
import pytest

from llava_edge.profiles.errors import OutOfMemoryError
from llava_edge.runtime.util import allocation
from llava_edge.runtime.util.allocation import RESERVE_BYTES, allocate, require_free

MIB = 1 << 20


def free(patch: pytest.MonkeyPatch, nbytes: int | None) -> None:
    patch.setattr(allocation, "available_host_bytes", lambda: nbytes)


def test_what_the_free_memory_holds_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 8 * MIB + RESERVE_BYTES)

    assert allocate((2, MIB), np.float32, "a test").shape == (2, MIB)


def test_one_byte_more_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 8 * MIB + RESERVE_BYTES - 1)

    with pytest.raises(OutOfMemoryError, match=r"^a test takes 8 MiB; 8 MiB are free"):
        allocate((2, MIB), np.float32, "a test")


def test_little_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 0)

    require_free(MIB - 1, "a test")
    with pytest.raises(OutOfMemoryError):
        require_free(MIB, "a test")


def test_where_nothing_is_known_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, None)

    require_free(1 << 60, "a test")


def test_memory_that_numpy_does_not_get_is_our_error(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, None)

    with pytest.raises(OutOfMemoryError, match="memory ran out for a test"):
        allocate((1 << 50,), np.uint8, "a test")
