"""Prompts put together by hand-computable rules, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava_edge.profiles.errors import PromptError
from llava_edge.runtime.manifest import (
    Copy,
    Cut,
    Joint,
    PromptFormat,
    Trim,
    Turn,
)
from llava_edge.runtime.prompt import (
    Media,
    Message,
    Piece,
    Text,
    compose,
    raw_pieces,
    rendered,
    user_message,
)
from llava_edge.runtime.records import from_json, to_json

FORMAT = PromptFormat(
    source="template",
    family="vicuna",
    prefix="^",
    default_system="(default)",
    system=Turn("(", ")"),
    user=Turn("U:", "."),
    user_after_system="u:",
    assistant=Turn("A:", ";"),
    generation_prompt="A:",
    image="<image>\n",
    video="[<video>]",
    special_tokens=(),
    text_after="~",
    joints=(Joint("text", "text", "+"),),
)
IN_PLACE = replace(FORMAT, part_order=(("image", "video", "text"),))
IMAGE, VIDEO = Media("image"), Media("video")


def say(text: str) -> Message:
    return Message("assistant", (Text(text),))


def rule(text: str) -> Message:
    return Message("system", (Text(text),))


@pytest.mark.parametrize(
    ("prompt_format", "messages", "expected"),
    [
        pytest.param(FORMAT, (user_message("q"),), "^(default)U:q~.A:", id="one question"),
        pytest.param(FORMAT, (rule("r"), user_message("q")), "^(r)u:q~.A:", id="system"),
        pytest.param(
            FORMAT,
            (user_message("q"), say("a"), user_message("p")),
            "^(default)U:q~.A:a;U:p~.A:",
            id="two turns",
        ),
        pytest.param(
            FORMAT,
            (user_message("q", images=2, videos=1),),
            "^(default)U:<image>\n<image>\n[<video>]q~.A:",
            id="media first",
        ),
        pytest.param(
            FORMAT,
            (Message("user", (Text("a"), VIDEO, Text("b"), IMAGE)),),
            "^(default)U:<image>\n[<video>]a+b~.A:",
            id="media first wherever they were given",
        ),
        pytest.param(
            IN_PLACE,
            (Message("user", (Text("a"), VIDEO, Text("b"), Text("c"), IMAGE)),),
            "^(default)U:a~[<video>]b+c~<image>\n.A:",
            id="media in place",
        ),
        pytest.param(
            FORMAT, (user_message("", images=1),), "^(default)U:<image>\n.A:", id="no text"
        ),
        pytest.param(
            FORMAT,
            (user_message("see <image> and <image>!", images=2),),
            "^(default)U:see <image> and <image>!~.A:",
            id="marks stay where they were written",
        ),
        pytest.param(
            FORMAT,
            (user_message("<video> of <image>", images=1, videos=1),),
            "^(default)U:<video> of <image>~.A:",
            id="marks of both kinds",
        ),
        pytest.param(
            FORMAT,
            (user_message("clip <video>", images=1, videos=1),),
            "^(default)U:<image>\nclip <video>~.A:",
            id="a video's mark and an image without one",
        ),
        pytest.param(
            replace(FORMAT, user=Turn("U:", ".", Trim("any", "any"))),
            (user_message("  q \n"), say(" a "), user_message("\tp")),
            "^(default)U:q~.A: a ;U:p~.A:",
            id="stripped users",
        ),
    ],
)
def test_a_conversation_is_put_together_from_segments(
    prompt_format: PromptFormat, messages: tuple[Message, ...], expected: str
) -> None:
    assert rendered(compose(prompt_format, messages)) == expected


def test_pieces_tell_template_text_from_peoples_text() -> None:
    assert compose(FORMAT, (user_message("a <image> b", images=1),)) == (
        Piece("template", "^"),
        Piece("template", "(default)"),
        Piece("template", "U:"),
        Piece("text", "a "),
        Piece("image", "<image>"),
        Piece("text", " b"),
        Piece("template", "~"),
        Piece("template", "."),
        Piece("template", "A:"),
    )


def test_marks_are_plain_text_when_turned_off_and_outside_user_text() -> None:
    messages = (rule("<image>"), user_message("<image> is a mark", images=1))
    pieces = compose(FORMAT, messages, image_marks=False)
    assert [p.text for p in pieces if p.kind == "text"] == ["<image>", "<image> is a mark"]
    assert [p.kind for p in pieces].count("image") == 1
    marked = compose(FORMAT, messages)
    assert [p.text for p in marked if p.kind == "text"] == ["<image>", " is a mark"]


@pytest.mark.parametrize(
    ("text", "images", "videos", "words"),
    [
        pytest.param("<image> <image>", 1, 0, "1 images were given.*2 <image> marks", id="more"),
        pytest.param("<image>", 2, 0, "2 images were given.*1 <image> marks", id="fewer"),
        pytest.param("<image>", 0, 0, "0 images were given", id="none given"),
        pytest.param("<video>", 1, 0, "0 videos were given", id="another kind"),
        pytest.param("<image><video>", 2, 2, "2 images.*2 videos", id="both faults together"),
        pytest.param("", 0, 0, "prompt is empty", id="nothing"),
        pytest.param(" \n\t", 0, 0, "prompt is empty", id="blanks"),
    ],
)
def test_marks_and_media_must_agree(text: str, images: int, videos: int, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        compose(FORMAT, (user_message(text, images, videos),))


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param((), id="none"),
        pytest.param((rule("r"),), id="system alone"),
        pytest.param((say("a"),), id="assistant first"),
        pytest.param((user_message("q"), user_message("p")), id="user twice"),
        pytest.param((user_message("q"), say("a")), id="assistant last"),
        pytest.param((user_message("q"), rule("r"), user_message("p")), id="system inside"),
        pytest.param((Message("system", (IMAGE,)), user_message("q")), id="image of the system"),
        pytest.param((Message("system", ()), user_message("q")), id="system without text"),
    ],
)
def test_conversations_of_another_order_are_refused(messages: tuple[Message, ...]) -> None:
    with pytest.raises(PromptError):
        compose(FORMAT, messages)


def test_a_template_without_system_turns_refuses_one() -> None:
    with pytest.raises(PromptError, match="no system turn"):
        compose(replace(FORMAT, system=None), (rule("r"), user_message("q")))


def test_an_answer_may_come_last_without_a_generation_prompt() -> None:
    pieces = compose(FORMAT, (user_message("q"), say("a")), generation_prompt=False)
    assert rendered(pieces) == "^(default)U:q~.A:a;"


def test_a_raw_prompt_is_all_template_text_but_its_marks() -> None:
    assert raw_pieces("[INST] <image>\nq [/INST]</s>", images=1) == (
        Piece("template", "[INST] "),
        Piece("image", "<image>"),
        Piece("template", "\nq [/INST]</s>"),
    )


@pytest.mark.parametrize(
    ("prompt", "images"),
    [("no mark", 1), ("<image>", 0), ("<image> <image>", 1), ("", 0), ("  ", 0)],
)
def test_a_raw_prompt_needs_a_mark_for_each_medium(prompt: str, images: int) -> None:
    with pytest.raises(PromptError):
        raw_pieces(prompt, images=images)


def test_a_format_survives_the_manifest() -> None:
    assert from_json(PromptFormat, to_json(FORMAT)) == FORMAT
    assert from_json(PromptFormat, to_json(replace(FORMAT, system=None))).system is None
