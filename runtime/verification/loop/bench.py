"""LoopBench: a loaded model whose decoder is a scripted one, and what its answers should be.

Requests go the way of every request: prompt, embeddings, reuse, drafts, sampler, stops, text and
stream. Only what the decoder and the tower compute is replaced, so that every token is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime.generation.deadline import TimeBudget
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.generation.inputs.prompt_encoder import PromptEmbedder
from llava_edge.runtime.generation.loop import FinishReason
from llava_edge.runtime.generation.output import Answer
from llava_edge.runtime.generation.stream import AnswerStream
from llava_edge.runtime.processing.degradation import Degradation
from llava_edge.runtime.processing.request import PromptOptions, Request, VideoInput
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.progress import Progress, no_progress
from llava_edge.runtime.verification.loaded_model import LoadedModel
from llava_edge.runtime.verification.loop.scripted_decoder import (
    DigestEncoder,
    ScriptedDecoder,
    one_best,
)
from llava_edge.runtime.vision.cached_encoder import CachedEncoder
from llava_edge.runtime.vision.feature_cache import FeatureCache

CAPACITY = 8192
_CHUNK = 16
"""Positions: so few that every prompt has several chunks, and pictures lie across them."""
_ALWAYS_COMPUTED = 2
SENTENCE = "The quick brown fox jumps over the lazy dog; 12 pictures, 3 words."

SIDES = (42, 30)
"""Height and width of the pictures; AnyRes enlarges them."""


@dataclass(frozen=True)
class Expected:
    """What an answer must be.

    Attributes:
        ids: of the answer.
        finish_reason: of the answer.
        text: of the answer; None for the tokenizer's own of all ids together.
        least: characters that must have come out with each id; empty for no matter.
        accepted: drafted tokens that must have become part of the answer, at least.
        logits: of each token of the answer; None for one that is far above all others.
        lowered: what the request itself gave up, in number.
    """

    ids: tuple[int, ...]
    finish_reason: FinishReason
    text: str | None = None
    least: tuple[int, ...] = ()
    accepted: int = 0
    logits: Callable[[int], Array] | None = None
    lowered: int = 0


class LoopBench:
    """Asks, compares, and collects what differs.

    Args:
        model: loaded; nothing of it is changed once ``scripted`` is left.
        faults: where sentences about what differs are put.
    """

    def __init__(self, model: LoadedModel, faults: list[str]) -> None:
        self.model = model
        self.faults = faults
        self.count = 0
        self.table, self.tokenizer = model._table, model._tokenizer
        self.requests = model._requests
        self._texts: dict[str, Request] = {}
        self._prompts: dict[bytes, Array] = {}
        manifest = model.artifact.manifest
        self.manifest, self.tokens = manifest, manifest.tokens
        self.dtype: type[np.float32] | type[np.float16]
        self.dtype = np.float32 if manifest.target == "cpu" else np.float16
        self.places = tuple(i for i in (self.tokens.image, self.tokens.video) if i is not None)
        ids = self.request(SENTENCE).ids.tolist()
        control = self.tokenizer.control_ids
        self.words = tuple(i for i in dict.fromkeys(ids) if i not in control)
        last = min(self.tokens.num_text_tokens, self.table.vocab_size)
        taken = {*control, *self.words}
        others = (i for i in range(last - 1, -1, -1) if i not in taken)
        self.wrong, *unsaid = islice(others, 13)
        self.unsaid = tuple(unsaid)
        self.stops = tuple(i for i in self.tokens.stop if i < self.table.vocab_size)
        self._reuses = True
        self.encoder = DigestEncoder()

    @contextmanager
    def scripted(
        self,
        *,
        prefix_reuse: bool = True,
        picks_best: bool = False,
        vision_cache: int = 0,
        capacity: int = CAPACITY,
    ) -> Iterator[ScriptedDecoder]:
        """Within it the model runs a fresh scripted decoder, which is given.

        Args:
            prefix_reuse: as for ``Engine``.
            picks_best: the decoder gives its best logits alone.
            vision_cache: tiles whose features are kept.
            capacity: positions of the context.
        """
        real, loaded = self.model._engine, self.model._decoder
        decoder: Any = ScriptedDecoder(
            self.table.vocab_size,
            self.table.hidden_size,
            self.dtype,
            capacity,
            _CHUNK,
            picks_best=picks_best,
        )
        self.decoder: ScriptedDecoder = decoder
        self.encoder, self._reuses = DigestEncoder(), prefix_reuse
        encoder = self.encoder
        dims = self.manifest.model
        tile_bytes = dims.vision.num_patches * dims.text.hidden_size * np.dtype(self.dtype).itemsize
        features = FeatureCache(vision_cache * tile_bytes)
        cached = CachedEncoder(encoder, features) if vision_cache else encoder
        memory: Any = _NoMemory()
        self.model._engine = real.over(
            decoder, self._embedder(cached), memory, prefix_reuse=prefix_reuse
        )
        # Its capacity is the context then, however little was loaded.
        self.model._decoder = decoder
        try:
            yield decoder
        finally:
            self.model._engine, self.model._decoder = real, loaded

    def request(
        self, prompt: str, images: Sequence[Any] = (), video: Any = None, grid: str | None = None
    ) -> Request:
        """A finished prompt made ready, with pixels."""
        if len(images) or video is not None:
            given = None if video is None else VideoInput(video)
            options = PromptOptions(raw=True, grid=grid)
            return self.requests.build(prompt, images, options, video=given)
        if prompt not in self._texts:
            self._texts[prompt] = self.requests.build(prompt, (), PromptOptions(raw=True))
        return self._texts[prompt]

    def of_ids(self, *parts: Sequence[int] | Array) -> Request:
        """A prompt of text that is given by its ids."""
        return Request(np.concatenate([np.array(part, np.int64) for part in parts]), (), ())

    def ask(
        self,
        name: str,
        prompt: str,
        expected: Expected,
        images: Sequence[Any] = (),
        *,
        video: Any = None,
        grid: str | None = None,
        **options: Any,
    ) -> Answer | None:
        """Ask with a finished prompt, by ``LoadedModel.stream``; see ``run``."""
        request = self.request(prompt, images, video, grid)
        return self.run(
            name,
            request,
            expected,
            lambda: self.model.stream(prompt, images, video=video, grid=grid, raw=True, **options),
        )

    def ask_ids(self, name: str, request: Request, expected: Expected, **options: Any) -> None:
        """Ask with a prompt by its ids; see ``run``."""
        chosen = GenerationConfig.merged(None, **options)
        self.run(name, request, expected, lambda: self.started(request, chosen))

    def started(
        self,
        request: Request,
        config: GenerationConfig,
        budget: TimeBudget | None = None,
        progress: Progress = no_progress,
    ) -> AnswerStream:
        """The stream of a request that is ready."""
        return self.model._start(
            Degradation(lambda: request), config, budget or TimeBudget(), progress=progress
        )

    def run(
        self,
        name: str,
        request: Request,
        expected: Expected,
        start: Callable[[], AnswerStream],
        *,
        fresh: bool = False,
    ) -> Answer | None:
        """Answer and compare.

        Args:
            name: for reports.
            request: that the stream answers, made apart from it.
            expected: what must come.
            start: begins the stream.
            fresh: whether what was computed before must not be reused.

        Returns:
            The answer, where there is one.
        """
        self.count += 1
        try:
            reused = self.prepare(request, expected) * (not fresh)
            text, emitted = "", [0] * len(expected.ids)
            with start() as stream:
                for piece in stream:
                    text += piece
                    at = self.decoder.length - request.num_tokens
                    if 0 <= at < len(emitted):
                        emitted[at] = len(text)
                answer = stream.answer
            emitted = np.maximum.accumulate(emitted).tolist()
            for fault in self._differences(request, expected, answer, text, emitted, reused):
                self.faults.append(f"{name}: {fault}")
        except Exception as error:
            self.faults.append(f"{name}: {type(error).__name__}: {error}"[:300])
            return None
        return answer

    def prepare(self, request: Request, expected: Expected) -> int:
        """Tell the decoder what comes next.

        Returns:
            How many positions must be reused.
        """
        rows = self._rows(request, expected.ids)
        reused = self._reusable(request, rows) if self._reuses else 0

        def named(number: int) -> Array:
            known = number < len(expected.ids)
            return one_best(self.table.vocab_size, expected.ids[number] if known else self.wrong)

        self.decoder.expect(rows, request.num_tokens, expected.logits or named, self.wrong)
        return reused

    def _rows(self, request: Request, ids: Sequence[int]) -> Array:
        answer = self.table.rows(np.array(ids, np.int64), dtype=self.dtype)
        key = request.ids.tobytes()
        prompt = None if request.media else self._prompts.get(key)
        if prompt is None:
            prompt = np.empty((request.num_tokens, self.table.hidden_size), self.dtype)
            self._embedder(DigestEncoder()).embed(request).fill(0, len(prompt), prompt)
            if not request.media:
                self._prompts[key] = prompt
        return np.concatenate((prompt, answer))

    def _embedder(self, encoder: Any) -> PromptEmbedder:
        dims, tokens = self.manifest.model, self.tokens
        return PromptEmbedder(
            dims, tokens.image, self.table, encoder, self.dtype, None, tokens.video
        )

    def _reusable(self, request: Request, rows: Array) -> int:
        """By what the rows are: no part of a picture, and never the last two positions."""
        shared = self.decoder.shared(rows)
        shared = max(0, min(shared, request.num_tokens - _ALWAYS_COMPUTED))
        for start, stop in self._media(request):
            if start < shared < stop:
                return start
        return shared

    def _media(self, request: Request) -> Iterator[tuple[int, int]]:
        """First position of each picture and video, and the position after its last."""
        images = np.flatnonzero(request.ids == self.tokens.image)
        videos = np.flatnonzero(request.ids == self.tokens.video)
        # Found in the ids again, since the positions that a request records are what is checked.
        for positions, counts in (
            (images, [layout.num_image_tokens for layout in request.layouts]),
            (videos, [video.num_tokens for video in request.videos]),
        ):
            first = 0
            for count in counts:
                yield int(positions[first]), int(positions[first + count - 1]) + 1
                first += count

    def _differences(
        self,
        request: Request,
        expected: Expected,
        answer: Answer,
        text: str,
        emitted: Sequence[int],
        reused: int,
    ) -> Iterator[str]:
        ids = expected.ids
        wanted = expected.text
        if wanted is None:
            wanted = self.tokenizer.decode(ids)
        if answer.token_ids != ids:
            yield f"tokens {_short(answer.token_ids)} for {_short(ids)}"
            return
        given_up = self.model.degraded
        facts: dict[str, tuple[Any, Any]] = {
            "text": (answer.text, wanted),
            "pieces joined": (text, answer.text),
            "finish_reason": (answer.finish_reason, expected.finish_reason),
            "prompt_tokens": (answer.prompt_tokens, request.num_tokens),
            "image_tokens": (answer.image_tokens, self._count(request, self.tokens.image)),
            "video_tokens": (answer.video_tokens, self._count(request, self.tokens.video)),
            "reused_tokens": (answer.reused_tokens, reused),
            "draft_tokens": (answer.draft_tokens, self.decoder.drafted),
            "accepted_tokens": (answer.accepted_tokens, self.decoder.confirmed),
            "degraded": (answer.degraded[: len(given_up)], given_up),
            "notes of what was lowered": (len(answer.degraded) - len(given_up), expected.lowered),
        }
        for name, (found, right) in facts.items():
            if found != right:
                yield f"{name} {found!r:.80} for {right!r:.80}"
        if answer.accepted_tokens < expected.accepted:
            yield f"{answer.accepted_tokens} drafted tokens held, {expected.accepted} must"
        for place, (came, least) in enumerate(zip(emitted, expected.least, strict=False)):
            if came < least:
                yield f"after token {place} {came} characters had come out, {least} must have"
                break
        if not self.decoder.holds(request.num_tokens + len(ids) - 1):
            yield f"the cache does not hold prompt and answer in {self.decoder.length} positions"

    def _count(self, request: Request, place: int | None) -> int:
        return 0 if place is None else int(np.count_nonzero(request.ids == place))

    def refuses_answer(self, name: str, stream: AnswerStream) -> None:
        """A stream that did not end has no answer."""
        try:
            answer = stream.answer
        except EngineError:
            return
        self.faults.append(f"{name}: there is an answer of {len(answer.token_ids)} tokens")


class _NoMemory:
    """What a request needs where nothing is computed."""

    def host_bytes(self, num_tiles: int, num_frames: int, num_tokens: int) -> int:
        """See ``RequestMemory.host_bytes``."""
        return 0


def _short(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:12]))
    return f"[{shown}{', …' * (len(ids) > 12)}] ({len(ids)})"


def noise(seed: int) -> Array:
    """A picture, uint8 (height, width, 3)."""
    random = np.random.Generator(np.random.PCG64(seed))
    found: Array = random.integers(0, 256, (*SIDES, 3), np.uint8)
    return found
