from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llava_edge.convert import pipeline
from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.util import torch_threads
from llava_edge.profiles.boards.cpu_limit import CpuLimit
from llava_edge.profiles.errors import CheckpointError


@pytest.fixture(autouse=True)
def _two_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("limit", "threads"),
    [(CpuLimit(8, 8, 8, quota=1.0), 1), (CpuLimit(8, 1, 1), 1), (CpuLimit(8, 8, 8), 2)],
)
def test_conversion_computes_with_as_many_threads_as_are_allowed(
    monkeypatch: pytest.MonkeyPatch, limit: CpuLimit, threads: int
) -> None:
    seen = []

    def opened(*_: object) -> None:
        seen.append(torch.get_num_threads())
        raise CheckpointError("enough was seen")

    monkeypatch.setattr(torch_threads, "read_cpu_limit", lambda: limit)
    monkeypatch.setattr(pipeline, "inspect_checkpoint", opened)
    with pytest.raises(CheckpointError):
        convert_checkpoint(ConvertRequest("x"), lambda *_: None, print)
    assert seen == [threads]
    assert torch.get_num_threads() == 2
