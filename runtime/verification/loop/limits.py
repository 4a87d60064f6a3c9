"""What requests meet at their bounds: image tokens, frames, context, and reads of many rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from llava_edge.profiles.errors import PromptError, RequestError, VideoError
from llava_edge.profiles.models.anyres import GRID_NAMES, AnyRes
from llava_edge.runtime.chat import Chat
from llava_edge.runtime.generation.inputs.embedding_table import BLOCK_ROWS
from llava_edge.runtime.generation.stream import AnswerStream
from llava_edge.runtime.processing.request import PromptOptions
from llava_edge.runtime.processing.text.chat_prompt import compose, user_message
from llava_edge.runtime.processing.video.frame_sampling import FrameChoice, choose_frames
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.loop.bench import SENTENCE, Expected, LoopBench, noise

_FRAMES = 3
_READ_BYTES = 16 << 20
"""Of the embedding table at once, at most."""
_DISTINCT = 600


def check_limits(bench: LoopBench) -> None:
    """All of them, with a scripted decoder."""
    _rows_at_once(bench)
    _image_tokens(bench)
    _lengths(bench)
    if bench.tokens.video is not None and bench.manifest.video_processing is not None:
        _frames(bench, bench.manifest.video_processing.max_frames)


def _rows_at_once(bench: LoopBench) -> None:
    """Many rows of the table in one read are those that single reads give."""
    table = bench.table
    most = max(bench.manifest.prefill_chunk, 2 * BLOCK_ROWS + 7)
    most = min(most, max(1, _READ_BYTES // (4 * table.hidden_size)))
    random = np.random.Generator(np.random.PCG64(5))
    known = random.permutation(table.vocab_size)[:_DISTINCT]
    # Some of them are neighbours, which come with one read.
    first = int(random.integers(0, max(1, table.vocab_size - _DISTINCT)))
    run = np.arange(first, min(first + _DISTINCT, table.vocab_size))
    singles = {i: table.rows(np.array([i]), dtype=bench.dtype)[0] for i in {*known, *run}}
    drawn = random.choice(known, most)
    for name, ids in (
        ("drawn", drawn),
        ("neighbouring", run),
        ("descending", run[::-1]),
        *((f"the first {count} drawn", drawn[:count]) for count in (2, 255, 257)),
    ):
        bench.count += 1
        found = table.rows(ids, dtype=bench.dtype)
        wanted = np.stack([singles[int(i)] for i in ids])
        wrong = int((found != wanted).any(axis=1).sum())
        if wrong:
            bench.faults.append(
                f"{len(ids)} {name} rows of the table in one read: {wrong} are others"
            )


def _image_tokens(bench: LoopBench) -> None:
    """``max_image_tokens`` lowers the grid as far as it must, and no further."""
    picture, other = noise(11), noise(12)
    answer = Expected(bench.words[:3], "length")
    # As large as two by two tiles: every grid sees another number of them.
    side = 2 * bench.manifest.image_processing.tile_size
    large = np.resize(picture, (side, side, 3))
    for images in ([large], [picture, other]):
        prompt = " and ".join(["<image>"] * len(images)) + f" {SENTENCE}"
        grids = list(_grids(bench, images))
        least = min(tokens for _, tokens in grids)
        bounds = {bound for _, tokens in grids for bound in (tokens, tokens - 1)}
        with bench.scripted():
            for bound in sorted(bounds, reverse=True):
                ask = _asking(bench, prompt, images, bound)
                name = f"{len(images)} pictures within {bound} tokens"
                if bound < least:
                    _refuses(bench, name, RequestError, ask, str(least))
                    continue
                grid = next(grid for grid, tokens in grids if tokens <= bound)
                expected = Expected(answer.ids, "length", lowered=int(grid is not None))
                bench.run(name, bench.request(prompt, images, grid=grid), expected, ask)
    if bench.manifest.prompt is not None:
        _of_a_message(bench, picture)


def _asking(
    bench: LoopBench, prompt: str, images: list[Any], bound: int
) -> Callable[[], AnswerStream]:
    return lambda: bench.model.stream(
        prompt, images, raw=True, max_image_tokens=bound, max_new_tokens=3
    )


def _of_a_message(bench: LoopBench, picture: Array) -> None:
    """The same in a conversation, down to thumbnails."""
    grid, tokens = list(_grids(bench, [picture]))[-1]
    processor = bench.requests.processor(grid)
    prepared = [bench.requests.prepare(picture, processor)]
    pieces = compose(bench.requests.prompt_format(), (user_message(SENTENCE, images=1),))
    request = bench.requests.assemble(pieces, prepared)
    expected = Expected(bench.words[:2], "length", lowered=int(grid is not None))

    def ask(bound: int) -> AnswerStream:
        chat: Chat = bench.model.chat()
        return chat.stream(SENTENCE, [picture], max_image_tokens=bound, max_new_tokens=2)

    with bench.scripted():
        name = f"a message within {tokens} tokens for its picture"
        bench.run(name, request, expected, lambda: ask(tokens))
        _refuses(bench, f"{name}, one less", RequestError, lambda: ask(tokens - 1), str(tokens))


def _grids(bench: LoopBench, pictures: list[Array]) -> Iterator[tuple[str | None, int]]:
    """The artifact's own grid (None) and those below it, with the tokens of all pictures."""

    def count(anyres: AnyRes) -> int:
        return sum(anyres.layout(*each.shape[:2]).num_image_tokens for each in pictures)

    requests = bench.requests
    named = []
    for name in GRID_NAMES:
        # Larger than the artifact's, or it shares no candidate with it.
        with suppress(RequestError):
            named.append((name, requests.processor(name).anyres))
    most = requests.processor().anyres
    yield None, count(most)
    tiles = most.max_tiles
    for name, anyres in sorted(named, key=lambda each: -each[1].max_tiles):
        if anyres.max_tiles < tiles:
            tiles = anyres.max_tiles
            yield name, count(anyres)


def _lengths(bench: LoopBench) -> None:
    """A prompt that leaves no room for a token is refused before anything is computed."""
    words = bench.words
    picture, pictured = noise(13), f"<image> {SENTENCE}"
    plain, shown = bench.request(SENTENCE), bench.request(pictured, [picture], grid="base")
    model = bench.model
    for name, request, ask in (
        ("text", plain, lambda: model.stream(SENTENCE, raw=True, max_new_tokens=3)),
        (
            "a picture",
            shown,
            lambda: model.stream(pictured, [picture], raw=True, grid="base", max_new_tokens=3),
        ),
    ):
        with bench.scripted(capacity=request.num_tokens + 1):
            expected = Expected(words[:2], "context")
            bench.run(f"{name} with room for a token", request, expected, ask)
        for less in (0, 1):
            with bench.scripted(capacity=request.num_tokens - less):
                what = f"{name} in a context of {request.num_tokens - less} tokens"
                _refuses(bench, what, PromptError, ask, str(request.num_tokens))
    with bench.scripted(capacity=plain.num_tokens):
        given = PromptOptions(raw=True)
        _refuses(
            bench,
            "given tokens after a prompt that fills the context",
            PromptError,
            lambda: model.replay(SENTENCE, (), words[:1], lambda number, row: None, given),
            str(plain.num_tokens),
        )
    if bench.manifest.prompt is not None:
        pieces = compose(bench.requests.prompt_format(), (user_message(SENTENCE),))
        count = bench.requests.assemble(pieces, ()).num_tokens
        with bench.scripted(capacity=count):
            _refuses(
                bench,
                "a message that fills the context",
                PromptError,
                lambda: model.chat().stream(SENTENCE, max_new_tokens=1),
                str(count),
            )


def _frames(bench: LoopBench, most: int) -> None:
    """``num_frames`` and ``frame_choice`` reach the video; more than were planned for do not."""
    frames = np.stack([noise(seed) for seed in range(20, 20 + _FRAMES)])
    prompt, answer = f"<video> {SENTENCE}", Expected(bench.words[:3], "length")
    many = np.resize(frames, (most + 1, *frames.shape[1:]))
    choices: tuple[FrameChoice, ...] = ("reference", "original")
    with bench.scripted():
        for count in range(1, min(_FRAMES, most + 1)):
            for choice in choices:
                chosen = frames[list(choose_frames(_FRAMES, count, choice))]
                bench.run(
                    f"{count} of {_FRAMES} frames by the choice {choice}",
                    bench.request(prompt, video=chosen),
                    answer,
                    lambda count=count, choice=choice: bench.model.stream(  # type: ignore[misc]
                        prompt,
                        video=frames,
                        num_frames=count,
                        frame_choice=choice,
                        raw=True,
                        max_new_tokens=3,
                    ),
                )
        _refuses(
            bench,
            f"{most + 1} frames",
            VideoError,
            lambda: bench.model.stream(prompt, video=many, num_frames=most + 1, raw=True),
            str(most),
        )


def _refuses(
    bench: LoopBench,
    name: str,
    error: type[RequestError],
    ask: Callable[[], object],
    number: str,
) -> None:
    """Whether a request is refused at once, for the right reason, with nothing computed."""
    bench.count += 1
    runs, tiles = bench.decoder.runs, bench.encoder.tiles
    try:
        found = ask()
    except error as refusal:
        if number not in str(refusal):
            bench.faults.append(f"{name}: the refusal does not say {number}: {refusal}"[:300])
    except Exception as other:
        bench.faults.append(f"{name}: {type(other).__name__}: {other}"[:300])
    else:
        bench.faults.append(f"{name}: it is accepted")
        if isinstance(found, AnswerStream):
            found.close()
    if (bench.decoder.runs, bench.encoder.tiles) != (runs, tiles):
        bench.faults.append(f"{name}: something was computed before it was refused")
