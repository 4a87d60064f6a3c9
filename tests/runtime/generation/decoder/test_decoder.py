from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.onnx.decoder import build_decoder_graph, rope_tables
from llava_edge.convert.onnx.int8_kv_cache import (
    INT8_CACHE_FILE,
    CacheScales,
    write_int8_cache_graph,
)
from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
from llava_edge.convert.testing.random_spec import preset
from llava_edge.profiles.errors import EngineError, OutOfMemoryError, PromptError, RequestError
from llava_edge.profiles.models.model_dims import TextDims
from llava_edge.runtime.backends.onnxruntime import Binding, Session, SessionOptions
from llava_edge.runtime.generation.decoder.decoder import Decoder, FillEmbeddings

CONTEXT = 96
CHUNK_BOUND = 1e-4
"""Kernel bound of chunked against whole prefill, absolute, logits of about ±10: the largest gap
measured was 3e-6."""


@pytest.fixture(scope="module", params=["float32", "int8"])
def graph(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, TextDims]:
    folder = tmp_path_factory.mktemp("decoder")
    write_random_checkpoint(folder / "checkpoint", preset("odd"), seed=3)
    checkpoint = open_checkpoint(folder / "checkpoint")
    text = checkpoint.dims.text
    build = build_decoder_graph(text, checkpoint, np.float32, CONTEXT)
    build.save(folder)
    spec = build.spec("model.onnx")
    if request.param == "int8":
        # Keys and values of these embeddings lie within about 3.
        shape = (text.num_hidden_layers, text.num_key_value_heads, text.head_dim)
        scales = np.full(shape, 4 / 127, np.float32)
        spec = write_int8_cache_graph(folder, spec, text, CacheScales(scales, scales))
    return folder / spec.file, text


def make_decoder(graph: tuple[Path, TextDims], chunk_tokens: int) -> Decoder:
    path, text = graph
    session = Session(path, SessionOptions(threads=1))
    int8_cache = path.name == INT8_CACHE_FILE
    return Decoder(session, text, CONTEXT, chunk_tokens, np.float32, int8_cache=int8_cache)


def embeddings(text: TextDims, num_tokens: int, seed: int = 0) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    return generator.normal(0, 0.5, (num_tokens, text.hidden_size)).astype(np.float32)


def filler(rows: NDArray[np.float32]) -> FillEmbeddings:
    def fill(start: int, stop: int, out: NDArray[np.float32]) -> None:
        out[...] = rows[start:stop]

    return fill


@pytest.mark.parametrize("chunk", [1, 7, 16, 39, 40])
def test_chunked_prefill_equals_whole_prefill(graph: tuple[Path, TextDims], chunk: int) -> None:
    rows = embeddings(graph[1], 40)
    whole = make_decoder(graph, 64).prefill(40, filler(rows)).copy()

    chunked = make_decoder(graph, chunk).prefill(40, filler(rows))

    assert np.abs(chunked - whole).max() <= CHUNK_BOUND


def test_decode_steps_equal_prefill_of_the_same_positions(graph: tuple[Path, TextDims]) -> None:
    rows = embeddings(graph[1], 30)
    whole = make_decoder(graph, 64).prefill(30, filler(rows), logits_to_keep=30).copy()
    decoder = make_decoder(graph, 64)
    decoder.prefill(20, filler(rows))

    stepped = [decoder.step(row).copy() for row in rows[20:]]

    assert np.abs(np.stack(stepped) - whole[20:]).max() <= CHUNK_BOUND


def test_rewinding_forgets_what_came_after(graph: tuple[Path, TextDims]) -> None:
    rows, others = embeddings(graph[1], 30), embeddings(graph[1], 30, seed=1)
    decoder = make_decoder(graph, 64)
    first = decoder.prefill(30, filler(rows)).copy()
    decoder.rewind(20)
    decoder.prefill(10, filler(others))
    decoder.rewind(20)

    again = decoder.prefill(10, filler(rows[20:]))

    np.testing.assert_array_equal(again, first)


def test_several_positions_of_logits_can_be_kept(graph: tuple[Path, TextDims]) -> None:
    rows = embeddings(graph[1], 12)
    decoder = make_decoder(graph, 64)
    every = decoder.prefill(12, filler(rows), logits_to_keep=12).copy()
    decoder.rewind(0)

    last = decoder.prefill(12, filler(rows), logits_to_keep=3)

    assert last.shape == (3, graph[1].vocab_size)
    np.testing.assert_allclose(last, every[-3:], atol=CHUNK_BOUND)


def test_the_cache_is_filled_to_its_last_position_and_no_further(
    graph: tuple[Path, TextDims],
) -> None:
    rows = embeddings(graph[1], CONTEXT)
    decoder = make_decoder(graph, 64)
    decoder.prefill(CONTEXT - 1, filler(rows))
    decoder.step(rows[-1])

    with pytest.raises(PromptError, match="the context of 96 tokens is full"):
        decoder.step(rows[-1])
    with pytest.raises(PromptError, match="1 tokens were asked behind 96; the context holds 96"):
        decoder.prefill(1, filler(rows))


def test_positions_tried_together_have_the_logits_of_steps(graph: tuple[Path, TextDims]) -> None:
    rows = embeddings(graph[1], 30)
    decoder = make_decoder(graph, 64)
    decoder.prefill(20, filler(rows))
    stepped = np.stack([decoder.step(row).copy() for row in rows[20:]])
    decoder.rewind(20)

    # Widest last, then narrower again: memory is bound anew once and shared from then on.
    tried = []
    for start, stop in ((20, 21), (21, 23), (23, 28), (28, 30)):
        tried.append(decoder.verify_draft(rows[start:stop]).copy())
        assert decoder.length == start + 1
        for _ in range(stop - start - 1):
            decoder.accept()
        assert decoder.length == stop

    assert np.abs(np.concatenate(tried) - stepped).max() <= CHUNK_BOUND
    assert len({bound.logits.address for bound in decoder._several.values()}) == 1


def test_positions_on_trial_are_forgotten_unless_confirmed(graph: tuple[Path, TextDims]) -> None:
    rows, others = embeddings(graph[1], 30), embeddings(graph[1], 30, seed=1)
    decoder = make_decoder(graph, 64)
    decoder.prefill(20, filler(rows))
    decoder.verify_draft(np.concatenate([rows[20:22], others[22:26]]))
    decoder.accept()

    found = decoder.step(rows[22]).copy()

    assert decoder.length == 23
    with pytest.raises(ValueError, match="no position is on trial"):
        decoder.accept()
    decoder.rewind(0)
    whole = decoder.prefill(23, filler(rows))[0]
    assert np.abs(found - whole).max() <= CHUNK_BOUND
    decoder.verify_draft(rows[23:26])
    decoder.rewind(23)
    with pytest.raises(ValueError, match="no position is on trial"):
        decoder.accept()


def test_a_trial_that_does_not_fit_or_fails_leaves_the_length(
    graph: tuple[Path, TextDims], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = embeddings(graph[1], CONTEXT + 4)
    decoder = make_decoder(graph, 64)
    decoder.prefill(CONTEXT - 3, filler(rows))

    with pytest.raises(PromptError, match="4 tokens were asked behind 93; the context holds 96"):
        decoder.verify_draft(rows[:4])

    def fail(*_: object, **__: object) -> None:
        raise EngineError("out of luck")

    monkeypatch.setattr(Session, "run_bound", fail)
    with pytest.raises(EngineError, match="out of luck"):
        decoder.verify_draft(rows[CONTEXT - 3 : CONTEXT])
    monkeypatch.undo()
    assert decoder.length == CONTEXT - 3
    with pytest.raises(ValueError, match="no position is on trial"):
        decoder.accept()
    # A step still gives one row of logits.
    assert decoder.step(rows[CONTEXT - 3]).shape == (graph[1].vocab_size,)
    assert decoder.verify_draft(rows[CONTEXT - 2 : CONTEXT]).shape == (2, graph[1].vocab_size)


def test_a_shortened_decoder_is_one_made_so_and_keeps_nothing_of_before(
    graph: tuple[Path, TextDims],
) -> None:
    rows, others = embeddings(graph[1], 30), embeddings(graph[1], 30, seed=1)
    decoder = make_decoder(graph, 64)
    decoder.prefill(20, filler(rows))
    expected = decoder.verify_draft(rows[20:24]).copy()
    decoder.rewind(0)
    decoder.prefill(20, filler(others))
    old = weakref.ref(decoder.cache._buffers["0.key"])

    decoder.shorten(26)

    assert old() is None
    assert (decoder.capacity, decoder.length) == (26, 0)
    decoder.prefill(20, filler(rows))
    np.testing.assert_array_equal(decoder.verify_draft(rows[20:24]), expected)
    decoder.rewind(20)
    for row in rows[20:26]:
        decoder.step(row)
    with pytest.raises(PromptError, match="context of 26 tokens is full"):
        decoder.step(rows[26])
    for wrong in (0, 26, 40):
        with pytest.raises(ValueError, match="of 26"):
            decoder.shorten(wrong)


@pytest.mark.parametrize("succeeding", [0, 1])
def test_a_cache_that_could_not_be_bound_is_taken_again(
    graph: tuple[Path, TextDims], monkeypatch: pytest.MonkeyPatch, succeeding: int
) -> None:
    rows = embeddings(graph[1], 20)
    decoder = make_decoder(graph, 64)
    expected = decoder.prefill(20, filler(rows)).copy()
    bind, bound = Decoder._bind, []

    def fail(self: Decoder) -> Any:
        bound.append(1)
        if len(bound) > succeeding:
            raise OutOfMemoryError("no room on the device")
        return bind(self)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "_bind", fail)
        for ask in (lambda: decoder.shorten(40), decoder.restore):
            bound.clear()
            with pytest.raises(OutOfMemoryError):
                ask()

    decoder.restore()
    np.testing.assert_array_equal(decoder.prefill(20, filler(rows)), expected)


def test_an_empty_prompt_and_a_forward_rewind_are_refused(graph: tuple[Path, TextDims]) -> None:
    decoder = make_decoder(graph, 64)

    with pytest.raises(PromptError, match="empty prompt"):
        decoder.prefill(0, filler(embeddings(graph[1], 1)))
    with pytest.raises(RequestError, match="cannot rewind a cache of 0 positions to 5"):
        decoder.rewind(5)


def test_rope_tables_equal_the_reference_at_far_positions() -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0},
    )
    positions = torch.arange(32768)[None]
    cosine, sine = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    text = TextDims(
        model_type="llama",
        vocab_size=1,
        hidden_size=256,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_factor=2.5,
        max_position_embeddings=32768,
        hidden_act="silu",
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        sliding_windows=(0,),
        tie_word_embeddings=False,
    )

    ours = rope_tables(text, 32768)

    np.testing.assert_array_equal(ours[0], cosine[0, :, :64].numpy())
    np.testing.assert_array_equal(ours[1], sine[0, :, :64].numpy())


@pytest.fixture(scope="module")
def picking(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TextDims]:
    """The graph for the cuda target: float16, and it picks the best logits out."""
    folder = tmp_path_factory.mktemp("picking")
    write_random_checkpoint(folder / "checkpoint", preset("odd"), seed=3)
    checkpoint = open_checkpoint(folder / "checkpoint")
    text = checkpoint.dims.text
    build_decoder_graph(text, checkpoint, np.float16, CONTEXT, num_best=NUM_BEST).save(folder)
    return folder / "model.onnx", text


NUM_BEST = 9


def picking_decoder(picking: tuple[Path, TextDims]) -> Decoder:
    session = Session(picking[0], SessionOptions(threads=1))
    return Decoder(session, picking[1], CONTEXT, 64, np.float16, NUM_BEST)


def test_the_graph_picks_the_logits_that_the_host_would(picking: tuple[Path, TextDims]) -> None:
    rows = embeddings(picking[1], 30).astype(np.float16)
    decoder = picking_decoder(picking)
    assert decoder.picks_best
    decoder.prefill(20, filler(rows))

    for row in rows[20:]:
        best = decoder.step_best(row)
        every = best.read_all()
        order = np.argsort(-every, kind="stable")[:NUM_BEST]
        np.testing.assert_array_equal(best.ids, order)
        np.testing.assert_array_equal(best.values, every[order])


@pytest.mark.parametrize("captures", [False, True])
def test_steps_are_bound_once_and_run_in_the_same_memory(
    picking: tuple[Path, TextDims], monkeypatch: pytest.MonkeyPatch, captures: bool
) -> None:
    rows = embeddings(picking[1], 40).astype(np.float16)
    decoder = picking_decoder(picking)
    # As a session that records; the provider of the CPU does not.
    decoder._session.captures = captures
    decoder.prefill(20, filler(rows))
    bound: list[str] = []
    runs: list[tuple[int, bool, dict[str, tuple[int, tuple[int, ...]]], bytes]] = []
    real = Session.run_bound

    def run_bound(self: Session, binding: Any, **how: bool) -> None:
        held = {name: (b.address, b.shape) for name, b in decoder._step._bound.items()}
        host = decoder._keep.read().tobytes()
        if captures:
            host += decoder._total.read().tobytes()
        runs.append((id(binding), how["replay"], held, host))
        real(self, binding, **how)

    monkeypatch.setattr(Session, "run_bound", run_bound)
    monkeypatch.setattr(Binding, "input", lambda _, name, __: bound.append(name))
    monkeypatch.setattr(Binding, "output", lambda _, name, __: bound.append(name))
    for row in rows[20:30]:
        decoder.step_best(row)
    decoder.step(rows[30])
    decoder.rewind(3)
    decoder.step_best(rows[31])

    # What a recorded graph holds fast: buffers, shapes, and values in host memory.
    assert bound == []
    assert len(runs) == 12
    assert runs == [runs[0]] * 12
    assert runs[0][1] is True


def test_the_total_is_the_true_one_except_in_what_is_recorded(
    picking: tuple[Path, TextDims], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = embeddings(picking[1], 100).astype(np.float16)
    totals: list[int] = []
    real = Session.run_bound

    def run_bound(self: Session, binding: Any, **how: bool) -> None:
        totals.append(int(decoder._total.read()))
        real(self, binding, **how)

    monkeypatch.setattr(Session, "run_bound", run_bound)
    for captures in (False, True):
        decoder = picking_decoder(picking)
        decoder._session.captures = captures
        decoder.prefill(80, filler(rows))
        decoder.step(rows[80])
        decoder.verify_draft(rows[81:84])
        decoder.rewind(3)
        decoder.step(rows[84])
        decoder.prefill(2, filler(rows[85:87]))
        step = (CONTEXT, CONTEXT) if captures else (81, 4)
        assert totals == [64, 80, step[0], 84, step[1], 6]
        totals.clear()


def test_only_steps_are_replayed(
    picking: tuple[Path, TextDims], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = embeddings(picking[1], 40).astype(np.float16)
    decoder = picking_decoder(picking)
    replayed: list[bool] = []
    real = Session.run_bound

    def run_bound(self: Session, binding: Any, **how: bool) -> None:
        replayed.append(how["replay"])
        real(self, binding, **how)

    monkeypatch.setattr(Session, "run_bound", run_bound)
    decoder.prefill(20, filler(rows))
    decoder.verify_draft(rows[20:23])
    decoder.prefill(1, filler(rows[23:24]))
    decoder.step(rows[24])

    assert replayed == [False, False, False, True]


def test_a_graph_that_picks_nothing_out_says_so(graph: tuple[Path, TextDims]) -> None:
    decoder = make_decoder(graph, 64)

    assert not decoder.picks_best
    with pytest.raises(ValueError, match="does not pick logits out"):
        decoder.step_best(embeddings(graph[1], 1)[0])
