"""Prompt: a conversation put together from the plain segments of a chat template.

The result is a list of pieces, because text of the template and text of people are encoded by
different rules: only the former may hold control tokens. There is no template engine here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from llava_edge.profiles.errors import PromptError
from llava_edge.runtime.artifact.manifest import PromptFormat, Space, Trim, Turn
from llava_edge.runtime.artifact.prompt_date import fill_dates
from llava_edge.runtime.util.json_codec import from_json, to_json

Kind = Literal["image", "video"]
Role = Literal["system", "user", "assistant"]

MARKS: dict[Kind, str] = {"image": "<image>", "video": "<video>"}
"""How a place for an image or a video is written, in prompts and in compiled segments."""


@dataclass(frozen=True)
class Text:
    """A text part of a message."""

    text: str


@dataclass(frozen=True)
class Media:
    """An image or a video of a message; the pixels travel elsewhere, in the same order."""

    kind: Kind


@dataclass(frozen=True)
class Message:
    """What one role says. Only a user shows media; system and assistant have one text part."""

    role: Role
    parts: tuple[Text | Media, ...]


@dataclass(frozen=True)
class Piece:
    """A run of the finished prompt.

    ``template`` text may hold control tokens; ``text`` comes from people or from the model and is
    never read as a control token; ``image`` and ``video`` are marks, one medium each.
    """

    kind: Literal["template", "text", "image", "video"]
    text: str


def user_message(text: str, images: int = 0, videos: int = 0) -> Message:
    """A user's message: its media, then its text; an empty text makes no part."""
    media: tuple[Text | Media, ...] = (Media("image"),) * images + (Media("video"),) * videos
    return Message("user", (*media, Text(text)) if text else media)


def compose(
    prompt_format: PromptFormat,
    messages: Sequence[Message],
    *,
    image_marks: bool = True,
    generation_prompt: bool = True,
    now: datetime | None = None,
) -> tuple[Piece, ...]:
    """Put a conversation together.

    ``<image>`` and ``<video>`` in a user's text are places for that message's media, which then
    stay where they were written; without marks media stand where the template puts them.

    Args:
        prompt_format: segments of the template.
        messages: an optional system message, then user and assistant in turn, a user's last.
        image_marks: whether marks in a user's text are places; if not they are plain text.
        generation_prompt: open the assistant's turn at the end.
        now: what a template that writes the date takes for now; None for this machine's clock.

    Returns:
        Pieces without empty ones; neighbours of equal kind may occur.

    Raises:
        PromptError: roles do not alternate, a message is empty, the template knows no system
            turn, or marks and media of a message differ in number.
    """
    turns = compose_turns(
        prompt_format,
        messages,
        image_marks=image_marks,
        generation_prompt=generation_prompt,
        now=now,
    )
    return tuple(piece for _, pieces in turns for piece in pieces)


def compose_turns(
    prompt_format: PromptFormat,
    messages: Sequence[Message],
    *,
    image_marks: bool = True,
    generation_prompt: bool = True,
    now: datetime | None = None,
) -> list[tuple[str, list[Piece]]]:
    """``compose`` with a name for each stretch of the prompt: a role, or what else is written."""
    _check_roles(messages, prompt_format, generation_prompt)
    turns = [("beginning", [Piece("template", prompt_format.prefix)])]
    given = messages[0] if messages[0].role == "system" else None
    if given is None:
        turns.append(("default system text", [Piece("template", prompt_format.default_system)]))
    talk = messages if given is None else messages[1:]
    asked = [index for index, message in enumerate(talk) if message.role == "user"]
    host = asked[0 if prompt_format.system_place == "first" else -1]
    for index, message in enumerate(talk):
        if message.role == "assistant":
            turns.append(("assistant", _spoken(prompt_format.assistant, message)))
            continue
        opening, joined = prompt_format.user.before, False
        if given is not None and index == host:
            assert prompt_format.system is not None
            turns.append(("system", _spoken(prompt_format.system, given)))
            opening = prompt_format.user_after_system
            joined = "system" in prompt_format.body_joins
        elif given is None and index == 0:
            joined = "default" in prompt_format.body_joins
            if prompt_format.user_after_default is not None:
                opening = prompt_format.user_after_default
        turns.append(("user", _asked(prompt_format, message, opening, image_marks, joined)))
    if generation_prompt:
        turns.append(("generation prompt", [Piece("template", prompt_format.generation_prompt)]))
    fill = fill_dates(prompt_format.dates, now)
    return [
        (
            name,
            [Piece(p.kind, fill(p.text)) if p.kind == "template" else p for p in pieces if p.text],
        )
        for name, pieces in turns
    ]


def at_time(prompt_format: PromptFormat, now: datetime) -> PromptFormat:
    """The same format with its dates written out, for prompts that are compared later."""
    fill = fill_dates(prompt_format.dates, now)

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return fill(value)
        if isinstance(value, list):
            return [filled(item) for item in value]
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        return value

    return from_json(PromptFormat, {**filled(to_json(prompt_format)), "dates": []})


def raw_pieces(prompt: str, images: int = 0, videos: int = 0) -> tuple[Piece, ...]:
    """Pieces of a finished prompt, to which no template is applied.

    Control tokens written in it are real ones, as they are for the reference's processor.

    Raises:
        PromptError: the prompt is empty, or its marks are not as many as the media.
    """
    if not prompt.strip():
        raise PromptError(_EMPTY)
    _check_marks((prompt,), {"image": images, "video": videos}, raw=True)
    return tuple(_split_marks(prompt, "template", tuple(MARKS)))


def rendered(pieces: Iterable[Piece]) -> str:
    """The prompt as one string, as a chat template would have written it."""
    return "".join(piece.text for piece in pieces)


_EMPTY = (
    "The prompt is empty: there is neither text nor an image. A prompt needs one of them. "
    "Write what is to be answered."
)


def _check_roles(
    messages: Sequence[Message], prompt_format: PromptFormat, generation_prompt: bool
) -> None:
    roles = [message.role for message in messages]
    if not roles:
        raise PromptError(_EMPTY)
    if roles[0] == "system" and prompt_format.system is None:
        raise PromptError(
            "A system message was given; this model's chat template has no system turn. "
            "Put the instruction into the first user message."
        )
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * len(turns)
    if not turns or turns != expected[: len(turns)] or (generation_prompt and len(turns) % 2 == 0):
        raise PromptError(
            f"The conversation's roles are {', '.join(roles)}. The rule: at most one system "
            "message, first; then user and assistant in turn; a user's message last. "
            "Join neighbouring messages of one role."
        )


def _only_text(message: Message) -> str:
    texts = [part.text for part in message.parts if isinstance(part, Text)]
    if len(texts) != 1 or len(message.parts) != 1:
        media = len(message.parts) - len(texts)
        raise PromptError(
            f"A {message.role} message has {len(texts)} text parts and {media} images or videos. "
            "It must be one text; images and videos belong to user messages."
        )
    return texts[0]


_CHARACTERS: dict[Space, str | None] = {"none": "", "any": None, "newline": "\n", "blank": " "}


def _trimmed(text: str, trim: Trim) -> str:
    # strip("") removes nothing, strip(None) all white space.
    return text.lstrip(_CHARACTERS[trim.left]).rstrip(_CHARACTERS[trim.right])


def _spoken(turn: Turn, message: Message) -> list[Piece]:
    """A turn of the system or the assistant."""
    text = _only_text(message)
    if turn.cut is not None and turn.cut.through in text:
        split = text.partition if turn.cut.place == "first" else text.rpartition
        text = _trimmed(split(turn.cut.through)[2], Trim(turn.cut.trim))
    pieces = [Piece("template", turn.before), Piece("text", _trimmed(text, turn.trim))]
    for copy in turn.copies:
        pieces += [Piece("template", copy.before), Piece("text", _trimmed(text, copy.trim))]
    return [*pieces, Piece("template", turn.after)]


def _asked(
    prompt_format: PromptFormat, message: Message, opening: str, image_marks: bool, joined: bool
) -> list[Piece]:
    """A user's turn; ``joined``: the body began before ``opening``."""
    body = list(_body(prompt_format, message, image_marks))
    trim = prompt_format.body_trim
    if not joined:
        body = _trimmed_ends(body, trim.left, 0)
    body = _trimmed_ends(body, trim.right, -1)
    return [Piece("template", opening), *body, Piece("template", prompt_format.user.after)]


def _trimmed_ends(body: list[Piece], space: Space, end: Literal[0, -1]) -> list[Piece]:
    """A body without white space at one end; a medium or visible text stops it."""
    body = list(body)
    while space != "none" and body and body[end].kind in ("template", "text"):
        piece = body.pop(end)
        trim = Trim(left=space) if end == 0 else Trim(right=space)
        if text := _trimmed(piece.text, trim):
            body.insert(0 if end == 0 else len(body), Piece(piece.kind, text))
            break
    return body


def _body(prompt_format: PromptFormat, message: Message, image_marks: bool) -> Iterator[Piece]:
    texts = [part.text for part in message.parts if isinstance(part, Text)]
    counts = Counter(part.kind for part in message.parts if isinstance(part, Media))
    if not counts and not any(text.strip() for text in texts):
        raise PromptError(_EMPTY)
    marked: tuple[Kind, ...] = ()
    if image_marks:
        _check_marks(texts, counts, raw=False)
        marked = tuple(kind for kind in MARKS if any(MARKS[kind] in text for text in texts))
    # Media with marks stand at their marks, so their items say nothing more.
    items = [p for p in message.parts if isinstance(p, Text) or p.kind not in marked]
    places: dict[str, int] = {
        k: i for i, group in enumerate(prompt_format.part_order) for k in group
    }
    items.sort(key=lambda p: places[_kind(p)])
    around = {
        "image": prompt_format.image.partition(MARKS["image"])[::2],
        "video": prompt_format.video.partition(MARKS["video"])[::2],
        "text": (prompt_format.text_before, prompt_format.text_after),
    }
    joints: dict[tuple[str, str], str] = {
        (joint.left, joint.right): joint.text for joint in prompt_format.joints
    }
    previous = "start"
    for kind in (*map(_kind, items), "end"):
        if previous != "start":
            item = items.pop(0)
            if isinstance(item, Media):
                yield Piece(item.kind, MARKS[item.kind])
            else:
                yield from _split_marks(
                    _trimmed(item.text, prompt_format.user.trim), "text", marked
                )
        joint = joints.get((previous, kind))
        if joint is not None:
            yield Piece("template", joint)
        else:
            yield Piece("template", around[previous][1] if previous in around else "")
            yield Piece("template", around[kind][0] if kind in around else "")
        previous = kind


def _kind(part: Text | Media) -> str:
    return "text" if isinstance(part, Text) else part.kind


def _check_marks(texts: Sequence[str], counts: dict[Kind, int], raw: bool) -> None:
    faults = []
    for kind, mark in MARKS.items():
        found = sum(text.count(mark) for text in texts)
        given = counts.get(kind, 0)
        if found != given and (found or raw):
            faults.append(f"{given} {kind}s were given and the text has {found} {mark} marks")
    if faults:
        rule = (
            "A raw prompt needs exactly one mark for each."
            if raw
            else "Either no marks (the template places them) or exactly one for each. "
            "To write a mark as plain text, turn image marks off."
        )
        raise PromptError(f"{'; '.join(faults)}. {rule}")


def _split_marks(
    text: str, kind: Literal["template", "text"], marked: Sequence[Kind]
) -> Iterator[Piece]:
    """Text and marks in order; a mark's piece holds the mark itself."""
    if not marked:
        yield Piece(kind, text)
        return
    first, *rest = marked
    for index, run in enumerate(text.split(MARKS[first])):
        if index:
            yield Piece(first, MARKS[first])
        yield from _split_marks(run, kind, rest)
