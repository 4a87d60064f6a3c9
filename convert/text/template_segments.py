"""What a chat template puts around texts and media, read off from what it made of the probes.

Whether the result holds in general is not decided here; see ``chat_template.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from llava_edge.convert.text.template_probes import (
    ANSWER,
    FIRST,
    KINDS,
    SECOND,
    SYSTEM,
    Renderer,
    Seen,
    Style,
    any_places,
    cut_at,
    other_form,
)
from llava_edge.runtime.artifact.manifest import Copy, Joint, PartKind, PromptFormat, Trim, Turn
from llava_edge.runtime.processing.text.chat_prompt import MARKS


def derive_format(renderer: Renderer, style: Style, family: str) -> PromptFormat:
    """Segments of a template, dates as marks.

    Raises:
        CheckpointError: a plain conversation has no usable text.
    """
    seen = Seen.of(renderer, style)
    tail, answer_before, between = seen.turns()
    end = _message_end(seen, tail, answer_before)
    generation_prompt = tail[len(end) :]
    body = _Body.of(seen.bodies, generation_prompt)
    head = body.head + body.lead_in
    after_answer = seen.run("answered", ANSWER, -1)
    opening = _later_opening(between, after_answer, head)
    before = opening.removesuffix(body.lead_in)
    assistant = Turn(
        answer_before[len(end) :],
        between[: len(between) - len(opening)],
        seen.trim("answer", "turns", ANSWER)[0],
        cut=seen.cut(),
    )
    system, prefix, after_system, place = _system(seen, body, before, assistant.after)
    leading = body.head[len(prefix) :]
    opens_alike = leading.endswith(before)
    part_trim, body_trim, joins = _user_trims(seen, has_system=system is not None)
    return PromptFormat(
        source="template",
        family=family,
        prefix=prefix,
        default_system=leading[: len(leading) - len(before)] if opens_alike else leading,
        system=system,
        user=Turn(before, body.tail, part_trim),
        user_after_system=after_system,
        user_after_default=None if opens_alike else "",
        assistant=assistant,
        generation_prompt=generation_prompt,
        image=body.segment("image"),
        video=body.segment("video"),
        special_tokens=(),
        text_before=body.before["text"],
        text_after=body.after["text"],
        joints=body.joints,
        part_order=seen.part_order(),
        body_trim=body_trim,
        body_joins=joins,
        system_place=place,
    )


def _message_end(seen: Seen, tail: str, answer_before: str) -> str:
    """What follows a user's text before the next segment, whichever role it belongs to."""
    end = seen.run("ended", FIRST, -1)
    if end is None or not (tail.startswith(end) and answer_before.startswith(end)):
        return _common_prefix(tail, answer_before)
    return end


def _later_opening(between: str, after_answer: str | None, head: str) -> str:
    """How a later user turn opens, with what precedes its text; the rest closes the answer."""
    closes = after_answer is not None and between.startswith(after_answer)
    opening = between[len(after_answer or "") :]
    if closes and opening and head.endswith(opening):
        return opening
    common = _common_suffix(between, head)
    # The first user turn may open in a way of its own.
    return opening if closes and not common.strip() else common


def _system(
    seen: Seen, body: _Body, before: str, after_answer: str
) -> tuple[Turn | None, str, str, Literal["first", "last"]]:
    """The system turn, what precedes it in every prompt, and how a user's turn opens after it."""
    bos = seen.renderer.variables.get("bos_token", "")
    bos = bos if body.head.startswith(bos) else ""
    ruled = seen.texts["rule"] or ""
    if SYSTEM not in ruled:
        return None, bos, before, "first"
    runs = cut_at(ruled, *[SYSTEM] * ruled.count(SYSTEM), FIRST)
    if runs is None:
        raise other_form(
            "system, user", f"the system text stands after the question, or between: {ruled!r:.200}"
        )
    opening, *between, middle, _ = runs
    prefix = bos if opening.startswith(bos) else ""
    place: Literal["first", "last"] = "first"
    late = cut_at(seen.texts["rule and turns"] or "", FIRST, ANSWER, SYSTEM)
    if late is not None:
        place = "last"
        prefix = opening.removesuffix(late[2].removeprefix(after_answer))
    middle = middle.removesuffix(body.lead_in)
    after_system = before if middle.endswith(before) else ""
    trims = seen.trim("rule", "rule", SYSTEM)
    copies = tuple(Copy(text, trim) for text, trim in zip(between, trims[1:], strict=True))
    after = middle[: len(middle) - len(after_system)]
    return Turn(opening[len(prefix) :], after, trims[0], copies), prefix, after_system, place


def _user_trims(
    seen: Seen, *, has_system: bool
) -> tuple[Trim, Trim, tuple[Literal["system", "default"], ...]]:
    """Trim of each text, trim of the whole body, and what a body is joined to on its left."""
    outer = seen.trim("later", "turns", SECOND)[0]
    part = Trim()
    if ("text", "text") in seen.bodies:
        part = Trim(
            left=seen.space("two", "left", "text text", SECOND, 0),
            right=seen.space("two", "right", "text text", FIRST, 0),
        )
    body = Trim(
        left="none" if part.left == outer.left else outer.left,
        right="none" if part.right == outer.right else outer.right,
    )
    joins: list[Literal["system", "default"]] = []
    if body.left != "none":
        if has_system and seen.space("ruled", "left", "rule", FIRST, 0) == "none":
            joins.append("system")
        if seen.space("first", "left", "ask", FIRST, 0) == "none":
            joins.append("default")
    return part, body, tuple(joins)


@dataclass(frozen=True)
class _Body:
    """Text around and between the parts of a user's message.

    Attributes:
        head: before the body, whatever it begins with.
        tail: after it.
        before: what precedes each part of a kind.
        after: what follows it.
        lead_in: between ``head`` and a text.
        kinds: those that the template shows.
    """

    head: str
    tail: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    joints: tuple[Joint, ...]
    lead_in: str
    kinds: frozenset[str]

    @classmethod
    def of(cls, bodies: Mapping[tuple[PartKind, ...], str], generation_prompt: str) -> _Body:
        gaps: dict[tuple[Any, Any], str] = {}
        for kinds, text in bodies.items():
            found = any_places(text, kinds)
            if found is not None:
                order, runs = found
                chain = ("start", *order, "end")
                for left, right, run in zip(chain, chain[1:], runs, strict=False):
                    gaps.setdefault((left, right), run)
        head = reduce(_common_prefix, (gap for (left, _), gap in gaps.items() if left == "start"))
        for pair, gap in gaps.items():
            if pair[1] == "end":
                gaps[pair] = gap.removesuffix(generation_prompt)
        tail = reduce(_common_suffix, (gap for (_, right), gap in gaps.items() if right == "end"))
        for pair, gap in gaps.items():
            if pair[0] == "start":
                gap = gap[len(head) :]
            gaps[pair] = gap[: len(gap) - len(tail)] if pair[1] == "end" else gap
        after = {kind: "" for kind in ("start", *KINDS)}
        before = {kind: "" for kind in (*KINDS, "end")}
        for kind in KINDS:
            rests = [gap for (left, _), gap in gaps.items() if left == kind]
            after[kind] = reduce(_common_prefix, rests) if rests else ""
        for kind in KINDS:
            rests = [
                gap.removeprefix(after[left])
                for (left, right), gap in gaps.items()
                if right == kind
            ]
            before[kind] = reduce(_common_suffix, rests) if rests else ""
        joints = tuple(
            Joint(left, right, gap)
            for (left, right), gap in sorted(gaps.items())
            if gap != after[left] + before[right]
        )
        shown = frozenset(left for left, _ in gaps)
        return cls(head, tail, before, after, joints, gaps["start", "text"], shown)

    def segment(self, kind: Literal["image", "video"]) -> str:
        """What one medium renders as; a newline after it where the template places none."""
        if kind not in self.kinds:
            return f"{MARKS[kind]}\n"
        return f"{self.before[kind]}{MARKS[kind]}{self.after[kind]}"


def _common_prefix(a: str, b: str) -> str:
    length = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return a[:length]


def _common_suffix(a: str, b: str) -> str:
    return _common_prefix(a[::-1], b[::-1])[::-1]
