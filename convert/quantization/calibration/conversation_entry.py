"""One entry of a data set of conversations, in the forms that are in use, as a ``Conversation``.

- ``{"image": …, "question": …, "answer": …}``;
- LLaVA's: ``{"image": …, "conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}``;
- OpenAI's, as LLaMA-Factory and ms-swift take it: ``{"images": […], "messages": [{"role": "user",
  "content": …}, {"role": "assistant", …}]}``, where ``content`` may be a list of parts.

``<image>`` marks where a picture stands. At the beginning or end of a question it is taken out with
the white space around it, since the template places pictures by itself; that is what LLaVA's own
training code does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llava_edge.runtime.processing.images.loading import ImageSource, path_label
from llava_edge.runtime.processing.text.chat_prompt import MARKS
from llava_edge.runtime.util.jsonl import path_inside
from llava_edge.runtime.util.limits import Limits

OpenImage = Callable[[], ImageSource]

_ROLES = {
    **{"human": "user", "user": "user"},
    **{"gpt": "assistant", "assistant": "assistant", "system": "system"},
}
_TOOLS = ("function", "function_call", "observation", "tool", "tool_call", "tool_response")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_AT_AN_END = re.compile(rf"^(?:\s*{MARKS['image']}\s*)+|(?:\s*{MARKS['image']}\s*)+$")


class EntryFaultError(Exception):
    """An entry is malformed; says what and the rule."""


class LeftOutError(Exception):
    """An entry is well formed and of a kind that is not used; says why."""


@dataclass(frozen=True)
class Turn:
    """A question with its images, each opened anew at every call, and its answer."""

    question: str
    answer: str
    images: tuple[OpenImage, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """One turn or several.

    Attributes:
        name: what messages call it.
        question: of the first turn.
        answer: of the first turn.
        image: first one of the first turn; opens anew at every call, None for text only.
        more_images: others of the first turn.
        later: the turns after it.
        system: text of the system turn; None leaves what the template puts in its place.
        limits: what its images are opened within.
    """

    name: str
    question: str
    answer: str
    image: OpenImage | None = None
    more_images: tuple[OpenImage, ...] = ()
    later: tuple[Turn, ...] = ()
    system: str | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns, in order."""
        first = () if self.image is None else (self.image, *self.more_images)
        return (Turn(self.question, self.answer, first), *self.later)

    @property
    def images(self) -> tuple[OpenImage, ...]:
        """Images of all turns, in order."""
        return tuple(image for turn in self.turns for image in turn.images)


def reason_of(error: Exception, conversation: Conversation) -> str:
    """Why a conversation is left out, for the manifest: where its folder lies is not told."""
    said = str(error)
    for opened in conversation.images:
        image = opened()
        if isinstance(image, Path):
            said = said.replace(path_label(image), path_label(image.name))
    return said


def read_entry(folder: Path, name: str, entry: dict[str, Any]) -> Conversation:
    """A conversation of an entry.

    Args:
        folder: that images must lie in.
        name: of the entry.
        entry: see above.

    Raises:
        EntryFaultError: it is malformed.
        LeftOutError: it shows a video, calls tools or names pictures elsewhere.
    """
    for key in _OTHER_MEDIA:
        if entry.get(key):
            raise LeftOutError(f"it has {key}; calibration samples are texts and pictures")
    messages = list(_messages(entry))
    if any("\ud800" <= mark <= "\udfff" for _, text, _ in messages for mark in text):
        raise EntryFaultError("a text holds half a character (a lone surrogate); write it as UTF-8")
    images = _image_values(entry)
    inside = [image for _, _, shown in messages for image in shown]
    if images and inside:
        raise EntryFaultError("its images are named both beside and inside its messages")
    images += inside
    opened = [_opener(folder, image) for image in images]
    system = "\n".join(text for role, text, _ in messages if role == "system") or None
    pairs = _pairs([(role, text) for role, text, _ in messages if role != "system"])
    first, *later = _with_images(pairs, opened)
    shown = first.images
    return Conversation(
        name,
        first.question,
        first.answer,
        shown[0] if shown else None,
        shown[1:],
        tuple(later),
        system,
    )


def _messages(entry: dict[str, Any]) -> Iterator[tuple[str, str, list[Any]]]:
    """Role, text and images that stand in the message itself."""
    given = [key for key in ("conversations", "messages") if entry.get(key) is not None]
    if len(given) > 1:
        raise EntryFaultError("it has both conversations and messages; one of them is read")
    if not given:
        for key, whose in (("question", "user"), ("answer", "assistant")):
            value = entry.get(key)
            if not isinstance(value, str) or not value.strip():
                raise EntryFaultError(
                    f"{key} is {value!r:.40}, not a text; an entry has question and answer, or "
                    "conversations, or messages"
                )
            yield whose, value, []
        return
    (key,) = given
    listed = entry[key]
    if not isinstance(listed, list) or not listed:
        raise EntryFaultError(f"{key} is {listed!r:.40}, not a list of messages")
    if isinstance(system := entry.get("system"), str) and system.strip():
        yield "system", system, []
    for place, message in enumerate(listed):
        where = f"{key}[{place}]"
        if not isinstance(message, dict):
            raise EntryFaultError(f"{where} is {message!r:.40}, not an object")
        said = message.get("from", message.get("role"))
        if said in _TOOLS or message.get("tool_calls"):
            raise LeftOutError("it calls tools; calibration samples are questions and answers")
        role = _ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise EntryFaultError(
                f"{where} is from {said!r:.40}; known are {', '.join(sorted(_ROLES))}"
            )
        text, shown = _content(where, message.get("value", message.get("content")))
        if shown and role != "user":
            raise EntryFaultError(f"{where} shows a picture; only a user does")
        yield role, text, shown


def _content(where: str, value: Any) -> tuple[str, list[Any]]:
    if isinstance(value, str):
        return value, []
    if not isinstance(value, list):
        raise EntryFaultError(f"{where} holds {value!r:.40}, not a text or a list of parts")
    texts, shown = [], []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            texts.append(MARKS["image"])
            # A part without a name of its own is a place for one of the entry's images.
            named = [part[key] for key in ("image", "image_url", "path", "url") if part.get(key)]
            shown += [each.get("url", each) if isinstance(each, dict) else each for each in named]
        elif kind in ("video", "video_url", "audio", "input_audio"):
            raise LeftOutError(f"it has a part of type {kind}; samples are texts and pictures")
        else:
            raise EntryFaultError(f"{where} has a part {part!r:.40}; parts are texts and images")
    return "".join(texts), shown


def _image_values(entry: dict[str, Any]) -> list[Any]:
    given = [key for key in ("image", "images") if entry.get(key) not in (None, [], "")]
    if len(given) > 1:
        raise EntryFaultError("it has both image and images; one of them is read")
    value = entry[given[0]] if given else []
    return list(value) if isinstance(value, list) else [value]


def _opener(folder: Path, value: Any) -> OpenImage:
    if isinstance(value, dict) and not value.get("bytes"):
        value = value.get("path")
    if isinstance(value, str) and ("://" in value or value.startswith("data:")):
        raise LeftOutError(f"image {value!r:.60} is no file; nothing is fetched")
    path = path_inside(folder, value)
    if path is None:
        raise EntryFaultError(f"image is {value!r:.80}, no path inside the folder")
    return partial(Path, path)


def _pairs(messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Questions and answers in turn."""
    while messages and messages[0][0] == "assistant":
        # Left out by LLaVA's training code as well: nothing was asked.
        messages = messages[1:]
    if messages and messages[-1][0] == "user":
        messages = messages[:-1]
    roles = [role for role, _ in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise EntryFaultError(
            f"its roles are {', '.join(roles) or 'none'}; user and assistant follow each other, "
            "and a question has an answer"
        )
    questions, answers = messages[::2], messages[1::2]
    for _, answer in answers:
        if not answer.strip():
            raise EntryFaultError(f"answer is {answer!r:.40}, not a text")
    return [(asked, said) for (_, asked), (_, said) in zip(questions, answers, strict=True)]


def _with_images(pairs: list[tuple[str, str]], images: list[OpenImage]) -> list[Turn]:
    """Turns with their images, by marks or all in the first one."""
    mark = MARKS["image"]
    counts = [question.count(mark) for question, _ in pairs]
    if not images:
        return [_turn(question, answer, []) for question, answer in pairs]
    if not any(counts):
        counts = [len(images)] + [0] * (len(pairs) - 1)
    if sum(counts) != len(images):
        raise EntryFaultError(
            f"it has {len(images)} images and {sum(counts)} {mark} marks; there is one mark for "
            "each image, or none"
        )
    turns = []
    for (question, answer), count in zip(pairs, counts, strict=True):
        without = _AT_AN_END.sub("", question)
        # A mark inside the text says where its picture stands; then all of them do.
        text = question if mark in without else without
        turns.append(_turn(text, answer, images[:count]))
        images = images[count:]
    return turns


def _turn(question: str, answer: str, images: list[OpenImage]) -> Turn:
    if not question.strip() and not images:
        raise EntryFaultError(f"question is {question!r:.40}, not a text")
    return Turn(question, answer, tuple(images))
