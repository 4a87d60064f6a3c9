"""Faults of streaming and stops: which tokens are the answer, why it ends, and what text comes."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from llava_edge.profiles.errors import LlavaEdgeError
from llava_edge.runtime.generation import engine
from llava_edge.runtime.generation.decoder.decoding import PlainSteps
from llava_edge.runtime.generation.engine import Engine
from llava_edge.runtime.generation.loop import LoopResult
from llava_edge.runtime.generation.stream import AnswerStream, StreamHandle
from llava_edge.runtime.processing.text import detokenizer as stream_decoder
from llava_edge.runtime.processing.text.detokenizer import StreamDecoder
from llava_edge.runtime.processing.text.tokenizer import Tokenizer
from tests.faults.fault import loop_faults

_Patch = pytest.MonkeyPatch
_Loop = Callable[..., Iterator[int]]


def _around(make: Callable[[_Loop, tuple[Any, ...]], Iterator[int]]) -> Callable[[_Patch], None]:
    """Another loop over tokens.

    ``make`` gets the real one and its arguments: steps, logits, sampler, stop ids, max_new_tokens,
    result, is_late.
    """

    def plant(patch: _Patch) -> None:
        real = engine.generate_tokens
        patch.setattr(engine, "generate_tokens", lambda *given: make(real, given))

    return plant


def _given(at: int, change: Callable[[Any], Any]) -> Callable[[_Patch], None]:
    """The loop is given something else."""

    def make(real: _Loop, given: tuple[Any, ...]) -> Iterator[int]:
        return real(*given[:at], change(given[at]), *given[at + 1 :])

    return _around(make)


def _ends_as(reasons: dict[str, Any]) -> Callable[[_Patch], None]:
    def make(real: _Loop, given: tuple[Any, ...]) -> Iterator[int]:
        result: LoopResult = given[5]
        for token in real(*given):
            if result.finish_reason is not None:
                result.finish_reason = reasons.get(result.finish_reason, result.finish_reason)
            yield token

    return _around(make)


def _length_before_stop(real: _Loop, given: tuple[Any, ...]) -> Iterator[int]:
    result: LoopResult = given[5]
    for token in real(*given):
        if result.finish_reason == "stop" and result.num_tokens >= given[4]:
            result.finish_reason = "length"
        yield token


def _without_last(real: _Loop, given: tuple[Any, ...]) -> Iterator[int]:
    """The stop token is no part of the answer."""
    result: LoopResult = given[5]
    for token in real(*given):
        if result.finish_reason != "stop":
            yield token


def _one_token_late(real: _Loop, given: tuple[Any, ...]) -> Iterator[int]:
    waiting: list[int] = []
    for token in real(*given):
        if waiting:
            yield waiting.pop()
        waiting.append(token)
    yield from waiting


def _all_at_the_end(real: _Loop, given: tuple[Any, ...]) -> Iterator[int]:
    yield from list(real(*given))


def _first_twice(real: _Loop, given: tuple[Any, ...]) -> Iterator[int]:
    for number, token in enumerate(real(*given)):
        if not number:
            yield token
        yield token


def _never_late(real: _Loop, given: tuple[Any, ...]) -> Iterator[int]:
    return real(*given[:6])


def _errors_end_it(real: _Loop, given: tuple[Any, ...]) -> Iterator[int]:
    """What fails in the middle is an answer that is shorter."""
    result: LoopResult = given[5]
    try:
        yield from real(*given)
    except LlavaEdgeError:
        result.finish_reason = "length"


def _never_full(patch: _Patch) -> None:
    patch.setattr(PlainSteps, "is_full", property(lambda self: False))


def _full_early(patch: _Patch) -> None:
    """The last position of the context is left empty."""
    full = property(lambda self: self._decoder.length >= self._decoder.capacity - 1)
    patch.setattr(PlainSteps, "is_full", full)


def _pushed(change: Callable[[StreamDecoder, int, str], str]) -> Callable[[_Patch], None]:
    """Other text for a token that is pushed."""

    def plant(patch: _Patch) -> None:
        real = StreamDecoder.push

        def push(self: StreamDecoder, token_id: int) -> str:
            return change(self, token_id, real(self, token_id))

        patch.setattr(StreamDecoder, "push", push)

    return plant


def _decoded_alone(patch: _Patch) -> None:
    """Each token becomes text by itself."""

    def push(self: StreamDecoder, token_id: int) -> str:
        token = self._backend.id_to_token(token_id)
        return "" if token is None or token_id in self._control else self._decode([token_id])

    patch.setattr(StreamDecoder, "push", push)


def _control_shown(patch: _Patch) -> None:
    real = StreamDecoder.__init__

    def init(self: StreamDecoder, backend: Any, control: frozenset[int]) -> None:
        real(self, backend, frozenset())

    patch.setattr(StreamDecoder, "__init__", init)


def _errors(how: str) -> Callable[[_Patch], None]:
    """Bytes that are no character are dealt with in another way."""

    def plant(patch: _Patch) -> None:
        real = StreamDecoder.__init__

        def init(self: StreamDecoder, *given: Any) -> None:
            real(self, *given)
            if self._bytes is not None:
                self._bytes = stream_decoder.codecs.getincrementaldecoder("utf-8")(how)

        patch.setattr(StreamDecoder, "__init__", init)

    return plant


def _latin(patch: _Patch) -> None:
    real = StreamDecoder.__init__

    def init(self: StreamDecoder, *given: Any) -> None:
        real(self, *given)
        if self._bytes is not None:
            self._bytes = stream_decoder.codecs.getincrementaldecoder("latin-1")()

    patch.setattr(StreamDecoder, "__init__", init)


def _finished(text: Callable[[StreamDecoder, str], str]) -> Callable[[_Patch], None]:
    def plant(patch: _Patch) -> None:
        real = StreamDecoder.finish
        patch.setattr(StreamDecoder, "finish", lambda self: text(self, real(self)))

    return plant


def _text_at_the_end(patch: _Patch) -> None:
    push, finish = StreamDecoder.push, StreamDecoder.finish
    kept: dict[int, list[str]] = {}

    def pushed(self: StreamDecoder, token_id: int) -> str:
        kept.setdefault(id(self), []).append(push(self, token_id))
        return ""

    patch.setattr(StreamDecoder, "push", pushed)
    patch.setattr(
        StreamDecoder, "finish", lambda self: "".join(kept.pop(id(self), [])) + finish(self)
    )


def _answered(change: Callable[[Any], Any]) -> Callable[[_Patch], None]:
    """The whole answer is another one than what was streamed."""

    def plant(patch: _Patch) -> None:
        real = Engine.stream

        def stream(self: Engine, *given: Any, **more: Any) -> Any:
            answer = yield from real(self, *given, **more)
            return None if answer is None else change(answer)

        patch.setattr(Engine, "stream", stream)

    return plant


def _pieces(change: Callable[[Iterator[str]], Iterator[str]]) -> Callable[[_Patch], None]:
    """Other pieces than the answer has."""

    def plant(patch: _Patch) -> None:
        real = Engine.stream

        def stream(self: Engine, *given: Any, **more: Any) -> Any:
            kept: list[Any] = []

            def inner() -> Iterator[str]:
                kept.append((yield from real(self, *given, **more)))

            yield from change(inner())
            return kept[0] if kept else None

        patch.setattr(Engine, "stream", stream)

    return plant


def _last_piece_lost(pieces: Iterator[str]) -> Iterator[str]:
    waiting: list[str] = []
    for piece in pieces:
        yield from waiting
        waiting = [piece]


def _not_cancelled(patch: _Patch) -> None:
    patch.setattr(StreamHandle, "is_cancelled", lambda self: False)
    patch.setattr(AnswerStream, "close", lambda self: None)


def _closed_has_answer(patch: _Patch) -> None:
    real = AnswerStream.close

    def close(self: AnswerStream) -> None:
        if self._answer is None:
            for _ in self:
                pass
        real(self)

    patch.setattr(AnswerStream, "close", close)


def _stop_text(patch: _Patch) -> None:
    """The stop token's own text is the last piece."""
    real = Tokenizer.stream

    def stream(self: Tokenizer) -> StreamDecoder:
        decoder = real(self)
        decoder._control = decoder._control - frozenset(self._tokens.stop)
        return decoder

    patch.setattr(Tokenizer, "stream", stream)
    loop = engine.generate_tokens

    def generate(*given: Any) -> Iterator[int]:
        # The engine is to hold no token for a stop: the loop has ended all the same.
        stops, result = given[3], given[5]
        for token in loop(*given):
            if token in stops and result.finish_reason == "stop":
                yield _Shown(token)
            else:
                yield token

    patch.setattr(engine, "generate_tokens", generate)


class _Shown(int):
    """A token that equals its id and is found in no set."""

    def __hash__(self) -> int:
        return -2

    def __eq__(self, other: object) -> bool:
        return int(self) == other

    __ne__ = object.__ne__


_PLANTED = loop_faults(
    "streaming",
    ("stop ignored", "no token ends an answer", _given(3, lambda stops: frozenset())),
    (
        "last stop id only",
        "all but one stop id are ignored",
        _given(3, lambda stops: frozenset(sorted(stops)[-1:])),
    ),
    ("first stop id only", "the others are ignored", _given(3, lambda s: frozenset(sorted(s)[:1]))),
    ("one token more", "max_new_tokens and one", _given(4, lambda most: most + 1)),
    ("one token less", "one less than max_new_tokens", _given(4, lambda most: max(1, most - 1))),
    ("half of the tokens", "half of max_new_tokens", _given(4, lambda most: (most + 1) // 2)),
    ("stop is length", "an answer that stopped ends by length", _ends_as({"stop": "length"})),
    ("length is stop", "an answer that was cut ends by a stop", _ends_as({"length": "stop"})),
    ("context is length", "a full context ends by length", _ends_as({"context": "length"})),
    ("deadline is stop", "an answer that ran late ends by a stop", _ends_as({"deadline": "stop"})),
    ("length before stop", "a stop as the last token is length", _around(_length_before_stop)),
    ("stop token left out", "token_ids end before the stop token", _around(_without_last)),
    ("one token late", "each piece comes a token later", _around(_one_token_late)),
    ("all at the end", "tokens come once all are there", _around(_all_at_the_end)),
    ("first token twice", "the first token comes twice", _around(_first_twice)),
    ("deadline ignored", "answers go on past the deadline", _around(_never_late)),
    ("errors end it", "a failing run is the end of the answer", _around(_errors_end_it)),
    ("context ignored", "the loop goes on in a full context", _never_full),
    ("context one less", "the last position is not used", _full_early),
    ("decoded alone", "each token is decoded by itself", _decoded_alone),
    ("control tokens shown", "control tokens become text", _control_shown),
    ("stop token shown", "the stop token's text is streamed", _stop_text),
    ("broken bytes dropped", "bytes of no character are left out", _errors("ignore")),
    ("broken bytes escaped", "bytes of no character are escaped", _errors("backslashreplace")),
    ("bytes as Latin-1", "each byte is a character", _latin),
    ("rest dropped", "what was held back at the end is lost", _finished(lambda self, text: "")),
    ("rest twice", "what was held back comes twice", _finished(lambda self, text: text * 2)),
    (
        "flushed at each token",
        "what is no character yet is given out",
        _pushed(lambda self, token, text: text + self.finish()),
    ),
    ("text at the end", "text comes once the answer is complete", _text_at_the_end),
    ("pieces stripped", "blanks around a token are lost", _pushed(lambda s, t, text: text.strip())),
    (
        "composed characters",
        "text is normalised",
        _pushed(lambda self, token, text: unicodedata.normalize("NFKC", text)),
    ),
    (
        "lines joined",
        "two ends of line become one",
        _pushed(lambda self, token, text: text.replace("\n\n", "\n").replace("\t", " ")),
    ),
    (
        "ASCII only",
        "other characters are left out",
        _pushed(lambda s, t, x: x.encode("ascii", "ignore").decode()),
    ),
    (
        "answer stripped",
        "text without its outer blanks",
        _answered(lambda a: replace(a, text=a.text.strip())),
    ),
    (
        "answer cut",
        "the last character is missing",
        _answered(lambda a: replace(a, text=a.text[:-1])),
    ),
    (
        "last piece lost",
        "the last piece is not streamed",
        _pieces(_last_piece_lost),
    ),
    (
        "pictures not counted",
        "prompt_tokens leave image tokens out",
        _answered(lambda a: replace(a, prompt_tokens=a.prompt_tokens - a.image_tokens)),
    ),
    (
        "tiles counted",
        "image_tokens of full tiles",
        _answered(lambda a: replace(a, image_tokens=a.image_tokens and a.image_tokens + 1)),
    ),
    ("not cancelled", "a closed stream goes on", _not_cancelled),
    ("closed has an answer", "a closed stream runs to its end", _closed_has_answer),
)

FAULTS = tuple(
    # One stop token alone is both the first and the last.
    replace(fault, model="two stops") if "stop id only" in fault.id else fault
    for fault in _PLANTED
)
