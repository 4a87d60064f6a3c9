"""What a chat template puts around texts and media, read off from what it renders.

Each probe is a conversation whose texts occur nowhere else, so that everything between them is the
template's. Probes differ from one another in one respect: another neighbour, another turn, a blank
at one end. Whether the result holds in general is not decided here; see ``chat_template.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from typing import Any, Literal

from llava_edge.convert.template_sandbox import (
    ChatRequest,
    Rendering,
    TemplateLimits,
    render_all,
)
from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.manifest import Copy, Cut, Joint, PartKind, PromptFormat, Space, Trim, Turn
from llava_edge.runtime.prompt import MARKS, Media, Message, Text, user_message

_FIRST, _SECOND = "Zq1ask", "Zq2ask"
_ANSWER, _SYSTEM, _REASON = "Zq3say", "Zq4rule", "Zq5why"
_KINDS: tuple[PartKind, ...] = ("image", "video", "text")
_PADS = ("\n", " ")
_SPLIT = re.compile(r"""split\(\s*(?:'([^'\n]{2,40})'|"([^"\n]{2,40})")""")
_MOST_CUTS = 4

Form = Literal["list", "string"]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Style:
    """How a template wants the content of a message: as a list of parts or as one string.

    ``placed`` is false where the template knows no media items, so that whoever writes the prompt
    writes ``<image>`` and a newline before the question, as the model's documentation does.
    """

    user: Form
    assistant: Form
    system: Form
    placed: bool = True

    def request(
        self, messages: Sequence[Message], clock: float | None, generation_prompt: bool = True
    ) -> ChatRequest:
        """Messages in the form that the template reads."""
        chat = []
        for message in messages:
            parts = message.parts
            if message.role == "user" and not self.placed:
                media = "".join(f"{MARKS[p.kind]}\n" for p in parts if isinstance(p, Media))
                text = "".join(p.text for p in parts if isinstance(p, Text))
                parts = (Text(media + text),)
            content: Any
            if getattr(self, message.role) == "string":
                content = "".join(p.text for p in parts if isinstance(p, Text))
            else:
                content = [
                    {"type": "text", "text": p.text} if isinstance(p, Text) else {"type": p.kind}
                    for p in parts
                ]
            chat.append({"role": message.role, "content": content})
        return ChatRequest(tuple(chat), generation_prompt, clock)


@dataclass(frozen=True)
class Renderer:
    """One template with its variables."""

    template: str
    variables: Mapping[str, str]
    limits: TemplateLimits | None

    def render(self, requests: Sequence[ChatRequest]) -> tuple[Rendering, ...]:
        """See ``render_all``."""
        return render_all(self.template, self.variables, requests, limits=self.limits)


def other_form(conversation: str, fault: str) -> CheckpointError:
    """The refusal of a template that segments cannot express."""
    return CheckpointError(
        "The checkpoint's chat template cannot be compiled into plain segments around each text. "
        f"Conversation: {conversation}. Difference: {fault}. Replace the template by a plain one, "
        "or remove it to use the built-in format of the model's family; raw prompts work as "
        "they are."
    )


def find_style(renderer: Renderer) -> Style:
    """How the template wants content.

    Lists are what the reference's processor is given; strings are taken only where lists raise an
    error or are printed as such.

    Raises:
        CheckpointError: no form shows every text once.
    """
    spoken = (user_message(_FIRST), _say("assistant", _ANSWER), user_message(_SECOND))
    pictured = (user_message(_FIRST, images=1),)
    ruled = (_say("system", _SYSTEM), user_message(_FIRST))
    styles = (
        Style("list", "list", "list"),
        Style("list", "string", "list"),
        Style("string", "string", "string"),
    )
    requests: list[ChatRequest] = []
    for style in styles:
        requests += [style.request(messages, None) for messages in (spoken, pictured, ruled)]
        requests.append(replace(style, system="string").request(ruled, None))
    answers = iter(renderer.render(requests))
    seen: list[str] = []
    for style in styles:
        said, image, *rules = (next(answers) for _ in range(4))
        if said.text is None:
            seen.append(f"{style.user} content: {said.error}")
        elif _prints_lists(said.text):
            seen.append(f"{style.user} content is printed as such: {said.text!r:.200}")
        elif not all(said.text.count(t) == 1 for t in (_FIRST, _ANSWER, _SECOND)):
            fault = "texts are missing or repeated in"
            seen.append(f"{style.user} content: {fault} {said.text!r:.200}")
            if any(t.casefold() in said.text.casefold() for t in (_FIRST, _ANSWER, _SECOND)):
                break
        else:
            shows = [
                rule.text is not None and _SYSTEM in rule.text and not _prints_lists(rule.text)
                for rule in rules
            ]
            return replace(
                style,
                system="string" if shows[1] and not shows[0] else style.system,
                placed=style.user == "list" and MARKS["image"] in (image.text or ""),
            )
    raise other_form("user, assistant, user has no usable text", "; ".join(seen))


def _prints_lists(text: str) -> bool:
    """Whether a list of parts was printed as such, which shows its keys."""
    return "'type'" in text or '"type"' in text


def derive_format(renderer: Renderer, style: Style, family: str) -> PromptFormat:
    """Segments of a template, dates as marks.

    Raises:
        CheckpointError: a plain conversation has no usable text.
    """
    seen = _Seen.of(renderer, style)
    tail, answer_before, between = seen.turns()
    end = _message_end(seen, tail, answer_before)
    generation_prompt = tail[len(end) :]
    body = _Body.of(seen.bodies, generation_prompt)
    head = body.head + body.lead_in
    after_answer = seen.run("answered", _ANSWER, -1)
    opening = _later_opening(between, after_answer, head)
    before = opening.removesuffix(body.lead_in)
    assistant = Turn(
        answer_before[len(end) :],
        between[: len(between) - len(opening)],
        seen.trim("answer", "turns", _ANSWER)[0],
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


def _message_end(seen: _Seen, tail: str, answer_before: str) -> str:
    """What follows a user's text before the next segment, whoever speaks next."""
    end = seen.run("ended", _FIRST, -1)
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
    seen: _Seen, body: _Body, before: str, after_answer: str
) -> tuple[Turn | None, str, str, Literal["first", "last"]]:
    """The system turn, what precedes it in every prompt, and how a user's turn opens after it."""
    bos = seen.renderer.variables.get("bos_token", "")
    bos = bos if body.head.startswith(bos) else ""
    ruled = seen.texts["rule"] or ""
    if _SYSTEM not in ruled:
        return None, bos, before, "first"
    runs = _cut(ruled, *[_SYSTEM] * ruled.count(_SYSTEM), _FIRST)
    if runs is None:
        raise other_form(
            "system, user", f"the system text stands after the question, or between: {ruled!r:.200}"
        )
    opening, *between, middle, _ = runs
    prefix = bos if opening.startswith(bos) else ""
    place: Literal["first", "last"] = "first"
    late = _cut(seen.texts["rule and turns"] or "", _FIRST, _ANSWER, _SYSTEM)
    if late is not None:
        place = "last"
        prefix = opening.removesuffix(late[2].removeprefix(after_answer))
    middle = middle.removesuffix(body.lead_in)
    after_system = before if middle.endswith(before) else ""
    trims = seen.trim("rule", "rule", _SYSTEM)
    copies = tuple(Copy(text, trim) for text, trim in zip(between, trims[1:], strict=True))
    after = middle[: len(middle) - len(after_system)]
    return Turn(opening[len(prefix) :], after, trims[0], copies), prefix, after_system, place


def _user_trims(
    seen: _Seen, *, has_system: bool
) -> tuple[Trim, Trim, tuple[Literal["system", "default"], ...]]:
    """Trim of each text, trim of the whole body, and what a body is joined to on its left."""
    outer = seen.trim("later", "turns", _SECOND)[0]
    part = Trim()
    if ("text", "text") in seen.bodies:
        part = Trim(
            left=seen.space("two", "left", "text text", _SECOND, 0),
            right=seen.space("two", "right", "text text", _FIRST, 0),
        )
    body = Trim(
        left="none" if part.left == outer.left else outer.left,
        right="none" if part.right == outer.right else outer.right,
    )
    joins: list[Literal["system", "default"]] = []
    if body.left != "none":
        if has_system and seen.space("ruled", "left", "rule", _FIRST, 0) == "none":
            joins.append("system")
        if seen.space("first", "left", "ask", _FIRST, 0) == "none":
            joins.append("default")
    return part, body, tuple(joins)


@dataclass(frozen=True)
class _Seen:
    """What a template made of the probes; None where it raised an error.

    Attributes:
        bodies: renderings of one user message by the kinds of its parts.
    """

    renderer: Renderer
    texts: Mapping[str, str | None]
    bodies: Mapping[tuple[PartKind, ...], str]
    cuts: tuple[str, ...]

    @classmethod
    def of(cls, renderer: Renderer, style: Style) -> _Seen:
        found = [a or b for a, b in _SPLIT.findall(renderer.template)]
        cuts = tuple(dict.fromkeys(["</think>", *found]))[:_MOST_CUTS]
        shapes: list[tuple[PartKind, ...]] = [("text",)]
        if style.placed:
            pairs = [*product(_KINDS, repeat=1), *product(_KINDS, repeat=2)]
            shapes = [("text",), *(pair for pair in pairs if pair != ("text",))]
        probes = {**_probes(cuts), **{" ".join(s): (_body_message(s),) for s in shapes}}
        # Without an opened answer at the end.
        open_end = {"ended": probes["ask"], "answered": probes["turns"][:2]}
        requests = [style.request(messages, None) for messages in probes.values()]
        requests += [style.request(messages, None, False) for messages in open_end.values()]
        answers = renderer.render(requests)
        texts = {
            name: answer.text for name, answer in zip([*probes, *open_end], answers, strict=True)
        }
        asked = texts["ask"]
        if asked is None or asked.count(_FIRST) != 1:
            raise other_form("one user message", f"{answers[0].error or asked!r:.200}")
        bodies = {s: text for s in shapes if (text := texts[" ".join(s)]) is not None}
        return cls(renderer, texts, bodies, cuts)

    def run(self, name: str, core: str, index: int) -> str | None:
        """What stands before (0) or after (-1) a text that is there once."""
        runs = _cut(self.texts[name] or "", core)
        return None if runs is None else runs[index]

    def turns(self) -> tuple[str, str, str]:
        """What follows a last question, a question before an answer, and an answer."""
        head = self.run("ask", _FIRST, 0)
        tail = self.run("ask", _FIRST, -1)
        runs = _cut(self.texts["turns"] or "", _FIRST, _ANSWER, _SECOND)
        if runs is None:
            raise other_form("user, assistant, user", "a text is missing or out of order")
        if (runs[0], runs[3]) != (head, tail):
            raise other_form(
                "user, assistant, user",
                f"it opens {runs[0]!r}, one question alone {head!r}; it ends {runs[3]!r}, one "
                f"question alone {tail!r}",
            )
        return runs[3], runs[1], runs[2]

    def trim(self, name: str, plain: str, core: str) -> list[Trim]:
        """Trim of each occurrence of a text."""
        count = (self.texts[plain] or "").count(core)
        return [
            Trim(
                self.space(name, "left", plain, core, index),
                self.space(name, "right", plain, core, index),
            )
            for index in range(count)
        ]

    def space(
        self, name: str, side: Literal["left", "right"], plain: str, core: str, index: int
    ) -> Space:
        """Which white space is removed at one side of an occurrence of a text."""
        whole = self.texts[plain] or ""
        base = whole.split(core)
        removed = []
        for pad in _PADS:
            runs = (self.texts[f"{name} {side} {pad!r}"] or "").split(core)
            at = index if side == "left" else index + 1
            removed.append(len(runs) == len(base) and runs[at] == base[at])
        both: dict[tuple[bool, ...], Space] = {
            (True, True): "any",
            (True, False): "newline",
            (False, True): "blank",
        }
        return both.get(tuple(removed), "none")

    def cut(self) -> Cut | None:
        """The mark up to which an earlier answer is left out."""
        for mark in self.cuts:
            whole = self.texts[f"cut {mark}"] or ""
            if whole == self.texts["turns"]:
                last = self.texts[f"cut {mark} twice"] == whole
                spaces = [self.texts[f"cut {mark} {pad!r}"] == whole for pad in _PADS]
                trim: Space = "none"
                if spaces[0]:
                    trim = "any" if spaces[1] else "newline"
                elif spaces[1]:
                    trim = "blank"
                return Cut(mark, trim, "last" if last else "first")
        return None

    def part_order(self) -> tuple[tuple[PartKind, ...], ...]:
        """Groups of kinds by which the template sorts the parts of a message."""
        usual: list[tuple[int, ...]] = [(0, 1, 2), (0, 0, 0)]
        ranks = [*usual, *(r for r in product(range(3), repeat=3) if r not in usual)]
        for ranking in ranks:
            place: dict[str, int] = dict(zip(_KINDS, ranking, strict=True))
            if all(
                _places(text, sorted(kinds, key=place.__getitem__)) is not None
                for kinds, text in self.bodies.items()
                if len(set(kinds)) == 2 and _any_places(text, kinds) is not None
            ):
                groups = ([k for k in _KINDS if place[k] == rank] for rank in range(3))
                return tuple(tuple(group) for group in groups if group)
        return (("image",), ("video",), ("text",))


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
            found = _any_places(text, kinds)
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
        after = {kind: "" for kind in ("start", *_KINDS)}
        before = {kind: "" for kind in (*_KINDS, "end")}
        for kind in _KINDS:
            rests = [gap for (left, _), gap in gaps.items() if left == kind]
            after[kind] = reduce(_common_prefix, rests) if rests else ""
        for kind in _KINDS:
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


def _body_message(kinds: Sequence[PartKind]) -> Message:
    texts = iter((_FIRST, _SECOND))
    return Message("user", tuple(Text(next(texts)) if k == "text" else Media(k) for k in kinds))


def _probes(cuts: Sequence[str]) -> dict[str, tuple[Message, ...]]:
    ask, ask_again = user_message(_FIRST), user_message(_SECOND)
    say, rule = _say("assistant", _ANSWER), _say("system", _SYSTEM)
    probes: dict[str, tuple[Message, ...]] = {
        "ask": (ask,),
        "turns": (ask, say, ask_again),
        "rule": (rule, ask),
        "rule and turns": (rule, ask, say, ask_again),
    }
    for pad in _PADS:
        for side in ("left", "right"):

            def padded(text: str, pad: str = pad, side: str = side) -> str:
                return pad + text if side == "left" else text + pad

            name = f"{side} {pad!r}"
            first = user_message(padded(_FIRST))
            two = (_FIRST, padded(_SECOND)) if side == "left" else (padded(_FIRST), _SECOND)
            probes |= {
                f"first {name}": (first,),
                f"later {name}": (ask, say, user_message(padded(_SECOND))),
                f"ruled {name}": (rule, first),
                f"answer {name}": (ask, _say("assistant", padded(_ANSWER)), ask_again),
                f"rule {name}": (_say("system", padded(_SYSTEM)), ask),
                f"two {name}": (Message("user", tuple(map(Text, two))),),
            }
    for mark in cuts:
        for pad in ("", *_PADS):
            text = f"{_REASON}{mark}{pad}{_ANSWER}"
            name = f"cut {mark} {pad!r}" if pad else f"cut {mark}"
            probes[name] = (ask, _say("assistant", text), ask_again)
        twice = _say("assistant", f"{_REASON}{mark}{_REASON}{mark}{_ANSWER}")
        probes[f"cut {mark} twice"] = (ask, twice, ask_again)
    return probes


def _say(role: Role, text: str) -> Message:
    return Message(role, (Text(text),))


def _cores(kinds: Sequence[str]) -> list[str]:
    texts = iter((_FIRST, _SECOND))
    return [next(texts) if kind == "text" else f"<{kind}>" for kind in kinds]


def _places(text: str, kinds: Sequence[str]) -> tuple[str, ...] | None:
    """Runs around the parts of a body in this order, if each is there once and in order."""
    return _cut(text, *_cores(kinds))


def _any_places(
    text: str, kinds: Sequence[PartKind]
) -> tuple[Sequence[PartKind], tuple[str, ...]] | None:
    for order in (kinds, kinds[::-1]):
        runs = _places(text, order)
        if runs is not None:
            return order, runs
    return None


def _cut(text: str, *cores: str) -> tuple[str, ...] | None:
    """Runs before, between and after cores, if those are there in order and no more of them."""
    if any(text.count(core) != cores.count(core) for core in cores):
        return None
    runs = []
    for core in cores:
        before, found, text = text.partition(core)
        if not found:
            return None
        runs.append(before)
    return (*runs, text)


def _common_prefix(a: str, b: str) -> str:
    length = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return a[:length]


def _common_suffix(a: str, b: str) -> str:
    return _common_prefix(a[::-1], b[::-1])[::-1]
