"""Prompt: a conversation put together from the plain segments of a chat template.

The result is a list of pieces, because text of the template and text of people are encoded by
different rules: only the former may hold control tokens. There is no template engine here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from llava_edge.profiles.errors import PromptError
from llava_edge.runtime.manifest import PromptFormat

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
) -> tuple[Piece, ...]:
    """Put a conversation together.

    ``<image>`` and ``<video>`` in a user's text are places for that message's media, which then
    stay where they were written; without marks media stand where the template puts them.

    Args:
        prompt_format: segments of the template.
        messages: an optional system message, then user and assistant in turn, a user's last.
        image_marks: whether marks in a user's text are places; if not they are plain text.
        generation_prompt: open the assistant's turn at the end.

    Returns:
        Pieces without empty ones; neighbours of equal kind may occur.

    Raises:
        PromptError: roles do not alternate, a message is empty, the template knows no system
            turn, or marks and media of a message differ in number.
    """
    _check_roles(messages, prompt_format, generation_prompt)
    pieces: list[Piece] = [Piece("template", prompt_format.prefix)]
    if messages[0].role != "system":
        pieces.append(Piece("template", prompt_format.default_system))
    previous = ""
    for message in messages:
        if message.role == "user":
            after_system = previous == "system"
            before = prompt_format.user_after_system if after_system else prompt_format.user.before
            pieces.append(Piece("template", before))
            pieces += _user_parts(prompt_format, message, image_marks)
            pieces.append(Piece("template", prompt_format.user.after))
        else:
            turn = prompt_format.system if message.role == "system" else prompt_format.assistant
            assert turn is not None
            text = _stripped(prompt_format, message.role, _only_text(message))
            pieces += [
                Piece("template", turn.before),
                Piece("text", text),
                Piece("template", turn.after),
            ]
        previous = message.role
    if generation_prompt:
        pieces.append(Piece("template", prompt_format.generation_prompt))
    return tuple(piece for piece in pieces if piece.text)


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


def _stripped(prompt_format: PromptFormat, role: str, text: str) -> str:
    return text.strip() if role in prompt_format.stripped_roles else text


def _user_parts(
    prompt_format: PromptFormat, message: Message, image_marks: bool
) -> Iterator[Piece]:
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
    if prompt_format.media_first:
        items.sort(key=lambda p: ("image", "video", "text").index(_kind(p)))
    for index, item in enumerate(items):
        if isinstance(item, Media):
            segment = prompt_format.image if item.kind == "image" else prompt_format.video
            yield from _split_marks(segment, "template", (item.kind,))
            continue
        yield from _split_marks(_stripped(prompt_format, "user", item.text), "text", marked)
        text_follows = index + 1 < len(items) and isinstance(items[index + 1], Text)
        yield Piece(
            "template", prompt_format.text_separator if text_follows else prompt_format.text_after
        )


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
