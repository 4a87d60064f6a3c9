"""What a GPU runs before the first request, here by the same graphs on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_edge.profiles.errors import EngineError, OutOfMemoryError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.backends.cuda_options import CudaOptions
from llava_edge.runtime.backends.onnxruntime import Buffer, Session
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.generation.warmup import LEAST_CHUNK, warm_up
from llava_edge.runtime.vision.encoder import VisionEncoder
from tests.support import fake_cudart

CONTEXT, CHUNK, BATCH = 700, 512, 5


class Asked:
    """Shapes of what tower and decoder were given, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiles: list[int] = []
        self.prompts: list[tuple[int, int]] = []
        self.steps: list[int] = []
        encode, chunk = VisionEncoder._encode_batch, Decoder._run_chunk
        verify_draft, step = Decoder.verify_draft, Decoder.step

        def note_encode(encoder: VisionEncoder, tiles: Any, out: Any) -> None:
            self.tiles.append(len(tiles))
            encode(encoder, tiles, out)

        def note_chunk(decoder: Decoder, rows: Buffer, num_tokens: int, keep: int) -> Buffer:
            self.prompts.append((decoder.length, num_tokens))
            return chunk(decoder, rows, num_tokens, keep)

        def note_several(decoder: Decoder, rows: Any) -> Any:
            self.steps.append(len(rows))
            return verify_draft(decoder, rows)

        def note_step(decoder: Decoder, row: Any) -> Any:
            self.steps.append(1)
            return step(decoder, row)

        monkeypatch.setattr(VisionEncoder, "_encode_batch", note_encode)
        monkeypatch.setattr(Decoder, "_run_chunk", note_chunk)
        monkeypatch.setattr(Decoder, "verify_draft", note_several)
        monkeypatch.setattr(Decoder, "step", note_step)


@pytest.fixture
def model(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> Iterator[LlavaEdge]:
    folder = make_artifact(make_checkpoint("odd"), profile="a100", context_tokens=CONTEXT)
    with LlavaEdge.load(folder, "cpu", allow_slow=True) as model:
        model._decoder.chunk_tokens = CHUNK
        model._tower.encoder.tiles_per_batch = BATCH  # type: ignore[union-attr]
        yield model


def run(model: LlavaEdge) -> tuple[str, ...]:
    return warm_up(model._tower.encoder, model._decoder, model.artifact.manifest.model)


def test_the_largest_runs_come_first_and_leave_nothing_behind(
    model: LlavaEdge, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model.generate("What?", [picture], max_new_tokens=12)
    model._decoder.rewind(0)
    asked = Asked(monkeypatch)

    assert run(model) == ()

    assert asked.tiles == [BATCH]
    # The first chunk of a prompt, and one behind it that ends where the cache does.
    assert asked.prompts == [(0, CHUNK), (CONTEXT - CHUNK, CHUNK)]
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


class Scarce:
    """Memory for runs of so many tiles, positions and logits, and of no more."""

    def __init__(self, patch: pytest.MonkeyPatch, tiles: int, tokens: int, logits: int) -> None:
        encode, chunk, several = (
            VisionEncoder._encode_batch,
            Decoder._run_chunk,
            Decoder.verify_draft,
        )

        def allow(asked: int, most: int) -> None:
            if asked > most:
                raise OutOfMemoryError(f"memory ran out for {asked}")

        def encode_batch(encoder: VisionEncoder, pixels: Any, out: Any) -> None:
            allow(len(pixels), tiles)
            encode(encoder, pixels, out)

        def run_chunk(decoder: Decoder, rows: Buffer, num_tokens: int, keep: int) -> Buffer:
            allow(num_tokens, tokens)
            return chunk(decoder, rows, num_tokens, keep)

        def verify_draft(decoder: Decoder, rows: Any) -> Any:
            allow(len(rows), logits)
            return several(decoder, rows)

        patch.setattr(VisionEncoder, "_encode_batch", encode_batch)
        patch.setattr(Decoder, "_run_chunk", run_chunk)
        patch.setattr(Decoder, "verify_draft", verify_draft)


def test_what_does_not_fit_is_done_in_smaller_parts(
    model: LlavaEdge, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"max_new_tokens": 12, "prompt_lookup_num_tokens": 8}
    whole = model.generate("What? What? What?", [picture], **asked)
    model._decoder.rewind(0)
    Scarce(monkeypatch, tiles=2, tokens=70, logits=1)

    said = run(model)

    assert [line.partition(":")[0] for line in said] == [
        "tiles encoded 2 at once, not 5",
        "prompts computed by 64 tokens at once, not 512",
        "no draft is checked ahead",
    ]
    assert "memory ran out for 512" not in said[1]
    assert "memory ran out for 128" in said[1]
    assert model._decoder.length == 0
    again = model.generate("What? What? What?", [picture], **asked)
    assert again.prompt_tokens > 64
    assert again.token_ids == whole.token_ids
    assert again.draft_tokens == 0


def test_where_not_even_the_least_fits_requests_find_out(
    model: LlavaEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scarce(monkeypatch, tiles=0, tokens=10, logits=0)

    said = run(model)

    assert said[1].startswith(f"prompts computed by {LEAST_CHUNK} tokens at once, not 512")
    assert model.generate("?", max_new_tokens=2, raw=True).token_ids
    with pytest.raises(OutOfMemoryError):
        model.generate("What? " * 30, max_new_tokens=2)


def test_what_was_given_up_is_said_by_the_model_and_by_every_answer(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_artifact(make_checkpoint("odd"), profile="a100", context_tokens=CONTEXT)
    fake_cudart.install(monkeypatch, fake_cudart.FakeCudart(), None)
    monkeypatch.setattr(
        "llava_edge.runtime.loading.placement.available_devices", lambda: ("cuda", "cpu")
    )
    Scarce(monkeypatch, tiles=8, tokens=100, logits=99)

    for ready in (True, False):
        with LlavaEdge.load(folder, "cuda", engine="ort", cuda=CudaOptions(warm_up=ready)) as model:
            found = [line.partition(":")[0] for line in model.degraded]
            assert found == (["prompts computed by 87 tokens at once, not 700"] if ready else [])
            assert model.generate("What?", max_new_tokens=2).degraded == model.degraded


def test_what_does_not_run_is_an_error(model: LlavaEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise EngineError("no kernel image is available")

    monkeypatch.setattr(Session, "run_bound", broken)

    with pytest.raises(EngineError, match="no kernel image"):
        run(model)
