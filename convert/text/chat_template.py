"""Chat template: compiled into plain segments, and checked against the template it came from.

``template_segments.py`` reads segments off; here they are compared with the template on many
conversations and at several times. A template that does something else than put segments around
texts shows there: its text and that of the segments differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llava_edge.convert.text.builtin_templates import builtin_format, detect_family
from llava_edge.convert.text.template_checks import Conversation, check_conversations
from llava_edge.convert.text.template_probes import Renderer, Style, find_style, other_form
from llava_edge.convert.text.template_sandbox import Rendering, TemplateLimits
from llava_edge.convert.text.template_segments import derive_format
from llava_edge.convert.util.text_files import read_object, read_text
from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.artifact.manifest import PromptFormat
from llava_edge.runtime.artifact.prompt_date import DATE_MARK, is_date_form
from llava_edge.runtime.processing.text.chat_prompt import MARKS, Piece, compose_turns, rendered

CLOCKS = tuple(
    datetime(*moment, tzinfo=UTC).timestamp()
    for moment in ((2024, 2, 29, 23, 59), (2025, 7, 4, 0, 5), (2033, 11, 30, 13, 30))
)
"""Times at which a template is rendered, seconds since 1970."""

_DATE = re.compile(re.escape(DATE_MARK).replace(re.escape("{}"), "(.*?)"))


def compile_chat_template(
    folder: Path,
    config: Mapping[str, Any],
    *,
    source_id: str = "",
    family: str | None = None,
    limits: TemplateLimits | None = None,
) -> PromptFormat:
    """Segments of the checkpoint's chat template, or of its family where it has none.

    Args:
        folder: the checkpoint.
        config: ``config.json`` in the words of Hugging Face.
        source_id: hub id or folder name, see ``detect_family``.
        family: overrides the detected one.
        limits: bounds of the process that renders the template.

    Raises:
        CheckpointError: the template is refused by its sandbox or limits, or is of another form
            than segments can express; names the conversation and what differs.
    """
    known = family or detect_family(config, source_id)
    video = config.get("model_type") == "llava_next_video"
    source = find_template(folder)
    if source is None:
        return builtin_format(known, video)
    tokens = special_tokens_map(folder, config)
    return compile_template(
        source, tokens, known, added_tokens=_added_tokens(folder), video=video, limits=limits
    )


def compile_template(
    template: str,
    variables: Mapping[str, str],
    family: str,
    *,
    added_tokens: Sequence[str] = (),
    video: bool = False,
    limits: TemplateLimits | None = None,
) -> PromptFormat:
    """Compile one template.

    Args:
        template: jinja2 source.
        variables: special tokens by name, as the reference hands them to the template.
        family: name for the result.
        added_tokens: contents of the tokenizer's added tokens.
        video: media items of kind video must work as well.
        limits: bounds of the process that renders the template.

    Raises:
        CheckpointError: as ``compile_chat_template``.
    """
    renderer = Renderer(template, dict(variables), limits)
    style = find_style(renderer)
    draft = derive_format(renderer, style, family)
    segments = _segments(draft)
    forms = tuple(sorted({form for text in segments for form in _DATE.findall(text)}))
    if unknown := [form for form in forms if not is_date_form(form)]:
        raise other_form("one user message", f"it writes dates in the forms {unknown}")
    draft = replace(draft, dates=forms)
    _check(renderer, style, draft, video)
    # White space is ordinary text even where a tokenizer has a token of its own for it.
    candidates = {t for t in (*variables.values(), *added_tokens) if t.strip()} - {*MARKS.values()}
    held = sorted(t for t in candidates if any(t in segment for segment in segments))
    return replace(draft, special_tokens=tuple(held))


def find_template(folder: Path) -> str | None:
    """Source of the chat template that the reference's processor would take.

    The order is that of transformers 5.23: ``processor_config.json``, ``chat_template.json``,
    ``chat_template.jinja``; then ``tokenizer_config.json``, whose list form names its templates.

    Raises:
        CheckpointError: a file cannot be read, or several templates have no default.
    """
    for name in ("processor_config.json", "chat_template.json"):
        found = _default(read_object(folder / name).get("chat_template"), name)
        if found is not None:
            return found
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return read_text(jinja)
    name = "tokenizer_config.json"
    return _default(read_object(folder / name).get("chat_template"), name)


def special_tokens_map(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name, as the reference hands them to the template."""
    settings = read_object(folder / "tokenizer_config.json")
    sources = [settings]
    if "added_tokens_decoder" not in settings:
        # Older checkpoints: the reference lets this file overrule the other one.
        sources.append(read_object(folder / "special_tokens_map.json"))
    found: dict[str, str] = {}
    if "LlamaTokenizer" in str(settings.get("tokenizer_class", "")) and config.get(
        "model_type"
    ) not in ("llava", "llava_next"):
        found = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for source in sources:
        for key, value in source.items():
            content = value.get("content") if isinstance(value, Mapping) else value
            if key.endswith("_token") and isinstance(content, str):
                found[key] = content
            elif key.endswith("_token") and value is None:
                found.pop(key, None)
    return found


def _check(renderer: Renderer, style: Style, draft: PromptFormat, video: bool) -> None:
    """Compare segments and template on every conversation of the check, at several times."""
    conversations = check_conversations(
        system=draft.system is not None, placed=style.placed, video=video
    )
    # The first conversation at every time; the others in turn, by a step prime to their order.
    checks = [(conversations[0], clock) for clock in CLOCKS]
    checks += [(c, CLOCKS[i // 2 % len(CLOCKS)]) for i, c in enumerate(conversations)]
    answers = renderer.render([style.request(c.messages, clock) for c, clock in checks])
    differing = [
        (conversation, fault)
        for (conversation, clock), answer in zip(checks, answers, strict=True)
        if (fault := _difference(draft, conversation, clock, answer)) is not None
    ]
    if not differing:
        return
    conversation, fault = differing[0]
    times = renderer.render([style.request(conversation.messages, clock) for clock in CLOCKS])
    if len({answer.text for answer in times}) > 1 and not draft.dates:
        fault += "; the template's text depends on the date in a way that is no plain date"
    count = f"{len(differing)} of {len(checks)} differ, the first: "
    raise other_form(count + conversation.name, fault)


def _difference(
    draft: PromptFormat, conversation: Conversation, clock: float, answer: Rendering
) -> str | None:
    turns = compose_turns(
        draft,
        conversation.messages,
        image_marks=False,
        now=datetime.fromtimestamp(clock, UTC),
    )
    ours = rendered(piece for _, pieces in turns for piece in pieces)
    if answer.text == ours:
        return None
    if answer.text is None:
        return f"the template refuses it with {answer.error}"
    at = next(
        (i for i, (a, b) in enumerate(zip(answer.text, ours, strict=False)) if a != b),
        min(len(answer.text), len(ours)),
    )
    start = max(0, at - 20)
    return (
        f"{_place(turns, at)} the template writes {answer.text[start : at + 40]!r} and the "
        f"compiled segments {ours[start : at + 40]!r} (from character {start})"
    )


def _place(turns: Sequence[tuple[str, Sequence[Piece]]], at: int) -> str:
    """Names the part of a prompt that a character belongs to."""
    done = 0
    for name, pieces in turns:
        for index, piece in enumerate(pieces):
            done += len(piece.text)
            if at >= done:
                continue
            if name not in ("system", "user", "assistant"):
                return f"in the {name}"
            if piece.kind != "template":
                return f"in the {piece.kind} of the {name}'s turn"
            kinds = [p.kind for p in pieces[:index] if p.kind != "template"][-1:]
            following = [p.kind for p in pieces[index:] if p.kind != "template"][:1]
            left = f"after the {kinds[0]}" if kinds else "at the beginning"
            right = f" and before the {following[0]}" if following else ""
            return f"{left}{right} of the {name}'s turn"
    return "at the end"


def _segments(draft: PromptFormat) -> list[str]:
    turns = [t for t in (draft.system, draft.user, draft.assistant) if t is not None]
    around = [text for turn in turns for text in (turn.before, turn.after)]
    around += [copy.before for turn in turns for copy in turn.copies]
    rest = [draft.prefix, draft.default_system, draft.user_after_system, draft.generation_prompt]
    # Tokens may span two segments that always meet.
    joints = [
        draft.user.after + draft.generation_prompt,
        draft.user.after + draft.assistant.before,
        draft.assistant.after + draft.user.before,
        *(joint.text for joint in draft.joints),
    ]
    return [*around, *rest, *joints, draft.text_before, draft.text_after, draft.image, draft.video]


def _default(value: object, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {v.get("name"): v.get("template") for v in value if isinstance(v, Mapping)}
    else:
        named = dict(value) if isinstance(value, Mapping) else {}
    chosen = named.get("default")
    if not isinstance(chosen, str):
        raise CheckpointError(
            f"{name} holds chat templates named {sorted(map(str, named))}; the one named "
            "'default' is compiled and there is none. Rename one."
        )
    return chosen


def _added_tokens(folder: Path) -> tuple[str, ...]:
    found: set[str] = set(read_object(folder / "added_tokens.json"))
    settings = read_object(folder / "tokenizer_config.json")
    listed = [*read_object(folder / "tokenizer.json").get("added_tokens", [])]
    decoder = settings.get("added_tokens_decoder")
    listed += decoder.values() if isinstance(decoder, Mapping) else []
    found |= {t["content"] for t in listed if isinstance(t, Mapping) and t.get("content")}
    return tuple(sorted(found))
