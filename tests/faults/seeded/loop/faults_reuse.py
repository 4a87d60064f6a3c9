"""Faults of what is reused between requests, of drafts, and of the decoder below both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llava_edge.runtime.chat import Chat, ChatMessage
from llava_edge.runtime.generation import engine
from llava_edge.runtime.generation.decoder import decoding, prefix_cache
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.generation.decoder.decoding import SpeculativeDecoding
from llava_edge.runtime.generation.decoder.prefix_cache import PrefixCache
from llava_edge.runtime.generation.decoder.prompt_lookup import PromptLookup
from llava_edge.runtime.generation.engine import Engine
from llava_edge.runtime.generation.inputs.input_embeds import PromptEmbeddings
from llava_edge.runtime.processing.processor import RequestBuilder
from llava_edge.runtime.processing.request import Medium, Request
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.cached_encoder import CachedEncoder
from llava_edge.runtime.vision.feature_cache import FeatureCache
from tests.faults.fault import loop_faults, with_tiles

_Patch = pytest.MonkeyPatch


def _reusable(
    change: Callable[[PrefixCache, Request, int, int], int],
) -> Callable[[_Patch], None]:
    """Another number of positions; ``change(contents, request, valid, right)``."""

    def plant(patch: _Patch) -> None:
        real = PrefixCache.match

        def match(self: PrefixCache, request: Request, num_valid: int) -> int:
            return change(self, request, num_valid, real(self, request, num_valid))

        patch.setattr(PrefixCache, "match", match)

    return plant


def _one_more(contents: PrefixCache, request: Request, valid: int, right: int) -> int:
    return min(right + 1, valid, request.num_tokens - 1)


def _ids_alone(contents: PrefixCache, request: Request, valid: int, right: int) -> int:
    """Pictures are told by their places only."""
    held = np.concatenate((contents._ids, np.array(contents._answer, np.int64)))
    most = max(0, min(valid, held.size, request.num_tokens - 2))
    differs = np.flatnonzero(request.ids[:most] != held[:most])
    return int(differs[0]) if differs.size else most


def _within_pictures(contents: PrefixCache, request: Request, valid: int, right: int) -> int:
    """Positions of an equal picture count one by one, up to the last two of the prompt."""
    for wanted, known in zip(request.media, contents._media, strict=False):
        if wanted == known and right == wanted.start:
            return max(right, min(wanted.stop, valid, request.num_tokens - 2))
    return right


def _never_compared(contents: PrefixCache, request: Request, valid: int, right: int) -> int:
    """A prompt that is as long as the last one is taken for it."""
    return valid if right and contents._ids.size == request.num_tokens > valid - 9 else right


def _all_but_one(patch: _Patch) -> None:
    patch.setattr(prefix_cache, "_ALWAYS_COMPUTED", 1)


def _first_digest_only(patch: _Patch) -> None:
    """Two pictures are equal where their first tiles are."""

    def equal(self: Medium, other: object) -> bool:
        return isinstance(other, Medium) and (self.start, self.stop) == (
            other.start,
            other.stop,
        )

    patch.setattr(Medium, "__eq__", equal)
    patch.setattr(Medium, "__hash__", lambda self: self.start)


def _any_tile_equal(patch: _Patch) -> None:
    def equal(self: Medium, other: object) -> bool:
        return isinstance(other, Medium) and (self.start, self.layout) == (
            other.start,
            other.layout,
        )

    patch.setattr(Medium, "__eq__", equal)
    patch.setattr(Medium, "__hash__", lambda self: self.start)


def _digests_of_geometry(patch: _Patch) -> None:
    real = RequestBuilder.assemble

    def assemble(self: RequestBuilder, *given: Any) -> Request:
        request = real(self, *given)
        media = tuple(replace(each, digests=(b"",) * len(each.digests)) for each in request.media)
        return replace(request, media=media)

    patch.setattr(RequestBuilder, "assemble", assemble)


def _answer_forgotten(patch: _Patch) -> None:
    patch.setattr(PrefixCache, "append", lambda self, token: None)


def _answer_late(patch: _Patch) -> None:
    """Each token of the answer is written down one later."""
    real = PrefixCache.append
    waiting: dict[int, int] = {}

    def append(self: PrefixCache, token: int) -> None:
        if not self._answer:
            waiting.pop(id(self), None)
        real(self, waiting.get(id(self), token))
        waiting[id(self)] = token

    patch.setattr(PrefixCache, "append", append)


def _prompt_not_held(patch: _Patch) -> None:
    """After the first request the cache is thought to hold the first prompt."""
    real = PrefixCache.commit

    def commit(self: PrefixCache, request: Request) -> None:
        if self._ids.size:
            self._answer = []
        else:
            real(self, request)

    patch.setattr(PrefixCache, "commit", commit)


def _pictures_not_held(patch: _Patch) -> None:
    """Pictures of the first request stay written down."""
    real = PrefixCache.commit

    def commit(self: PrefixCache, request: Request) -> None:
        before = self._media
        real(self, request)
        self._media = before or request.media

    patch.setattr(PrefixCache, "commit", commit)


def _not_cleared(patch: _Patch) -> None:
    patch.setattr(Engine, "forget", lambda self: None)


def _replay_forgets_nothing(patch: _Patch) -> None:
    """After given tokens the cache is thought to hold what it held before."""
    real = Engine.replay

    def replay(self: Engine, *given: Any) -> Any:
        contents = copy.copy(self._contents)
        found = real(self, *given)
        self._contents = contents
        return found

    patch.setattr(Engine, "replay", replay)


def _held_afterwards(patch: _Patch) -> None:
    """What goes in is written down once all of it is in."""
    begin, commit = Engine._begin, PrefixCache.commit

    def begun(self: Engine, degradation: Any, *rest: Any) -> Any:
        found = begin(self, degradation, *rest)
        commit(self._contents, degradation.request)
        return found

    patch.setattr(PrefixCache, "commit", lambda self, request: None)
    patch.setattr(Engine, "_begin", begun)


def _reuse_always(patch: _Patch) -> None:
    real = Engine.over

    def over(self: Engine, *given: Any, **more: Any) -> Answer:
        return real(self, *given, **{**more, "prefix_reuse": True})

    patch.setattr(Engine, "over", over)


Answer = Any


def _begun(change: Callable[[Engine], None]) -> Callable[[_Patch], None]:
    def plant(patch: _Patch) -> None:
        real = Engine._begin

        def begin(self: Engine, *given: Any) -> Any:
            change(self)
            return real(self, *given)

        patch.setattr(Engine, "_begin", begin)

    return plant


def _reuse_off(at: Engine) -> None:
    at._prefix_reuse = False


def _not_rewound(patch: _Patch) -> None:
    """What a request has of its own is written after all that the cache holds."""
    real = Engine._begin

    def begin(self: Engine, *given: Any) -> Any:
        decoder: Any = self._decoder
        rewind = decoder.rewind
        decoder.rewind = lambda length: rewind(decoder.length if length else 0)
        try:
            return real(self, *given)
        finally:
            del decoder.rewind

    patch.setattr(Engine, "_begin", begin)


def _reported(**changes: Callable[[Any], Any]) -> Callable[[_Patch], None]:
    def plant(patch: _Patch) -> None:
        real = Engine.stream

        def stream(self: Engine, *given: Any, **more: Any) -> Any:
            answer = yield from real(self, *given, **more)
            if answer is None:
                return None
            return replace(answer, **{name: make(answer) for name, make in changes.items()})

        patch.setattr(Engine, "stream", stream)

    return plant


def _rest(change: Callable[[Request, int, Request], Request]) -> Callable[[_Patch], None]:
    """Another rest of a request; ``change(request, position, right)``."""

    def plant(patch: _Patch) -> None:
        real = Request.without_prefix

        def without_prefix(self: Request, position: int) -> Request:
            right = real(self, position)
            return change(self, position, right) if position else right

        patch.setattr(Request, "without_prefix", without_prefix)

    return plant


def _first_pictures(request: Request, position: int, right: Request) -> Request:
    """The rest shows the request's first pictures."""
    return with_tiles(right, request.pixel_values[: len(right.pixel_values)])


def _same_length(request: Request, position: int, right: Request) -> Request:
    return replace(right, ids=request.ids[: right.num_tokens])


def _shifted_rest(request: Request, position: int, right: Request) -> Request:
    return replace(right, ids=request.ids[position - 1 : -1])


def _accepts_last(patch: _Patch) -> None:
    """The last token of a draft is taken for chosen."""
    real = SpeculativeDecoding.step

    def step(self: SpeculativeDecoding, token: int, may_follow: int) -> Any:
        if self._draft and self._held == len(self._draft) - 1:
            token = self._draft[self._held]
        return real(self, token, may_follow)

    patch.setattr(SpeculativeDecoding, "step", step)


def _accepts_all(patch: _Patch) -> None:
    real = SpeculativeDecoding.step

    def step(self: SpeculativeDecoding, token: int, may_follow: int) -> Any:
        if self._held < len(self._draft):
            token = self._draft[self._held]
        return real(self, token, may_follow)

    patch.setattr(SpeculativeDecoding, "step", step)


def _row_before(patch: _Patch) -> None:
    """Logits of a draft are handed out one late."""
    real = SpeculativeDecoding._row

    def row(self: SpeculativeDecoding) -> Array:
        assert self._rows is not None
        self._rows, rows = np.concatenate((self._rows[:1], self._rows[:-1])), self._rows
        found = real(self)
        self._rows = rows
        return found

    patch.setattr(SpeculativeDecoding, "_row", row)


def _not_confirmed(patch: _Patch) -> None:
    """A draft that holds is not appended to the cache."""

    def step(self: SpeculativeDecoding, token: int, may_follow: int) -> Any:
        decoder: Any = self._decoder
        self._decoder = _Without(decoder, "accept")  # type: ignore[assignment]
        try:
            return real(self, token, may_follow)
        finally:
            self._decoder = decoder

    real = SpeculativeDecoding.step
    patch.setattr(SpeculativeDecoding, "step", step)


class _Without:
    """An object of which one method does nothing."""

    def __init__(self, real: Any, name: str) -> None:
        self._real, self._name = real, name

    def __getattr__(self, name: str) -> Any:
        return (lambda: None) if name == self._name else getattr(self._real, name)


def _draft_kept(patch: _Patch) -> None:
    """After a token that was not drafted the rest of the draft is still compared."""
    real = SpeculativeDecoding._end_draft

    def end(self: SpeculativeDecoding) -> None:
        if self._held == len(self._draft):
            real(self)
        else:
            self._draft = self._draft[self._held + 1 :]
            self._held = 0

    patch.setattr(SpeculativeDecoding, "_end_draft", end)


def _no_bound(patch: _Patch) -> None:
    """Drafts are made as if the answer never ended, and as if the context did not."""
    real = SpeculativeDecoding.step

    def step(self: SpeculativeDecoding, token: int, may_follow: int) -> Any:
        decoder: Any = self._decoder
        self._decoder = _Endless(decoder)  # type: ignore[assignment]
        try:
            return real(self, token, 99)
        finally:
            self._decoder = decoder

    patch.setattr(SpeculativeDecoding, "step", step)


class _Endless:
    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return 1 << 20 if name == "capacity" else getattr(self._real, name)


def _longer_drafts(patch: _Patch) -> None:
    real = decoding.DraftPace.__init__
    patch.setattr(decoding.DraftPace, "__init__", lambda self, most: real(self, most + 3))


def _lookup_without_prompt(patch: _Patch) -> None:
    real = engine.PromptLookup
    patch.setattr(engine, "PromptLookup", lambda ids, places: real([], places))


def _draft_late(patch: _Patch) -> None:
    """A draft begins one token too late."""
    real = PromptLookup.draft
    patch.setattr(PromptLookup, "draft", lambda self, most: real(self, most + 1)[1:])


def _lookup_off(patch: _Patch) -> None:
    real = Engine._steps
    patch.setattr(Engine, "_steps", lambda self, request, most, few: real(self, request, 0, few))


def _lookup_on(patch: _Patch) -> None:
    real = Engine._steps
    patch.setattr(
        Engine, "_steps", lambda self, request, most, few: real(self, request, most or 4, few)
    )


def _draft_embedded_late(patch: _Patch) -> None:
    """The rows of a draft are those of the tokens before."""
    real = Engine._steps

    def steps(self: Engine, *given: Any) -> Any:
        made: Any = real(self, *given)
        embed = made._embed
        made._embed = lambda ids: embed([ids[0], *ids[:-1]])
        return made

    patch.setattr(Engine, "_steps", steps)


def _number_per_draft(patch: _Patch) -> None:
    """Every drafted token takes a random number of the answer."""
    real = SpeculativeDecoding.step
    samplers: list[Any] = []
    make = engine.Sampler

    def sampler(*given: Any) -> Any:
        samplers.append(make(*given))
        return samplers[-1]

    def step(self: SpeculativeDecoding, token: int, may_follow: int) -> Any:
        before = self.drafted
        found = real(self, token, may_follow)
        for _ in range(self.drafted - before):
            samplers[-1]._uniform()
        return found

    patch.setattr(engine, "Sampler", sampler)
    patch.setattr(SpeculativeDecoding, "step", step)


def _trial_counts(patch: _Patch) -> None:
    """All positions on trial count, whether they hold or not."""
    real = Decoder.verify_draft

    def verify_draft(self: Decoder, rows: Array) -> Array:
        found = real(self, rows)
        self.cache.length += len(rows) - 1
        self._on_trial = 0
        return found

    patch.setattr(Decoder, "verify_draft", verify_draft)
    patch.setattr(Decoder, "accept", lambda self: None)


def _trial_rows_shifted(patch: _Patch) -> None:
    real = Decoder.verify_draft

    def verify_draft(self: Decoder, rows: Array) -> Array:
        found = real(self, rows)
        return np.concatenate((found[:1], found[:-1]))

    patch.setattr(Decoder, "verify_draft", verify_draft)


def _trial_overwrites(patch: _Patch) -> None:
    """A run of several positions begins at the last one of before."""
    real = Decoder.verify_draft

    def verify_draft(self: Decoder, rows: Array) -> Array:
        self.cache.length -= 1
        found = real(self, rows)
        self.cache.length += 1
        return found

    patch.setattr(Decoder, "verify_draft", verify_draft)


def _confirm_twice(patch: _Patch) -> None:
    real = Decoder.accept

    def accept(self: Decoder) -> None:
        real(self)
        self.cache.length += 1

    patch.setattr(Decoder, "accept", accept)


def _decoder_not_rewound(patch: _Patch) -> None:
    """Rewinding a cache that holds an answer leaves its last position."""
    real = Decoder.rewind

    def rewind(self: Decoder, length: int) -> None:
        real(self, min(length + 1, self.length) if 0 < length < self.length else length)

    patch.setattr(Decoder, "rewind", rewind)


def _chunk(change: Callable[[int, int], tuple[int, int]]) -> Callable[[_Patch], None]:
    """Chunks after the first are filled from elsewhere."""

    def plant(patch: _Patch) -> None:
        real = Decoder.prefill

        def prefill(self: Decoder, num_tokens: int, fill: Any, *rest: Any, **more: Any) -> Array:
            def other(start: int, stop: int, out: Array) -> None:
                first, last = change(start, stop) if start else (start, stop)
                fill(first, last, out)

            return real(self, num_tokens, other, *rest, **more)

        patch.setattr(Decoder, "prefill", prefill)

    return plant


def _last_chunk_dropped(patch: _Patch) -> None:
    real = Decoder.prefill

    def prefill(self: Decoder, num_tokens: int, fill: Any, *rest: Any, **more: Any) -> Array:
        size = self.chunk_tokens
        whole = max(size, num_tokens // size * size) if num_tokens > size else num_tokens
        return real(self, whole, fill, *rest, **more)

    patch.setattr(Decoder, "prefill", prefill)


def _chunk_position(by: int) -> Callable[[_Patch], None]:
    """Each chunk but the first is written elsewhere."""

    def plant(patch: _Patch) -> None:
        real = Decoder._run_chunk

        def run(self: Decoder, rows: Any, num_tokens: int, keep: int) -> Any:
            moved = by if self.length > 1 and num_tokens == self.chunk_tokens else 0
            self.cache.length += moved
            found = real(self, rows, num_tokens, keep)
            self.cache.length -= moved
            return found

        patch.setattr(Decoder, "_run_chunk", run)

    return plant


def _chunk_of_rest(patch: _Patch) -> None:
    """After reused positions the rest is filled from the prompt's beginning."""
    real = PromptEmbeddings.fill
    seen: dict[int, int] = {}

    def fill(self: PromptEmbeddings, start: int, stop: int, out: Array) -> None:
        last = seen.get(id(self), 0)
        seen[id(self)] = stop
        first = start if start <= last else last
        real(
            self,
            max(0, first - (1 if start else 0)),
            max(0, first - (1 if start else 0)) + len(out),
            out,
        )

    patch.setattr(PromptEmbeddings, "fill", fill)


def _logits_of_first_chunk(patch: _Patch) -> None:
    real = Decoder._run_chunk
    first: dict[int, Any] = {}

    def run(self: Decoder, rows: Any, num_tokens: int, keep: int) -> Any:
        found = real(self, rows, num_tokens, keep)
        if num_tokens == self.chunk_tokens and id(self) not in first:
            first[id(self)] = found.read().copy()
        elif num_tokens < self.chunk_tokens and id(self) in first:
            found.write(first.pop(id(self)))
        return found

    patch.setattr(Decoder, "_run_chunk", run)


def _key(make: Callable[[bytes, int], Any]) -> Callable[[_Patch], None]:
    """Kept features are found by something else than their digest."""

    def plant(patch: _Patch) -> None:
        real = FeatureCache.find

        def find(self: FeatureCache, key: Any) -> Any:
            for known in list(self._features):
                if make(*known) == make(*key):
                    return real(self, known)
            return None

        patch.setattr(FeatureCache, "find", find)

    return plant


def _features_never_kept(patch: _Patch) -> None:
    patch.setattr(FeatureCache, "keep", lambda self, key, features: None)


def _features_changed(patch: _Patch) -> None:
    """What is kept is the buffer that the next tile is written into."""
    real = CachedEncoder.encode

    def encode(self: CachedEncoder, pixels: Array, out: Array, digests: Any = None) -> None:
        real(self, pixels, out, digests)
        for features in self._cache._features.values():
            features.flags.writeable = True
            features[...] = out[0]

    patch.setattr(CachedEncoder, "encode", encode)


def _history(
    change: Callable[[list[ChatMessage]], Sequence[ChatMessage]],
) -> Callable[[_Patch], None]:
    """The prompt is made of another history."""

    def plant(patch: _Patch) -> None:
        real = Chat._request

        def request(self: Chat, messages: Sequence[ChatMessage], **more: Any) -> Request:
            return real(self, change(list(messages)), **more)

        patch.setattr(Chat, "_request", request)

    return plant


def _pictures_forgotten(messages: list[ChatMessage]) -> list[ChatMessage]:
    return [replace(m, images=()) for m in messages[:-1]] + messages[-1:]


def _last_turn_forgotten(messages: list[ChatMessage]) -> list[ChatMessage]:
    return messages[:-3] + messages[-1:]


def _first_turn_forgotten(messages: list[ChatMessage]) -> list[ChatMessage]:
    return messages[2:] if len(messages) > 3 else messages


def _answers_exchanged(messages: list[ChatMessage]) -> list[ChatMessage]:
    said = [m for m in messages if m.role == "assistant"][::-1]
    return [said.pop(0) if m.role == "assistant" else m for m in messages]


def _undo_leaves_answer(patch: _Patch) -> None:
    def undo(self: Chat, turns: int = 1) -> None:
        del self.messages[-3:-1]

    patch.setattr(Chat, "undo", undo)


FAULTS = loop_faults(
    "reuse",
    ("one token too many", "one position more than both prompts share", _reusable(_one_more)),
    ("pictures by place", "a picture is told by its place", _reusable(_ids_alone)),
    ("within a picture", "reuse ends within a picture", _first_digest_only),
    ("pictures by geometry", "a picture is told by its layout", _any_tile_equal),
    ("no digests", "no tile is told from another", _digests_of_geometry),
    ("prompts by length", "equal lengths count as equal prompts", _reusable(_never_compared)),
    ("one position computed", "all positions but the last are reused", _all_but_one),
    ("less reused", "one position less", _reusable(lambda c, r, v, right: max(0, right - 1))),
    ("answer forgotten", "an answer is not written down", _answer_forgotten),
    ("answer late", "tokens of an answer are written down late", _answer_late),
    ("first prompt held", "only the first prompt is written down", _prompt_not_held),
    ("first pictures held", "only the first pictures are written down", _pictures_not_held),
    ("not forgotten", "what was to be forgotten is reused", _not_cleared),
    ("replay forgets nothing", "given tokens leave the contents", _replay_forgets_nothing),
    ("held afterwards", "a prompt is written down once it is in", _held_afterwards),
    ("reuse always", "reuse that was switched off", _reuse_always),
    ("reuse off", "nothing is reused", _begun(_reuse_off)),
    ("not rewound", "new positions come after old ones", _not_rewound),
    ("reuse not told", "reused_tokens is 0", _reported(reused_tokens=lambda a: 0)),
    ("pictures of the beginning", "the rest shows earlier pictures", _rest(_first_pictures)),
    ("ids of the beginning", "the rest has the prompt's first ids", _rest(_same_length)),
    ("rest shifted", "the rest begins one token early", _rest(_shifted_rest)),
    ("rest of chunks shifted", "later chunks begin one row early", _chunk_of_rest),
    ("kept by first byte", "features by a digest's first bit", _key(lambda d, rows: d[0] & 1)),
    ("kept by shape", "features by their number of rows", _key(lambda d, rows: rows)),
    ("features not kept", "the vision cache stays empty", _features_never_kept),
    ("kept features overwritten", "kept features change with the next tile", _features_changed),
    ("pictures forgotten", "a turn forgets earlier pictures", _history(_pictures_forgotten)),
    ("last turn forgotten", "a turn forgets the one before", _history(_last_turn_forgotten)),
    ("first turn forgotten", "a third turn forgets the first", _history(_first_turn_forgotten)),
    ("answers exchanged", "answers of a history change places", _history(_answers_exchanged)),
    ("half undone", "undo leaves the last answer", _undo_leaves_answer),
) + loop_faults(
    "drafts",
    ("accepted one too far", "the last drafted token is taken unseen", _accepts_last),
    ("accepted unseen", "drafted tokens are taken unseen", _accepts_all),
    ("logits late", "a draft's logits come one late", _row_before),
    ("not confirmed", "drafts that hold are not appended", _not_confirmed),
    ("draft kept", "a draft goes on after a token that it lacks", _draft_kept),
    ("no bound", "drafts reach beyond the context", _no_bound),
    ("longer drafts", "drafts are longer than asked for", _longer_drafts),
    ("prompt not looked up", "only the answer is looked up", _lookup_without_prompt),
    ("draft late", "drafts begin one token late", _draft_late),
    ("lookup off", "no drafts are made", _lookup_off),
    ("lookup on", "drafts are made unasked", _lookup_on),
    ("rows late", "a draft's rows are those before", _draft_embedded_late),
    ("numbers for drafts", "drafted tokens use random numbers up", _number_per_draft),
    ("drafts not told", "draft_tokens is 0", _reported(draft_tokens=lambda a: 0)),
    (
        "all accepted",
        "accepted_tokens are all",
        _reported(accepted_tokens=lambda a: a.draft_tokens),
    ),
    ("trial counts", "a failed draft stays in the cache", _trial_counts),
    ("trial logits shifted", "logits of a run come one late", _trial_rows_shifted),
    ("trial overwrites", "a run overwrites the last position", _trial_overwrites),
    ("confirmed twice", "a token that holds counts twice", _confirm_twice),
    ("decoder not rewound", "one position too many stays", _decoder_not_rewound),
    ("chunk one early", "chunks begin one row early", _chunk(lambda a, b: (a - 1, b - 1))),
    ("first chunk again", "each chunk is the first", _chunk(lambda a, b: (0, b - a))),
    ("last chunk dropped", "what fills no chunk is left out", _last_chunk_dropped),
    ("chunk position early", "chunks are written one position early", _chunk_position(-1)),
    ("chunk position late", "chunks are written one position late", _chunk_position(1)),
    ("logits of first chunk", "the first chunk's logits are taken", _logits_of_first_chunk),
)
