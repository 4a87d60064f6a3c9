"""What a soak asks: requests of every kind, and every way in which callers behave badly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image

from llava_edge.profiles.errors import LlavaEdgeError
from llava_edge.runtime import LlavaEdge


class ConsumerError(Exception):
    """What a consumer raises in the middle of an answer."""


@dataclass(frozen=True)
class Questions:
    """Pictures and texts to ask with.

    Attributes:
        pictures: each asked about more than once, so that caches hit and miss.
        texts: questions.
        tokens: of a whole answer.
    """

    pictures: Sequence[Image.Image]
    texts: Sequence[str]
    tokens: int


Ask = Callable[[LlavaEdge, Questions, Random], None]


def _picture(model: LlavaEdge, given: Questions, random: Random) -> None:
    model.generate(
        random.choice(given.texts), [random.choice(given.pictures)], max_new_tokens=given.tokens
    )


def _pictures(model: LlavaEdge, given: Questions, random: Random) -> None:
    images = random.choices(given.pictures, k=random.randrange(2, 4))
    model.generate(random.choice(given.texts), images, grid="base", max_new_tokens=given.tokens)


def _text(model: LlavaEdge, given: Questions, random: Random) -> None:
    model.generate(random.choice(given.texts) * random.randrange(1, 5), max_new_tokens=given.tokens)


def _sampled(model: LlavaEdge, given: Questions, random: Random) -> None:
    model.generate(
        random.choice(given.texts),
        temperature=1.0,
        top_k=5,
        repetition_penalty=1.2,
        seed=random.randrange(9),
        max_new_tokens=given.tokens,
    )


def _lookup(model: LlavaEdge, given: Questions, random: Random) -> None:
    model.generate(
        random.choice(given.texts),
        [random.choice(given.pictures)],
        prompt_lookup_num_tokens=random.randrange(1, 9),
        max_new_tokens=given.tokens,
    )


def _chat(model: LlavaEdge, given: Questions, random: Random) -> None:
    chat = model.chat()
    chat.send(
        random.choice(given.texts), [random.choice(given.pictures)], max_new_tokens=given.tokens
    )
    for _ in range(2):
        chat.send(random.choice(given.texts), max_new_tokens=given.tokens)
    chat.undo()
    chat.send(random.choice(given.texts), max_new_tokens=given.tokens)


def _stream(model: LlavaEdge, given: Questions, random: Random) -> Any:
    return model.stream(
        random.choice(given.texts), [random.choice(given.pictures)], max_new_tokens=given.tokens
    )


def _cancelled(model: LlavaEdge, given: Questions, random: Random) -> None:
    stream = _stream(model, given, random)
    for _ in zip(range(random.randrange(3)), stream, strict=False):
        pass
    stream.close()


def _cancelled_elsewhere(model: LlavaEdge, given: Questions, random: Random) -> None:
    stream = _stream(model, given, random)
    timer = threading.Timer(random.random() / 20, stream.close)
    timer.start()
    for _ in stream:
        pass
    timer.join()


def _dropped(model: LlavaEdge, given: Questions, random: Random) -> None:
    next(_stream(model, given, random), None)


def _dropped_in_a_cycle(model: LlavaEdge, given: Questions, random: Random) -> None:
    stream = _stream(model, given, random)
    next(stream, None)
    cycle = [stream]
    cycle.append(cycle)


def _never_begun(model: LlavaEdge, given: Questions, random: Random) -> None:
    _stream(model, given, random)


def _raising(model: LlavaEdge, given: Questions, random: Random) -> None:
    try:
        for _ in _stream(model, given, random):
            raise ConsumerError
    except ConsumerError:
        return


def _raising_within(model: LlavaEdge, given: Questions, random: Random) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if random.random() < 0.5:
            raise ConsumerError

    try:
        model.generate(
            random.choice(given.texts), [random.choice(given.pictures)], progress=progress
        )
    except ConsumerError:
        return


def _counted(model: LlavaEdge, given: Questions, random: Random) -> None:
    model.count_tokens(random.choice(given.texts), [random.choice(given.pictures)])


def _refused(model: LlavaEdge, given: Questions, random: Random) -> None:
    asks: Sequence[Callable[[], object]] = (
        lambda: model.generate("What?", [b"no picture"]),
        lambda: model.generate("What?", ["/nowhere.png"]),
        lambda: model.generate("<image> <image>", list(given.pictures[:1])),
        lambda: model.generate("word " * 100_000),
        lambda: model.generate("\ud800"),
        lambda: model.generate("What?", temperature=float("nan")),
        lambda: model.generate("What?", grid="99x99"),
        lambda: model.generate("What?", video=b"no video"),
    )
    try:
        random.choice(asks)()
    except LlavaEdgeError:
        return
    raise AssertionError("a request that is to be refused was answered")


MIX: tuple[tuple[Ask, int], ...] = (
    (_picture, 20),
    (_pictures, 6),
    (_text, 14),
    (_sampled, 6),
    (_lookup, 8),
    (_chat, 6),
    (_cancelled, 8),
    (_cancelled_elsewhere, 4),
    (_dropped, 6),
    (_dropped_in_a_cycle, 2),
    (_never_begun, 2),
    (_raising, 5),
    (_raising_within, 3),
    (_counted, 4),
    (_refused, 6),
)
"""Kinds of request, and how many of a hundred are of each."""


def ask(model: LlavaEdge, given: Questions, seed: int, number: int) -> None:
    """The request of a number."""
    random = Random(f"{seed}/{number}")
    kinds, shares = zip(*MIX, strict=True)
    random.choices(kinds, shares)[0](model, given, random)


def probes(model: LlavaEdge, given: Questions) -> tuple[str, ...]:
    """Texts of answers to fixed questions."""
    first, second = given.pictures[:2]
    chat = model.chat()
    chat.send(given.texts[0], [first], max_new_tokens=given.tokens)
    return (
        model.generate(given.texts[0], [first], max_new_tokens=given.tokens).text,
        model.generate(
            given.texts[1], [second, first], grid="base", max_new_tokens=given.tokens
        ).text,
        model.generate(given.texts[2], max_new_tokens=given.tokens).text,
        model.generate(
            given.texts[1], [second], prompt_lookup_num_tokens=4, max_new_tokens=given.tokens
        ).text,
        chat.send(given.texts[1], max_new_tokens=given.tokens).text,
    )
