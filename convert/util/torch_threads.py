"""How many threads torch computes with, for the time of a block or a function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llava_edge.profiles.boards.cpu_limit import read_cpu_limit


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many; what it had before comes back at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def allowed_torch_threads() -> Iterator[None]:
    """At most as many as this process may use: torch heeds affinity, but no CPU quota."""
    with torch_threads(min(torch.get_num_threads(), read_cpu_limit().threads)):
        yield
