"""Probes: what a chat template makes of conversations whose texts can be told from all else.

Each text of a probe occurs nowhere else, so that everything between is the template's. Probes
differ from one another in one respect: another neighbour, another turn, a blank at one end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from llava_edge.convert.text.template_sandbox import (
    ChatRequest,
    Rendering,
    TemplateLimits,
    render_all,
)
from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.artifact.manifest import Cut, PartKind, Space, Trim
from llava_edge.runtime.processing.text.chat_prompt import MARKS, Media, Message, Text, user_message

FIRST, SECOND = "Zq1ask", "Zq2ask"
ANSWER, SYSTEM, _REASON = "Zq3say", "Zq4rule", "Zq5why"
KINDS: tuple[PartKind, ...] = ("image", "video", "text")
_PADS = ("\n", " ")
_SPLIT = re.compile(r"""split\(\s*(?:'([^'\n]{2,40})'|"([^"\n]{2,40})")""")
_MOST_CUTS = 4

Form = Literal["list", "string"]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Style:
    """How a template wants the content of a message: as a list of parts or as one string.

    ``placed`` is false where the template knows no media items, so that the author of the prompt
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
    spoken = (user_message(FIRST), _say("assistant", ANSWER), user_message(SECOND))
    pictured = (user_message(FIRST, images=1),)
    ruled = (_say("system", SYSTEM), user_message(FIRST))
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
        elif not all(said.text.count(t) == 1 for t in (FIRST, ANSWER, SECOND)):
            fault = "texts are missing or repeated in"
            seen.append(f"{style.user} content: {fault} {said.text!r:.200}")
            if any(t.casefold() in said.text.casefold() for t in (FIRST, ANSWER, SECOND)):
                break
        else:
            shows = [
                rule.text is not None and SYSTEM in rule.text and not _prints_lists(rule.text)
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


@dataclass(frozen=True)
class Seen:
    """What a template made of the probes; None where it raised an error.

    Attributes:
        bodies: renderings of one user message by the kinds of its parts.
    """

    renderer: Renderer
    texts: Mapping[str, str | None]
    bodies: Mapping[tuple[PartKind, ...], str]
    cuts: tuple[str, ...]

    @classmethod
    def of(cls, renderer: Renderer, style: Style) -> Seen:
        """Render every probe.

        Raises:
            CheckpointError: one question has no usable text, or the template leaves its bounds.
        """
        found = [a or b for a, b in _SPLIT.findall(renderer.template)]
        cuts = tuple(dict.fromkeys(["</think>", *found]))[:_MOST_CUTS]
        shapes: list[tuple[PartKind, ...]] = [("text",)]
        if style.placed:
            pairs = [*product(KINDS, repeat=1), *product(KINDS, repeat=2)]
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
        if asked is None or asked.count(FIRST) != 1:
            raise other_form("one user message", f"{answers[0].error or asked!r:.200}")
        bodies = {s: text for s in shapes if (text := texts[" ".join(s)]) is not None}
        return cls(renderer, texts, bodies, cuts)

    def run(self, name: str, core: str, index: int) -> str | None:
        """What stands before (0) or after (-1) a text that is there once."""
        runs = cut_at(self.texts[name] or "", core)
        return None if runs is None else runs[index]

    def turns(self) -> tuple[str, str, str]:
        """What follows a last question, a question before an answer, and an answer."""
        head = self.run("ask", FIRST, 0)
        tail = self.run("ask", FIRST, -1)
        runs = cut_at(self.texts["turns"] or "", FIRST, ANSWER, SECOND)
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
            place: dict[str, int] = dict(zip(KINDS, ranking, strict=True))
            if all(
                _places(text, sorted(kinds, key=place.__getitem__)) is not None
                for kinds, text in self.bodies.items()
                if len(set(kinds)) == 2 and any_places(text, kinds) is not None
            ):
                groups = ([k for k in KINDS if place[k] == rank] for rank in range(3))
                return tuple(tuple(group) for group in groups if group)
        return (("image",), ("video",), ("text",))


def _body_message(kinds: Sequence[PartKind]) -> Message:
    texts = iter((FIRST, SECOND))
    return Message("user", tuple(Text(next(texts)) if k == "text" else Media(k) for k in kinds))


def _probes(cuts: Sequence[str]) -> dict[str, tuple[Message, ...]]:
    ask, ask_again = user_message(FIRST), user_message(SECOND)
    say, rule = _say("assistant", ANSWER), _say("system", SYSTEM)
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
            first = user_message(padded(FIRST))
            two = (FIRST, padded(SECOND)) if side == "left" else (padded(FIRST), SECOND)
            probes |= {
                f"first {name}": (first,),
                f"later {name}": (ask, say, user_message(padded(SECOND))),
                f"ruled {name}": (rule, first),
                f"answer {name}": (ask, _say("assistant", padded(ANSWER)), ask_again),
                f"rule {name}": (_say("system", padded(SYSTEM)), ask),
                f"two {name}": (Message("user", tuple(map(Text, two))),),
            }
    for mark in cuts:
        for pad in ("", *_PADS):
            text = f"{_REASON}{mark}{pad}{ANSWER}"
            name = f"cut {mark} {pad!r}" if pad else f"cut {mark}"
            probes[name] = (ask, _say("assistant", text), ask_again)
        twice = _say("assistant", f"{_REASON}{mark}{_REASON}{mark}{ANSWER}")
        probes[f"cut {mark} twice"] = (ask, twice, ask_again)
    return probes


def _say(role: Role, text: str) -> Message:
    return Message(role, (Text(text),))


def _cores(kinds: Sequence[str]) -> list[str]:
    texts = iter((FIRST, SECOND))
    return [next(texts) if kind == "text" else f"<{kind}>" for kind in kinds]


def _places(text: str, kinds: Sequence[str]) -> tuple[str, ...] | None:
    """Runs around the parts of a body in this order, if each is there once and in order."""
    return cut_at(text, *_cores(kinds))


def any_places(
    text: str, kinds: Sequence[PartKind]
) -> tuple[Sequence[PartKind], tuple[str, ...]] | None:
    """The order in which two parts stand in a text, and the runs around them."""
    for order in (kinds, kinds[::-1]):
        runs = _places(text, order)
        if runs is not None:
            return order, runs
    return None


def cut_at(text: str, *cores: str) -> tuple[str, ...] | None:
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
