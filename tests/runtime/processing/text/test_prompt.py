"""Prompts put together by hand-computable rules, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest

from llava_edge.profiles.errors import PromptError
from llava_edge.runtime.artifact.manifest import Copy, Cut, Joint, PromptFormat, Trim, Turn
from llava_edge.runtime.artifact.prompt_date import format_date, is_date_form
from llava_edge.runtime.processing.text.chat_prompt import (
    Media,
    Message,
    Piece,
    Text,
    at_time,
    compose,
    raw_pieces,
    rendered,
    user_message,
)
from llava_edge.runtime.util.json_codec import from_json, to_json

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


WIDE = replace(
    FORMAT,
    text_before="<",
    text_after=">",
    joints=(
        Joint("image", "text", "\n<"),
        Joint("image", "image", ", "),
        Joint("image", "end", "!"),
        Joint("start", "video", "V"),
    ),
    image="[<image>]",
    video="<video>",
)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        pytest.param((Text("a"),), "<a>", id="around a text"),
        pytest.param((Text("a"), Text("b")), "<a><b>", id="around each text"),
        pytest.param((IMAGE, Text("a")), "[<image>\n<a>", id="between an image and a text"),
        pytest.param((IMAGE, IMAGE, Text("a")), "[<image>, <image>\n<a>", id="between images"),
        pytest.param((IMAGE,), "[<image>!", id="after the last image"),
        pytest.param((VIDEO, Text("a")), "V<video><a>", id="before the first video"),
    ],
)
def test_a_joint_replaces_what_stands_between_two_parts(
    parts: tuple[Text | Media, ...], expected: str
) -> None:
    made = rendered(compose(WIDE, (Message("user", parts),)))
    assert made == f"^(default)U:{expected}.A:"


def test_parts_are_sorted_by_group_and_keep_their_order_inside_one() -> None:
    parts = (IMAGE, Text("a"), VIDEO, IMAGE, Text("b"))
    orders = {
        (("text",), ("image", "video")): "a+b~<image>\n[<video>]<image>\n",
        (("video",), ("image",), ("text",)): "[<video>]<image>\n<image>\na+b~",
        (("image", "video"), ("text",)): "<image>\n[<video>]<image>\na+b~",
    }
    for order, expected in orders.items():
        prompt_format = replace(FORMAT, part_order=order)
        made = rendered(compose(prompt_format, (Message("user", parts),)))
        assert made == f"^(default)U:{expected}.A:", order


@pytest.mark.parametrize(
    ("trim", "expected"),
    [
        (Trim("any", "none"), "q \n"),
        (Trim("none", "any"), " \n q"),
        (Trim("newline", "newline"), " \n q "),
        (Trim("blank", "blank"), "\n q \n"),
        (Trim("any", "newline"), "q "),
    ],
)
def test_a_trim_removes_its_own_white_space_on_its_own_side(trim: Trim, expected: str) -> None:
    prompt_format = replace(FORMAT, user=Turn("U:", ".", trim))
    made = rendered(compose(prompt_format, (user_message(" \n q \n"),)))
    assert made == f"^(default)U:{expected}~.A:"


def test_a_body_is_trimmed_with_its_media_and_not_across_a_system_turn() -> None:
    whole = replace(FORMAT, body_trim=Trim("any", "any"), text_after="", joints=())
    cases = {
        (user_message(" q "),): "^(default)U:q.A:",
        (user_message(" q ", images=1),): "^(default)U:<image>\n q.A:",
        (user_message("", images=1),): "^(default)U:<image>.A:",
        (user_message("  \n", images=1),): "^(default)U:<image>.A:",
        (rule("r"), user_message(" q ")): "^(r)u:q.A:",
    }
    for messages, expected in cases.items():
        assert rendered(compose(whole, messages)) == expected
    joined = replace(whole, body_joins=("system",))
    assert rendered(compose(joined, (rule("r"), user_message(" q ")))) == "^(r)u: q.A:"
    assert rendered(compose(joined, (user_message(" q "),))) == "^(default)U:q.A:"
    led = replace(whole, body_joins=("default",), user_after_default="")
    assert rendered(compose(led, (user_message(" q "), say("a"), user_message(" p ")))) == (
        "^(default) q.A:a;U:p.A:"
    )


def test_a_system_text_may_be_printed_more_than_once() -> None:
    system = Turn("(", ")", Trim("any", "any"), (Copy("|"), Copy("/", Trim("none", "any"))))
    pieces = compose(replace(FORMAT, system=system), (rule(" r "), user_message("q")))
    assert rendered(pieces) == "^(r| r / r)u:q~.A:"
    assert [p.text for p in pieces if p.kind == "text"] == ["r", " r ", " r", "q"]


def test_a_system_turn_may_precede_the_last_question() -> None:
    late = replace(FORMAT, system_place="last")
    messages = (rule("r"), user_message("q"), say("a"), user_message("p"))
    assert rendered(compose(late, messages)) == "^U:q~.A:a;(r)u:p~.A:"
    assert rendered(compose(late, messages[:2])) == "^(r)u:q~.A:"


def test_an_earlier_answer_loses_its_reasoning() -> None:
    cut = Turn("A:", ";", cut=Cut("</think>", "newline"))
    prompt_format = replace(FORMAT, assistant=cut)
    first = replace(FORMAT, assistant=Turn("A:", ";", cut=Cut("</think>", place="first")))
    conversation = (user_message("q"), say("a</think>b</think>c"), user_message("p"))
    assert "A:b</think>c;" in rendered(compose(first, conversation))
    for answer, kept in {
        "<think>why</think>\n\nso": "so",
        "a</think>b</think> c": " c",
        "no reasons": "no reasons",
        "</think>": "",
    }.items():
        made = rendered(compose(prompt_format, (user_message("q"), say(answer), user_message("p"))))
        assert made == f"^(default)U:q~.A:{kept};U:p~.A:"


def test_dates_are_those_of_the_request_and_only_in_the_template() -> None:
    dated = replace(
        FORMAT, prefix="<date:%d %b %Y>", user=Turn("(<date:%H>)", "."), dates=("%d %b %Y", "%H")
    )
    now = datetime(2026, 3, 4, 17, 5)
    question = (user_message("<date:%H>"),)
    expected = "04 Mar 2026(default)(17)<date:%H>~.A:"
    assert rendered(compose(dated, question, now=now)) == expected
    fixed = at_time(dated, now)
    assert fixed.dates == ()
    assert rendered(compose(fixed, question)) == expected
    assert str(datetime.now().year) in rendered(compose(dated, question))
    # A mark that is no form of the format is text of the template.
    assert rendered(compose(replace(dated, dates=()), question)).startswith("<date:%d %b %Y>")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("%d %b %Y", "04 Mar 2026"),
        ("%A, %-d %B %y, %-H:%M:%S %p 100%%", "Wednesday, 4 March 26, 7:05:00 AM 100%"),
        ("%j %a %I", "063 Wed 07"),
    ],
)
def test_a_date_has_its_form(form: str, expected: str) -> None:
    assert is_date_form(form)
    assert format_date(form, datetime(2026, 3, 4, 7, 5)) == expected


@pytest.mark.parametrize("form", ["%999999999d", "%c", "%", "%-", "x" * 65, "", "%d\n", "%Ey"])
def test_a_form_with_widths_or_unknown_directives_is_none(form: str) -> None:
    assert not is_date_form(form)
