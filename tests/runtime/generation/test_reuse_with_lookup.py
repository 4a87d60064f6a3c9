"""Reuse of what the cache holds and drafts of prompt lookup, together, beside a model with neither.

A draft writes positions that may turn out wrong; what the next request finds in the cache must be
what was said to lie there.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.generation import engine
from llava_edge.runtime.generation.deadline import TimeBudget
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.generation.decoder.prompt_lookup import PromptLookup
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.loading.placement import AskedCache
from llava_edge.runtime.processing.degradation import Degradation
from llava_edge.runtime.processing.request import PromptOptions, Request, VideoInput
from llava_edge.runtime.util.arrays import Array

NUM_TOKENS = 14
NOISE = 1e-5
"""Of the range of the logits: float32 sums in another order."""
WORDS = ("one ", "two ", "three ")


def noise(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (56, 56, 3), np.uint8))


IMAGES = [noise(1), noise(2)]
VIDEOS = [[noise(3), noise(4)], [noise(3), noise(5)]]


@dataclass(frozen=True)
class Asked:
    """One request of a history.

    Attributes:
        segments: of the prompt, behind what is kept of the conversation before.
        image: shown at ``<image>``.
        video: shown at ``<video>``.
        kept: go on behind the prompt before and so many tokens of its answer; None for anew.
        wrong: places of the answer at which drafts err.
        most: longest draft; 0 for none.
        end: how it ends.
    """

    segments: tuple[str, ...]
    image: int
    video: int
    kept: int | None
    wrong: frozenset[int]
    most: int
    end: str


HISTORY = st.lists(
    st.builds(
        Asked,
        segments=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3)
        .flatmap(lambda words: st.permutations([*words, "<image> ", "<video> "]))
        .flatmap(lambda mixed: st.sampled_from([mixed, [s for s in mixed if s in WORDS]]))
        .map(tuple),
        image=st.sampled_from(range(len(IMAGES))),
        video=st.sampled_from(range(len(VIDEOS))),
        kept=st.none() | st.integers(0, NUM_TOKENS),
        wrong=st.frozensets(st.integers(1, NUM_TOKENS - 1), max_size=3),
        most=st.sampled_from([0, 2, 5, 10]),
        end=st.sampled_from(["whole", "whole", "whole", "close", "verify_draft", "step"]),
    ),
    min_size=2,
    max_size=6,
)


class Pair:
    """A model with reuse and lookup, and one with neither."""

    def __init__(self, artifact: Path, cache: AskedCache) -> None:
        self.ours = LlavaEdge.load(artifact, threads=1, cache=cache)
        self.plain = LlavaEdge.load(artifact, threads=1, cache=cache, prefix_reuse=False)
        self.seen: Counter[str] = Counter()

    def request(self, asked: Asked, before: Request | None, answer: tuple[int, ...]) -> Request:
        """By ids where it goes on, since random words do not encode to the ids they came from."""
        prompt = "".join(asked.segments)
        if asked.kept is not None and before is not None:
            words = prompt.replace("<image> ", "").replace("<video> ", "") or "one"
            tail = self.ours._requests.build(words, [], PromptOptions(raw=True)).ids[1:]
            # Random weights may answer with the id of a place, which stands for no picture there.
            tokens = self.ours.artifact.manifest.tokens
            places = (tokens.image, tokens.video)
            said = list(itertools.takewhile(lambda i: i not in places, answer[: asked.kept]))
            ids = np.concatenate((before.ids, np.array(said, np.int64), tail))
            return replace(before, ids=ids)
        images = [IMAGES[asked.image]] if "<image>" in prompt else []
        video = VideoInput(VIDEOS[asked.video]) if "<video>" in prompt else None
        return self.ours._requests.build(prompt, images, PromptOptions(raw=True), video=video)

    def check(self, asked: Asked, request: Request) -> tuple[int, ...]:
        """Answer, compare, and return the tokens of the model with neither."""
        plainly = GenerationConfig(max_new_tokens=NUM_TOKENS)
        with self.plain._start(Degradation(lambda: request), plainly, TimeBudget()) as stream:
            list(stream)
        expected = stream.answer.token_ids
        # Random weights copy nothing from a prompt; so drafts come from what will be said.
        drafts = [
            (token + 1) % 300 + 5 if place in asked.wrong else token
            for place, token in enumerate(expected)
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                engine,
                "PromptLookup",
                lambda ids, places: PromptLookup([*drafts, *ids], places),
            )
            if asked.end in ("verify_draft", "step"):
                fail(patch, asked.end)
            options = replace(plainly, prompt_lookup_num_tokens=asked.most)
            stream = self.ours._start(Degradation(lambda: request), options, TimeBudget())
            with contextlib.suppress(EngineError), stream:
                if asked.end == "close":
                    for _ in range(4):
                        next(stream, None)
                    return expected
                list(stream)
                answer = stream.answer
                self.seen["drafted"] += answer.draft_tokens
                self.seen["rejected"] += answer.draft_tokens - answer.accepted_tokens
                self.seen["accepted"] += answer.accepted_tokens
                self.seen["reused"] += answer.reused_tokens
                self.seen["behind an answer"] += bool(asked.kept) and answer.reused_tokens > 0
                self.seen["behind a video"] += answer.reused_tokens > 0 < answer.video_tokens
                rows = self.logits(request, answer.token_ids[:-1])
                # Where the two best are closer than the noise, either will do.
                chosen = rows[np.arange(len(rows)), list(answer.token_ids)]
                lacking = rows.max(1) - chosen
                assert (lacking <= 2 * NOISE * np.ptp(rows, 1)).all()
                if answer.token_ids == expected:
                    return expected
                self.seen["parted"] += 1
        return expected

    def logits(self, request: Request, token_ids: tuple[int, ...]) -> Array:
        rows: list[Array] = []
        with self.plain._queue.turn():
            self.plain._engine.replay(
                request, token_ids, lambda _, logits: rows.append(logits.copy())
            )
        return np.array(rows)

    def close(self) -> None:
        self.ours.close()
        self.plain.close()


def fail(patch: pytest.MonkeyPatch, name: str) -> None:
    """The second call of a decoder's method fails, having written what it wrote."""
    real, calls = getattr(Decoder, name), iter(range(1000))

    def broken(self: Decoder, rows: Array) -> Array:
        before = self.length
        found: Array = real(self, rows)
        if next(calls) >= 1:
            self.rewind(before)
            raise EngineError("injected")
        return found

    patch.setattr(Decoder, name, broken)


@pytest.fixture(scope="module", params=["float32", "int8"])
def pair(
    request: pytest.FixtureRequest,
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
) -> Iterator[Pair]:
    checkpoint = make_checkpoint(
        "odd", model_type="llava_next_video", backbone="mistral", image_size=56
    )
    both = Pair(make_artifact(checkpoint, num_frames=8, cache="int8"), request.param)
    yield both
    both.close()


def test_after_any_history_with_drafts_answers_are_those_of_a_model_with_neither(
    pair: Pair,
) -> None:
    @settings(max_examples=60, deadline=None)
    @given(history=HISTORY)
    def run(history: list[Asked]) -> None:
        before: Request | None = None
        answer: tuple[int, ...] = ()
        for asked in history:
            request = pair.request(asked, before, answer)
            answer = pair.check(asked, request)
            before = request

    run()

    seen = pair.seen
    assert min(seen["accepted"], seen["rejected"], seen["reused"]) > 20
    assert min(seen["behind an answer"], seen["behind a video"]) > 3
    assert seen["parted"] < 5
