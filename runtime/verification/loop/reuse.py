"""What is reused between requests, and drafts, with a scripted decoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from llava_edge.runtime.chat import Chat
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.generation.stream import AnswerStream
from llava_edge.runtime.processing.request import PromptOptions, Request
from llava_edge.runtime.processing.text.chat_prompt import Message, Text, compose, user_message
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.loop.bench import SENTENCE, Expected, LoopBench, noise

_LOOKUP = 6
_TILES = 64
"""Whose features are kept: more than are shown."""
_RULE = "Answer in one word."


def check_reuse(bench: LoopBench) -> None:
    """Text, pictures, videos and conversations, one request after another."""
    with bench.scripted():
        _texts(bench)
        _pictures(bench)
        if bench.tokens.video is not None and bench.manifest.video_processing is not None:
            _videos(bench)
    with bench.scripted(prefix_reuse=False):
        answer = Expected(bench.words[:3], "length")
        for name in ("without reuse", "without reuse again"):
            bench.ask(name, SENTENCE, answer, max_new_tokens=3)
    _kept_features(bench)
    if bench.manifest.prompt is not None:
        _conversation(bench)
        _marks_as_text(bench)


def _texts(bench: LoopBench) -> None:
    words = bench.words
    half = len(words) // 2
    # Forwards and backwards, so that neither is a beginning of the other's answer.
    one, other = Expected(words[:4], "length"), Expected(words[::-1][:4], "length")
    start = bench.request(SENTENCE).ids
    requests: tuple[tuple[str, Request, Expected], ...] = (
        ("first request", bench.of_ids(start), one),
        ("the same again", bench.of_ids(start), other),
        ("a longer one", bench.of_ids(start, words[:half]), one),
        ("an answer continued", bench.of_ids(start, words[:half], words[:4], words[2:5]), other),
        ("the answer's last token continued", bench.of_ids(start, words[:3]), one),
        ("a shorter one", bench.of_ids(start[: len(start) // 2]), other),
        ("another one", bench.of_ids(start[:1], words[::-1]), one),
        ("one token further", bench.of_ids(start[:1], words[::-1], words[:1]), other),
        ("one changed token", bench.of_ids(start[:1], _changed(words[::-1])), one),
        ("a prompt of one token", bench.of_ids(words[:1]), other),
        ("the first one after others", bench.of_ids(start), one),
    )
    for name, request, expected in requests:
        bench.ask_ids(name, request, expected, max_new_tokens=4)
    request = requests[0][1]
    for name, before in (
        ("after everything was forgotten", bench.model._engine.forget),
        ("after given tokens", lambda: _forced(bench)),
    ):
        before()
        bench.run(
            name,
            request,
            one,
            lambda: bench.started(request, GenerationConfig(max_new_tokens=4)),
            fresh=True,
        )
    _closed_early(bench, bench.of_ids(words[::-1], words[::-1]))
    bench.ask_ids("after a prompt that was not finished", request, one, max_new_tokens=4)


def _forced(bench: LoopBench) -> None:
    """Another prompt of the same length goes into the cache by ``LlavaEdge.replay``."""
    bench.model.replay(
        SENTENCE[::-1], (), bench.words[:2], lambda number, row: None, PromptOptions(raw=True)
    )


def _closed_early(bench: LoopBench, request: Request) -> None:
    """A stream that is closed while its prompt is computed."""
    streams: list[AnswerStream] = []

    def close(what: str, done: int, total: int) -> None:
        if done:
            streams[0].close()

    bench.prepare(request, Expected(bench.words[:2], "length"))
    streams.append(bench.started(request, GenerationConfig(max_new_tokens=2), progress=close))
    for _ in streams[0]:
        bench.faults.append("closed in the prompt: the stream goes on")
    bench.refuses_answer("closed in the prompt", streams[0])


def _changed(ids: Sequence[int]) -> list[int]:
    """Another token in the middle."""
    middle = len(ids) // 2
    return [*ids[:middle], ids[0], *ids[middle + 1 :]]


def _pictures(bench: LoopBench) -> None:
    first, second, third = (noise(seed) for seed in (1, 2, 3))
    answer = Expected(bench.words[:3], "length")
    one, two = f"<image> {SENTENCE}", f"<image> and <image> {SENTENCE}"
    lower: list[str | None] = ["base"]
    if bench.requests.max_tiles > 1:
        lower = ["base", None]
    for grid in lower:
        of = "" if grid is None else f" on the grid {grid}"
        for name in (f"a picture{of}", f"the same picture{of}"):
            bench.ask(name, one, answer, [first], grid=grid, max_new_tokens=3)
    for name, prompt, images in (
        ("the picture, other text", f"<image> Why? {SENTENCE}", [first]),
        ("another picture, same text", f"<image> Why? {SENTENCE}", [second]),
        ("a picture with one pixel changed", f"<image> Why? {SENTENCE}", [_touched(second)]),
        ("two pictures", two, [first, second]),
        ("the second picture changed", two, [first, third]),
        ("the first picture changed", two, [second, third]),
        ("two pictures exchanged", two, [third, second]),
        ("a picture twice", two, [third, third]),
        ("the picture after text", f"{SENTENCE} <image>", [third]),
        ("no picture", SENTENCE, []),
    ):
        bench.ask(name, prompt, answer, images, grid="base", max_new_tokens=3)


def _videos(bench: LoopBench) -> None:
    frames = [noise(seed) for seed in (4, 5)]
    answer = Expected(bench.words[:3], "length")
    prompt = f"<video> {SENTENCE}"
    for name, video in (
        ("a video", frames),
        ("the same video", frames),
        ("a changed frame", [frames[0], _touched(frames[1])]),
        ("frames exchanged", [frames[1], frames[0]]),
    ):
        bench.ask(name, prompt, answer, video=np.stack(video), max_new_tokens=3)


def _kept_features(bench: LoopBench) -> None:
    """Features of tiles that were seen before come from the vision cache, and no others."""
    first, second = noise(1), noise(2)
    answer = Expected(bench.words[:2], "length")
    with bench.scripted(vision_cache=_TILES):
        for name, image, text, encoded in (
            ("kept features: first", first, "A", 1),
            ("kept features: another", second, "B", 1),
            ("kept features: the first again", first, "C", 0),
            ("kept features: one pixel changed", _touched(first), "D", 1),
            ("kept features: another again", second, "E", 0),
        ):
            before = bench.encoder.tiles
            # Other words in front, so that the cache of the decoder helps nothing.
            prompt = f"{text} {SENTENCE} <image>"
            bench.ask(name, prompt, answer, [image], grid="base", max_new_tokens=2)
            if bench.encoder.tiles - before != encoded:
                bench.faults.append(
                    f"{name}: {bench.encoder.tiles - before} tiles were encoded, not {encoded}"
                )
        if bench.requests.max_tiles > 1:
            # Its thumbnail is known, its other tiles are not; then all are.
            for text in ("F", "G"):
                prompt = f"{text} {SENTENCE} <image>"
                bench.ask(
                    f"kept features: several tiles, {text}",
                    prompt,
                    answer,
                    [first],
                    max_new_tokens=2,
                )
    with bench.scripted(vision_cache=1):
        for text, image in zip("ABCD", (first, second, second, first), strict=True):
            name, prompt = f"room for one tile, {text}", f"{text} {SENTENCE} <image>"
            bench.ask(name, prompt, answer, [image], grid="base", max_new_tokens=2)


def _conversation(bench: LoopBench) -> None:
    """Three turns with a picture, one taken back, and one after an edit of the history."""
    words, picture = bench.words, noise(6)
    with bench.scripted():
        chat = bench.model.chat(grid="base")
        said: list[tuple[str, list[Any], str]] = []
        rule = ""

        def turn(name: str, text: str, ids: Sequence[int], images: Sequence[Any] = ()) -> None:
            request = _conversation_request(bench, said, text, list(images), rule)
            # The template's own end of an answer is a stop token that the model says.
            ended = (*ids, *bench.stops[:1])
            expected = Expected(ended, "stop" if bench.stops else "length")
            bench.run(
                name,
                request,
                expected,
                lambda: chat.stream(text, images, max_new_tokens=len(ended)),
            )
            said.append((text, list(images), bench.tokenizer.decode(ended)))
            _compare_history(bench, name, chat, said)

        turn("first turn", "What is this?", words[:3], [picture])
        turn("second turn", "And the second line?", words[::-1][:4])
        turn("third turn", "Thank you.", words[1:3])
        chat.undo()
        said.pop()
        turn("a turn taken back", "Why?", words[2:6])
        chat.reset()
        said.clear()
        turn("a conversation begun anew", "What is this?", words[:2])
        if bench.requests.prompt_format().system is not None:
            said.clear()
            chat, rule = bench.model.chat(system=_RULE, grid="base"), _RULE
            turn("a system turn", "What is this?", words[:3])
            turn("behind a system turn", "Why?", words[2:5])


def _marks_as_text(bench: LoopBench) -> None:
    """A mark that is to be read as text, with a picture and without."""
    text, answer = "What does <image> mean?", Expected(bench.words[:3], "length")
    picture = noise(7)
    prepared = [bench.requests.prepare(picture, bench.requests.processor("base"))]
    how: dict[str, Any] = {"image_marks": False, "grid": "base", "max_new_tokens": 3}
    shown: tuple[list[Any], ...] = ([], [picture])
    with bench.scripted():
        for number, images in enumerate(shown):
            message = user_message(text, images=number)
            pieces = compose(bench.requests.prompt_format(), (message,), image_marks=False)
            request = bench.requests.assemble(pieces, prepared[:number])
            start = partial(bench.model.stream, text, images, **how)
            bench.run(f"a mark as text, {number} pictures", request, answer, start)


def _compare_history(
    bench: LoopBench, name: str, chat: Chat, said: Sequence[tuple[str, list[Any], str]]
) -> None:
    wanted = [text for asked, _, answer in said for text in (asked, answer)]
    found = [message.text for message in chat.messages]
    if found != wanted:
        bench.faults.append(f"{name}: the history is {found[-2:]!r:.120}, not {wanted[-2:]!r:.120}")


def _conversation_request(
    bench: LoopBench,
    said: Sequence[tuple[str, list[Any], str]],
    text: str,
    images: list[Any],
    rule: str,
) -> Request:
    """A turn's prompt, from the turns so far and not from the chat's own history."""
    messages = [Message("system", (Text(rule),))] if rule else []
    pictures = []
    for asked, shown, answer in (*said, (text, images, None)):
        messages.append(user_message(asked, images=len(shown)))
        pictures += shown
        if answer is not None:
            messages.append(Message("assistant", (Text(answer),)))
    processor = bench.requests.processor("base")
    prepared = [bench.requests.prepare(image, processor) for image in pictures]
    return bench.requests.assemble(compose(bench.requests.prompt_format(), messages), prepared, [])


def check_drafts(bench: LoopBench) -> None:
    """Drafts that hold, fail, meet a stop, and meet the end of length and context."""
    words = bench.words
    start = bench.request(SENTENCE).ids
    copied = tuple(int(i) for i in start if int(i) in words)
    if len(copied) < 12:
        bench.faults.append(f"drafts: the prompt has {len(copied)} tokens of text")
        return
    prompt = bench.of_ids(start)
    # After the first three of them, the prompt says what comes.
    exact = copied[:12]
    # After a token that stands nowhere comes what was drafted after it all the same.
    wrong = [(*exact[:at], bench.unsaid[0], *exact[at + 1 :], exact[0]) for at in range(4, 10)]
    with bench.scripted():
        for name, ids, most, accepted in (
            ("drafts that hold", exact, _LOOKUP, 4),
            *((f"draft that fails, {at}", ids, _LOOKUP, 1) for at, ids in enumerate(wrong)),
            ("short drafts that hold", exact, 2, 4),
        ):
            bench.ask_ids(
                name,
                prompt,
                Expected(ids, "length", accepted=accepted),
                max_new_tokens=len(ids),
                prompt_lookup_num_tokens=most,
            )
            if bench.decoder.longest > most:
                bench.faults.append(f"{name}: a draft of {bench.decoder.longest} tokens")
        for most in (1, 2, 4, 5, 6, 7):
            bench.ask_ids(
                f"{most} tokens with drafts",
                prompt,
                Expected(exact[:most], "length"),
                max_new_tokens=most,
                prompt_lookup_num_tokens=_LOOKUP,
            )
        for stop in bench.stops[:1]:
            # In place of the sixth token that was drafted, and where the prompt has it as well.
            drafted = bench.of_ids(start, [stop], copied[:3])
            for name, request, before in (
                ("not drafted", prompt, copied[:5]),
                ("drafted", drafted, copied[-3:]),
            ):
                bench.ask_ids(
                    f"a stop token that was {name}",
                    request,
                    Expected((*before, stop), "stop"),
                    max_new_tokens=12,
                    prompt_lookup_num_tokens=_LOOKUP,
                )
        bench.ask_ids(
            "no drafts after drafts", prompt, Expected(exact, "length"), max_new_tokens=12
        )
        if bench.decoder.drafted:
            bench.faults.append(
                f"{bench.decoder.drafted} tokens were drafted without prompt lookup"
            )
    for room in (2, 5, 6):
        with bench.scripted(capacity=prompt.num_tokens + room):
            bench.ask_ids(
                f"a context with room for {room} tokens, with drafts",
                prompt,
                Expected(exact[: room + 1], "context"),
                max_new_tokens=12,
                prompt_lookup_num_tokens=_LOOKUP,
            )


def _touched(image: Array) -> Array:
    """The same with another corner."""
    found = image.copy()
    found[:6, :6] = 255 - found[:6, :6]
    return found
