from __future__ import annotations

from pathlib import Path

import pytest

from llava_edge.convert.checkpoint.hub import preflight
from llava_edge.convert.checkpoint.hub.download import DownloadPlan
from llava_edge.convert.checkpoint.hub.preflight import (
    check_download,
    conversion_needs,
    largest_convertible,
)
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.models.variants import find_variant

GIB = 1 << 30


def download(repo_id: str, disk_free: int) -> DownloadPlan:
    variant = find_variant(repo_id)
    return DownloadPlan(
        repo_id=repo_id,
        revision="a" * 40,
        files=(),
        total_bytes=variant.fp16_bytes,
        bytes_to_fetch=variant.fp16_bytes,
        disk_free_bytes=disk_free,
        cache_dir=Path("/nowhere"),
    )


def test_needs_are_the_checkpoint_the_artifact_and_four_copies_of_the_largest_tensor() -> None:
    variant = find_variant("llava-v1.6-mistral-7b")

    needs = conversion_needs(variant.dims, variant.parameters, 1000)

    assert needs.disk_bytes == 1000 + 2 * variant.parameters
    # The head, 32,064 x 4,096, is larger than gate (4,096 x 14,336).
    assert needs.memory_bytes == preflight.PROCESS_BYTES + 4 * 2 * 32064 * 4096


def test_everything_is_said_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "available_host_bytes", lambda: 64 * GIB)
    monkeypatch.setattr(preflight, "_disk_free", lambda folder: 100 * GIB)
    said: list[str] = []

    check_download(download("llava-hf/llava-v1.6-mistral-7b-hf", 100 * GIB), tmp_path, said.append)

    text = "\n".join(said)
    for part in ("llava-hf/llava-v1.6-mistral-7b-hf", "a" * 40, "14.1 GiB", "100.0 GiB", "64.0"):
        assert part in text


def test_a_host_that_is_too_small_names_the_largest_it_can_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "available_host_bytes", lambda: 64 * GIB)
    monkeypatch.setattr(preflight, "_disk_free", lambda folder: 40 * GIB)

    with pytest.raises(RequestError, match=r"disk: .* is llama3-llava-next-8b\."):
        check_download(
            download("llava-hf/llava-v1.6-34b-hf", 40 * GIB), tmp_path, lambda line: None
        )


def test_nothing_can_be_converted_without_memory() -> None:
    assert largest_convertible(1 << 50, 1 << 20) is None
    largest = largest_convertible(1 << 50, None)
    assert largest is not None
    assert largest.name == "llava-next-110b"
