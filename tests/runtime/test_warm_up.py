"""What a GPU runs before the first request, here by the same graphs on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_edge.profiles.buffers import runs_before_requests
from llava_edge.profiles.errors import EngineError, OutOfMemoryError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.decoder import Decoder
from llava_edge.runtime.session import Buffer, Session
from llava_edge.runtime.vision import VisionEncoder
from llava_edge.runtime.warm_up import warm_up

CONTEXT, CHUNK, BATCH = 700, 512, 5


class Asked:
    """Shapes of what tower and decoder were given, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiles: list[int] = []
        self.prompts: list[tuple[int, int]] = []
        self.steps: list[int] = []
        encode, chunk = VisionEncoder._encode_batch, Decoder._run_chunk
        try_steps, step = Decoder.try_steps, Decoder.step

        def note_encode(encoder: VisionEncoder, tiles: Any, out: Any) -> None:
            self.tiles.append(len(tiles))
            encode(encoder, tiles, out)

        def note_chunk(decoder: Decoder, rows: Buffer, num_tokens: int, keep: int) -> Buffer:
            self.prompts.append((decoder.length, num_tokens))
            return chunk(decoder, rows, num_tokens, keep)

        def note_several(decoder: Decoder, rows: Any) -> Any:
            self.steps.append(len(rows))
            return try_steps(decoder, rows)

        def note_step(decoder: Decoder, row: Any) -> Any:
            self.steps.append(1)
            return step(decoder, row)

        monkeypatch.setattr(VisionEncoder, "_encode_batch", note_encode)
        monkeypatch.setattr(Decoder, "_run_chunk", note_chunk)
        monkeypatch.setattr(Decoder, "try_steps", note_several)
        monkeypatch.setattr(Decoder, "step", note_step)


@pytest.fixture
def model(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> Iterator[LlavaEdge]:
    folder = make_artifact(make_checkpoint("odd"), profile="a100", context_tokens=CONTEXT)
    with LlavaEdge.load(folder, "cpu", allow_slow=True) as model:
        model._decoder.chunk_tokens = CHUNK
        model._tower.encoder._tiles_per_batch = BATCH  # type: ignore[union-attr]
        yield model


def run(model: LlavaEdge) -> None:
    warm_up(model._tower.encoder, model._decoder, model.artifact.manifest.model, BATCH)


def test_the_largest_runs_come_first_and_leave_nothing_behind(
    model: LlavaEdge, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model.generate("What?", [picture], max_new_tokens=12)
    model._decoder.rewind(0)
    asked = Asked(monkeypatch)

    run(model)

    assert asked.tiles == [BATCH]
    assert asked.prompts[0] == (0, CHUNK)
    assert [tokens for _, tokens in asked.prompts[1:]] == list(runs_before_requests(CHUNK))
    # Only the first of them is a first chunk, and none is longer than the cache.
    assert all(0 < start <= CONTEXT - tokens for start, tokens in asked.prompts[1:])
    assert asked.steps == [33, 1]
    assert model._decoder.length == 0
    after = model.generate("What?", [picture], max_new_tokens=12)
    assert after.token_ids == before.token_ids


def test_what_stays_in_the_cache_is_finite(model: LlavaEdge) -> None:
    run(model)

    cache = model._decoder.cache
    cache.length = CONTEXT
    assert all(np.isfinite(cache.part(0, name)).all() for name in ("key", "value"))


@pytest.mark.parametrize("context", [1, 2, 40])
def test_a_context_shorter_than_any_chunk_does(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    context: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_artifact(make_checkpoint("odd"), profile="a100", context_tokens=CONTEXT)
    with LlavaEdge.load(folder, "cpu", allow_slow=True, context_tokens=context) as model:
        asked = Asked(monkeypatch)
        run(model)
        assert asked.prompts[0] == (0, context)
        assert all(start + tokens <= context for start, tokens in asked.prompts)
        assert asked.steps == [min(33, context), 1]


def test_what_does_not_fit_is_left_to_requests(
    model: LlavaEdge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Asked(monkeypatch)
    real = Session.run_bound

    def scarce(session: Session, *arguments: Any, **options: Any) -> None:
        if len(asked.prompts) == 1 and not asked.steps:
            raise OutOfMemoryError("memory ran out while running the graph")
        real(session, *arguments, **options)

    monkeypatch.setattr(Session, "run_bound", scarce)

    run(model)

    assert "the largest chunk of a prompt does not fit; smaller ones may" in caplog.text
    assert asked.steps == [33, 1]
    assert model._decoder.length == 0


def test_what_does_not_run_is_an_error(model: LlavaEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise EngineError("no kernel image is available")

    monkeypatch.setattr(Session, "run_bound", broken)

    with pytest.raises(EngineError, match="no kernel image"):
        run(model)
