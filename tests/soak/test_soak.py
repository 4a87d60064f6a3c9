"""A soak of seconds: the same requests as ``make soak``, on a smaller model."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_edge.runtime import LlavaEdge
from tests.soak.requests import Questions
from tests.soak.run import MIB, Sample, Soaked, soak

TEXTS = ("What is this?", "Which colour is on the left?", "Read the second line.")


@pytest.fixture(scope="module")
def model(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> Iterator[LlavaEdge]:
    artifact = make_artifact(make_checkpoint("odd", backbone="mistral"))
    with LlavaEdge.load(artifact, threads=1, vision_cache_bytes=MIB // 4) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def given() -> Questions:
    random = np.random.default_rng(3)
    pictures = [
        Image.fromarray(random.integers(0, 256, (60 + 9 * n, 90, 3), np.uint8)) for n in range(6)
    ]
    return Questions(pictures, TEXTS, 6)


def test_requests_of_every_kind_leave_nothing_behind(model: LlavaEdge, given: Questions) -> None:
    found = soak(model, given, 240, every=40)

    assert found.failures == []
    assert (found.other_answers, found.num_probes) == (0, 6)
    warm, end = found.samples[1], found.samples[-1]
    assert end.files == found.samples[0].files
    assert end.threads == found.samples[0].threads
    # Some MiB of arenas and caches move; a request that kept its pixels would be seen.
    assert end.in_use - warm.in_use < 4 * MIB
    gc.collect()
    assert model._queue._holder is None
    assert not model._queue._waiting


def test_what_a_request_leaves_behind_is_seen(model: LlavaEdge, given: Questions) -> None:
    kept: list[Any] = []

    def leaky(prompt: str, images: Any = (), **options: Any) -> Any:
        kept.append((os.open("/dev/null", os.O_RDONLY), np.ones(MIB // 4)))
        return SimpleNamespace(text=f"{len(kept)}")

    stub: Any = SimpleNamespace(
        **{name: getattr(model, name) for name in ("stream", "chat", "count_tokens")},
        generate=leaky,
    )
    try:
        found = soak(stub, given, 120, every=40)
    finally:
        for descriptor, _ in kept:
            os.close(descriptor)

    assert found.failures
    assert found.other_answers == 3
    assert found.samples[-1].files > found.samples[0].files + 20
    assert found.growth("in_use") > 20 * MIB


def test_growth_is_the_slope_behind_the_warm_up() -> None:
    filling = [Sample(n, 10**9 * n, 0, 0, 0) for n in (1, 2)]
    settled = [Sample(n, 5 * n, 7, 0, 0) for n in range(3, 11)]

    found = Soaked(filling + settled)

    assert found.growth("resident") == pytest.approx(5 * 7)
    assert found.growth("in_use") == pytest.approx(0, abs=1e-9)
