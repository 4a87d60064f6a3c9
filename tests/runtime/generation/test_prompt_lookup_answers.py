"""Whole answers with prompt lookup beside plain ones, at every precision of the CPU."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_edge.bench.lab.pages.drawing.sample import Sample, held_out_sample
from llava_edge.bench.lab.pages.training.checkpoint import SHIPPED
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.plan import QuantizationRequest
from llava_edge.profiles.errors import EngineError, RequestError
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.cli.run import main
from llava_edge.runtime.generation import engine
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.generation.decoder.prompt_lookup import PromptLookup
from tests.support.conversion_cache import ConversionCache

PRECISIONS = ("fp16", "int8", "int4")
LOOKUP = 10
QUESTION = "Say one two three four five"
NOISE = {"fp16": 1e-5, "int8": 0.02, "int4": 0.02}
"""How far logits of a run of several positions may lie from a step's, over their range: float sums
go in another order (3e-6), and where activations are rounded that moves a value by a step."""


@pytest.fixture(scope="module", params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def open_quickly(conversion_cache: ConversionCache) -> Iterator[Callable[..., LlavaEdge]]:
    """``open_quickly(checkpoint, precision)``: rounded weights, tower in float, loaded once."""
    models: dict[tuple[Path, str], LlavaEdge] = {}

    def opened(checkpoint: Path, precision: str) -> LlavaEdge:
        if (checkpoint, precision) not in models:
            quickly = ConvertRequest(
                str(checkpoint),
                wishes=PlanRequest(precision=precision, vision_precision="fp16"),  # type: ignore[arg-type]
                quantization=QuantizationRequest("rtn"),
                verify="none",
            )
            artifact = conversion_cache.convert(quickly)
            models[checkpoint, precision] = LlavaEdge.load(artifact, threads=1)
        return models[checkpoint, precision]

    yield opened
    for each in models.values():
        each.close()


@pytest.fixture
def random_model(
    precision: str, make_checkpoint: Callable[..., Path], open_quickly: Callable[..., LlavaEdge]
) -> LlavaEdge:
    return open_quickly(make_checkpoint("odd", backbone="mistral"), precision)


@pytest.fixture
def trained(precision: str, open_quickly: Callable[..., LlavaEdge]) -> LlavaEdge:
    return open_quickly(SHIPPED, precision)


@pytest.fixture
def model(
    make_checkpoint: Callable[..., Path], open_quickly: Callable[..., LlavaEdge]
) -> LlavaEdge:
    return open_quickly(make_checkpoint("odd", backbone="mistral"), "fp16")


def samples(*, copies: bool, count: int) -> list[Sample]:
    drawn = (held_out_sample(3, index) for index in range(1000))
    kinds = (sample for sample in drawn if (sample.questions[0].kind == "copy") == copies)
    return [next(kinds) for _ in range(count)]


@pytest.mark.parametrize("copies", [True, False])
def test_the_trained_model_answers_the_same(trained: LlavaEdge, copies: bool) -> None:
    plain_tokens = drafted = accepted = 0
    for sample in samples(copies=copies, count=4):
        question, images = sample.questions[0].text, [sample.image]
        plain = trained.generate(question, images)

        answer = trained.generate(question, images, prompt_lookup_num_tokens=LOOKUP)

        assert answer.token_ids == plain.token_ids
        assert (answer.text, answer.finish_reason) == (plain.text, plain.finish_reason)
        assert (plain.draft_tokens, plain.accepted_tokens) == (0, 0)
        plain_tokens += len(plain.token_ids)
        drafted += answer.draft_tokens
        accepted += answer.accepted_tokens
    if copies:
        assert drafted >= accepted > 0.6 * plain_tokens
    else:
        # A few letters that stand in the question as well.
        assert drafted < 0.5 * plain_tokens


def plant(patch: pytest.MonkeyPatch, answer: Sequence[int]) -> None:
    """Look drafts up in an answer as well, as if it stood before the prompt.

    Random weights copy nothing from a prompt; with this their answers do.
    """

    def planted(ids: Sequence[int], places: Sequence[int]) -> PromptLookup:
        return PromptLookup([*answer, *ids], places)

    patch.setattr(engine, "PromptLookup", planted)


def test_a_random_model_chooses_what_is_best_or_as_good(
    random_model: LlavaEdge, precision: str, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = random_model.generate(QUESTION, [picture], max_new_tokens=80)
    plant(monkeypatch, plain.token_ids)

    answer = random_model.generate(
        QUESTION, [picture], max_new_tokens=80, prompt_lookup_num_tokens=LOOKUP
    )

    rows = random_model.teacher_forced_logits(QUESTION, [picture], answer.token_ids[:-1])
    # The rule of comparing tokens: where the two best are closer than the noise, either will do.
    lacking = rows.max(1) - rows[np.arange(len(rows)), list(answer.token_ids)]
    assert (lacking <= 2 * NOISE[precision] * (rows.max(1) - rows.min(1))).all()
    assert np.mean(lacking == 0) >= 0.9
    assert answer.accepted_tokens > 20


def test_sampling_draws_the_same_tokens(
    random_model: LlavaEdge, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"temperature": 0.7, "repetition_penalty": 1.2, "max_new_tokens": 40}
    same, accepted = [], 0
    for seed in range(3 if precision == "fp16" else 9):
        plain = random_model.generate(QUESTION, seed=seed, **options)
        with monkeypatch.context() as patch:
            plant(patch, plain.token_ids)
            answer = random_model.generate(
                QUESTION, prompt_lookup_num_tokens=LOOKUP, seed=seed, **options
            )
        pairs = zip(answer.token_ids, plain.token_ids, strict=True)
        same.append(len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))))
        accepted += answer.accepted_tokens

    # Where activations are rounded, a draw beside the edge of two tokens may fall on either side,
    # and from there on the answers differ; of two unrelated ones not even the first is the same.
    assert statistics.median(same) >= (40 if precision == "fp16" else 10)
    assert accepted > 5 * len(same)


@pytest.mark.parametrize("room", [1, 2, 5, 20])
def test_a_full_context_ends_the_answer_where_plain_decoding_does(
    model: LlavaEdge, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = model.count_tokens(QUESTION)
    folder = model.artifact.folder
    with LlavaEdge.load(folder, threads=1, context_tokens=count + room) as small:
        plain = small.generate(QUESTION, max_new_tokens=100)
        plant(monkeypatch, plain.token_ids)
        answer = small.generate(QUESTION, max_new_tokens=100, prompt_lookup_num_tokens=LOOKUP)

    assert answer.finish_reason == plain.finish_reason == "context"
    assert answer.token_ids == plain.token_ids


def test_a_closed_stream_leaves_the_cache_at_what_was_fed(
    model: LlavaEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.generate(QUESTION, max_new_tokens=60)
    plant(monkeypatch, whole.token_ids)
    stream = model.stream(QUESTION, max_new_tokens=60, prompt_lookup_num_tokens=LOOKUP)
    text = "".join(next(stream) for _ in range(12))
    stream.close()

    # A piece may take several tokens; whatever was tried beyond the last one is forgotten.
    fed = model._decoder.length - model.count_tokens(QUESTION)
    decoded = [model._tokenizer.decode(whole.token_ids[: fed + more]) for more in (0, 1)]
    assert len(decoded[0]) <= len(text) <= len(decoded[1])
    assert whole.text.startswith(text)


def test_a_failure_while_drafts_are_checked_ends_this_request_only(
    model: LlavaEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model.generate(QUESTION, max_new_tokens=30)
    plant(monkeypatch, before.token_ids)

    def broken(self: Decoder, rows: object) -> np.ndarray:
        raise EngineError("the engine broke")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "verify_draft", broken)
        with pytest.raises(EngineError, match="the engine broke"):
            model.generate(QUESTION, max_new_tokens=30, prompt_lookup_num_tokens=LOOKUP)

    again = model.generate(QUESTION, max_new_tokens=30, prompt_lookup_num_tokens=LOOKUP)
    assert again.token_ids == before.token_ids


@pytest.mark.parametrize("value", [-1, 33, 1.5, True, "all"])
def test_a_length_that_is_none_is_refused(model: LlavaEdge, value: object) -> None:
    with pytest.raises(RequestError, match=r"prompt_lookup_num_tokens is .* at most 32"):
        model.generate("Hello", prompt_lookup_num_tokens=value)


def test_the_command_says_what_was_looked_up(
    model: LlavaEdge, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, model.generate(QUESTION, max_new_tokens=40).token_ids)
    question = [str(model.artifact.folder), "--prompt", QUESTION, "--max-new-tokens", "40"]

    assert main([*question, "--json", "--prompt-lookup", "8"]) == 0

    printed = capsys.readouterr()
    answer = json.loads(printed.out.splitlines()[-1])
    assert answer["draft_tokens"] >= answer["accepted_tokens"] > 0
    assert f"{answer['accepted_tokens']} looked up" in printed.err
