"""TopkLogits: the largest logits of a step, and all of them for callers that ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llava_edge.runtime.util.arrays import Array


@dataclass(frozen=True)
class TopkLogits:
    """What a graph picked out on its device.

    Attributes:
        values: float32 (n,), by falling value; no other token's is larger than the last.
        ids: int64 (n,), whose they are. Among equal values any order may come.
        read_all: copies float32 (vocab,) to the host; valid until the next step.
    """

    values: Array
    ids: Array
    read_all: Callable[[], Array]
