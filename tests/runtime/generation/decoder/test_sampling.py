from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_edge.profiles.errors import EngineError, RequestError
from llava_edge.runtime.generation.decoder.sampling import Sampler
from llava_edge.runtime.generation.decoder.topk_logits import TopkLogits
from llava_edge.runtime.generation.generation_config import GenerationConfig

VOCAB = 50


def logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def test_the_default_takes_the_largest_logit() -> None:
    sampler = Sampler(GenerationConfig(), 4, 4)

    assert sampler.choose(np.array([0.0, 3.0, 2.0, 3.0], np.float32)) == 1


def test_greedy_takes_a_padding_row_as_the_reference_does() -> None:
    sampler = Sampler(GenerationConfig(), 4, 3)

    assert sampler.choose(np.array([0.0, 1.0, 2.0, 3.0], np.float32)) == 3


def test_sampling_never_draws_a_padding_row() -> None:
    sampler = Sampler(GenerationConfig(temperature=1.0, seed=0), 4, 3)
    row = np.array([0.0, 0.0, 0.0, 50.0], np.float32)

    assert {sampler.choose(row) for _ in range(50)} == {0, 1, 2}


@pytest.mark.parametrize("top_k", [0, 2])
def test_sampling_never_draws_the_place_of_an_image(top_k: int) -> None:
    sampler = Sampler(GenerationConfig(temperature=1.0, top_k=top_k, seed=0), 4, 4, never=[1, 9])
    row = np.array([1.0, 50.0, 1.0, 0.5], np.float32)

    drawn = {sampler.choose(row) for _ in range(80)}

    assert drawn == ({0, 2, 3} if top_k == 0 else {0, 2})


@pytest.mark.parametrize("temperature", [1e-308, 5e-324, 1e-30])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    for seed in range(20):
        sampler = Sampler(GenerationConfig(temperature=temperature, seed=seed), VOCAB, VOCAB)

        assert sampler.choose(logits(seed)) == int(np.argmax(logits(seed)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(temperature: float, value: float) -> None:
    row = logits(0)
    row[7] = value

    with pytest.raises(EngineError, match="not finite"):
        Sampler(GenerationConfig(temperature=temperature, seed=0), VOCAB, VOCAB).choose(row)


@pytest.mark.parametrize("penalty", [1e-300, 1e300, 0.0])
def test_a_penalty_that_would_overflow_is_refused(penalty: float) -> None:
    with pytest.raises(RequestError, match="repetition_penalty"):
        GenerationConfig(repetition_penalty=penalty)


@pytest.mark.parametrize("option", ["top_k", "seed"])
@pytest.mark.parametrize("value", [-1, 2.5, True, "3"])
def test_counts_must_be_whole_numbers(option: str, value: object) -> None:
    with pytest.raises(RequestError, match=option):
        GenerationConfig(**{option: value})  # type: ignore[arg-type]


def test_equal_seeds_draw_equal_tokens() -> None:
    rows = [logits(seed) for seed in range(20)]
    options = GenerationConfig(temperature=1.0, seed=7)
    first, second = (Sampler(options, VOCAB, VOCAB) for _ in range(2))

    assert [first.choose(row) for row in rows] == [second.choose(row) for row in rows]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.5, 12, 0.3), (1.0, 1000, 1e-6)],
)
def test_probabilities_equal_those_of_the_reference(
    temperature: float, top_k: int, top_p: float
) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    for seed in range(30):
        row = logits(seed)
        reference = torch.softmax(warpers(None, torch.tensor(row)[None]), -1)[0].numpy()

        ids, weights = Sampler(
            GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p, seed=0),
            VOCAB,
            VOCAB,
        ).probabilities(row)

        ours = np.zeros(VOCAB)
        ours[ids] = weights
        np.testing.assert_allclose(ours, reference, atol=1e-6)
        assert ((ours > 0) == (reference > 0)).all()


def test_repetition_penalty_equals_the_reference_over_prompt_and_answer() -> None:
    options = GenerationConfig(repetition_penalty=1.7)
    prompt = np.array([3, 9, 9, 41])
    sampler = Sampler(options, VOCAB, VOCAB, prompt)
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    ids = prompt.tolist()
    for seed in range(40):
        row = logits(seed)
        expected = int(processor(torch.tensor([ids]), torch.tensor(row)[None]).argmax())

        token = sampler.choose(row)

        assert token == expected
        ids.append(token)


def test_drawn_frequencies_follow_the_probabilities() -> None:
    sampler = Sampler(GenerationConfig(temperature=1.0, seed=3), 3, 3)
    row = np.log(np.array([0.2, 0.3, 0.5], np.float32))

    counts = np.bincount([sampler.choose(row) for _ in range(4000)], minlength=3)

    # Four standard deviations of a binomial with n = 4000 are below 0.032.
    np.testing.assert_allclose(counts / 4000, [0.2, 0.3, 0.5], atol=0.032)


def test_all_wrong_options_are_named_together() -> None:
    with pytest.raises(RequestError) as caught:
        GenerationConfig(temperature=-1, top_p=0, repetition_penalty=float("nan"))

    for name in ("temperature -1", "top_p 0", "repetition_penalty nan"):
        assert name in str(caught.value)


def best_of(row: np.ndarray, count: int, backwards: bool) -> TopkLogits:
    """What a TopK gives; among equal logits any order and any choice is allowed."""
    ids = np.arange(row.size)
    order = np.lexsort((-ids if backwards else ids, -row))[:count]
    return TopkLogits(row[order], order, lambda: row)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.integers(-2, 2), min_size=12, max_size=12),
    st.integers(1, 12),
    st.booleans(),
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.7, 1.5]),
            "top_k": st.integers(0, 6),
            "top_p": st.sampled_from([0.5, 1.0]),
            "repetition_penalty": st.sampled_from([1.0, 1.3]),
        }
    ),
)
def test_the_best_logits_give_the_token_that_all_of_them_give(
    values: list[int], count: int, backwards: bool, asked: dict[str, Any]
) -> None:
    # Halves, so that ties come often; the last tokens are padding and one is an image's place.
    row = np.array(values, np.float32) / 2
    of_all, of_best = (
        Sampler(GenerationConfig(**asked, seed=3), 12, 10, np.array([1]), never=[2])
        for _ in range(2)
    )

    for _ in range(8):
        assert of_best.choose(best_of(row, count, backwards)) == of_all.choose(row)


@pytest.mark.parametrize("asked", [{}, {"temperature": 1.0, "top_k": 3}])
def test_all_logits_are_not_read_where_the_best_decide(asked: dict[str, Any]) -> None:
    sampler = Sampler(GenerationConfig(**asked, seed=1), VOCAB, VOCAB)

    def read_all() -> np.ndarray:
        raise AssertionError("all logits were read")

    assert sampler.needs_few
    assert (
        sampler.choose(TopkLogits(best_of(logits(1), 8, False).values, np.arange(8), read_all)) < 8
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_best_logits_that_are_not_finite_are_an_error(value: float) -> None:
    row = np.array([value, 1.0, 0.0], np.float32)
    best = TopkLogits(row[:2], np.arange(2), lambda: row)

    with pytest.raises(EngineError, match="not finite"):
        Sampler(GenerationConfig(), 3, 3).choose(best)
