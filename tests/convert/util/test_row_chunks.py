from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from llava_edge.convert.util.parallel import map_rows


@pytest.fixture(autouse=True)
def _two_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_slices_cover_all_rows_in_order() -> None:
    # 2^23 elements at a time: 2^20 rows of 8.
    slices = map_rows((2**21 + 5, 8), lambda rows: rows)

    assert slices == [slice(0, 2**20), slice(2**20, 2**21), slice(2**21, 2**21 + 5)]


def test_wide_rows_still_come_256_at_a_time() -> None:
    assert map_rows((300, 2**20), lambda rows: (rows.start, rows.stop)) == [(0, 256), (256, 300)]


def test_small_chunks_employ_more_cores_in_the_same_memory() -> None:
    torch.set_num_threads(16)
    meet = threading.Barrier(16, timeout=20)

    # 2^21 elements at a time: 2^9 rows of 2^12.
    slices = map_rows((2**13, 2**12), lambda rows: (meet.wait(), rows)[1], small=True)

    assert slices == [slice(first, first + 2**9) for first in range(0, 2**13, 2**9)]


@pytest.mark.parametrize("num_rows", [300, 100], ids=["on-threads", "in-place"])
def test_work_has_one_torch_thread_and_the_caller_keeps_its_own(num_rows: int) -> None:
    inside = map_rows((num_rows, 2**20), lambda _: torch.get_num_threads())

    assert set(inside) == {1}
    assert torch.get_num_threads() == 2


def test_an_error_reaches_the_caller_who_keeps_the_threads() -> None:
    def fail(rows: slice) -> None:
        raise ValueError(f"rows from {rows.start}")

    with pytest.raises(ValueError, match="rows from 0"):
        map_rows((300, 2**20), fail)

    assert torch.get_num_threads() == 2
