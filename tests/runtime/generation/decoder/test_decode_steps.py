"""The loop with drafts and without, over a decoder whose logits are the same bits either way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llava_edge.runtime.generation.decoder.decoding import PlainSteps, SpeculativeDecoding
from llava_edge.runtime.generation.decoder.prompt_lookup import PromptLookup
from llava_edge.runtime.generation.decoder.sampling import Sampler
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.generation.loop import LoopResult, generate_tokens

WORDS, PLACE = 7, 6
Array = NDArray[np.float32]


@cache
def logits_behind(before: int, last: int) -> Array:
    logits = np.random.default_rng([before, last]).normal(0, 2, WORDS).astype(np.float32)
    # As in a real answer, images hardly ever come; greedy may take one, as in the reference.
    logits[PLACE] -= 2
    return logits


class ToyDecoder:
    """A cache of ids, and logits that follow from the last two of them."""

    def __init__(self, prompt: Sequence[int], capacity: int) -> None:
        self.capacity = capacity
        self.ids = list(prompt)
        self._trial: list[int] = []
        self.runs = 0
        self.furthest = len(self.ids)

    @property
    def length(self) -> int:
        return len(self.ids)

    def _logits(self, ids: Sequence[int]) -> Array:
        return logits_behind(*([0, 0, *ids][-2:]))

    def step(self, row: Array) -> Array:
        return self.verify_draft(row[None])[0]

    def verify_draft(self, rows: Array) -> Array:
        tokens = [int(row[0]) for row in rows]
        assert self.length + len(tokens) <= self.capacity
        assert PLACE not in tokens[1:]
        self.runs += 1
        self.furthest = max(self.furthest, self.length + len(tokens))
        found = [self._logits(self.ids + tokens[: at + 1]) for at in range(len(tokens))]
        self.ids.append(tokens[0])
        self._trial = tokens[1:]
        return np.stack(found)

    def accept(self) -> None:
        self.ids.append(self._trial.pop(0))


def embed(tokens: Sequence[int]) -> Array:
    return np.array(tokens, np.float32)[:, None]


def answer(
    prompt: Sequence[int],
    capacity: int,
    most: int,
    options: GenerationConfig,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    consume: int | None = None,
) -> tuple[list[int], LoopResult, ToyDecoder, Any]:
    decoder: Any = ToyDecoder(prompt, capacity)
    steps = PlainSteps(decoder, embed)
    if most:
        steps = SpeculativeDecoding(decoder, embed, PromptLookup(prompt, [PLACE]), most)
    sampler = Sampler(options, WORDS, WORDS, np.array(prompt), [PLACE])
    result = LoopResult()
    first = decoder._logits(prompt)
    tokens = generate_tokens(steps, first, sampler, frozenset(stop_ids), max_new_tokens, result)
    found = [token for token, _ in zip(tokens, range(consume or 10**6), strict=False)]
    return found, result, decoder, steps


_prompts = st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=30)
_options = st.builds(
    GenerationConfig,
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    top_k=st.sampled_from([0, 3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    seed=st.integers(0, 5),
)


@settings(max_examples=300, deadline=None)
@given(
    _prompts,
    st.integers(0, 40),
    st.integers(1, 12),
    _options,
    st.lists(st.integers(0, 5), max_size=1),
    st.integers(1, 50),
)
def test_drafts_change_nothing_but_the_number_of_runs(
    prompt: list[int],
    room: int,
    most: int,
    options: GenerationConfig,
    stop_ids: list[int],
    max_new_tokens: int,
) -> None:
    given_ = (options, stop_ids, max_new_tokens)
    plain, plain_result, plain_decoder, _ = answer(prompt, len(prompt) + room, 0, *given_)

    drafted, result, decoder, steps = answer(prompt, len(prompt) + room, most, *given_)

    assert drafted == plain
    assert result.finish_reason == plain_result.finish_reason
    assert result.num_tokens == plain_result.num_tokens
    assert decoder.ids == plain_decoder.ids == prompt + plain[:-1]
    assert steps.accepted <= steps.drafted
    assert decoder.runs == plain_decoder.runs - steps.accepted
    # The last token of an answer is chosen and not fed, so nothing behind it is worth computing.
    assert decoder.furthest <= len(prompt) + max_new_tokens - 1


@settings(max_examples=100, deadline=None)
@given(_prompts, st.integers(1, 12), st.integers(1, 20))
def test_an_answer_that_is_left_holds_what_was_fed_and_no_more(
    prompt: list[int], most: int, consume: int
) -> None:
    plain, *_ = answer(prompt, 200, 0, GenerationConfig(), (), 60)

    found, _, decoder, _ = answer(prompt, 200, most, GenerationConfig(), (), 60, consume)

    assert found == plain[:consume]
    # The loop stands behind the token it yielded last, which was not fed yet.
    assert decoder.ids[: len(prompt) + consume - 1] == prompt + plain[: consume - 1]
    assert decoder.length <= len(prompt) + consume


def test_text_that_repeats_takes_fewer_runs() -> None:
    prompt = [1, 2, 3]

    plain, _, plain_decoder, _ = answer(prompt, 300, 0, GenerationConfig(), (), 200)
    drafted, _, decoder, steps = answer(prompt, 300, 10, GenerationConfig(), (), 200)

    # A greedy walk over pairs of seven words must return; from then on every draft holds.
    assert drafted == plain
    assert PLACE not in plain[100:]
    assert decoder.runs < plain_decoder.runs / 3
    assert steps.accepted > 100
