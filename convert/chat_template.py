"""Chat template: compiled into plain segments, and checked against the template it came from.

The template is rendered on conversations whose texts can be told from everything else; what stands
between them are the segments. A template that does something else than put segments around texts
shows in the check: its text and that of the segments differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llava_edge.convert.prompt_family import builtin_format, detect_family
from llava_edge.convert.template_checks import Conversation, check_conversations
from llava_edge.convert.template_process import (
    ChatRequest,
    Rendering,
    TemplateLimits,
    render_all,
)
from llava_edge.convert.text_files import read_object, read_text
from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.manifest import PromptFormat, Turn
from llava_edge.runtime.prompt import (
    MARKS,
    Kind,
    Media,
    Message,
    Text,
    compose,
    rendered,
    user_message,
)

_LATER = 86_400.0 * 400 + 40_000.0
_FIRST, _SECOND = "Zq1ask", "Zq2ask"
_ANSWER, _SYSTEM = "Zq3say", "Zq4rule"

Form = Literal["list", "string"]


@dataclass(frozen=True)
class _Style:
    """How a template wants the content of a message: as a list of parts or as one string.

    ``placed`` is false where the template knows no media items, so that whoever writes the prompt
    writes ``<image>`` and a newline before the question, as the model's documentation does.
    """

    user: Form
    others: Form
    placed: bool = True


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
    renderer = _Renderer(template, dict(variables), limits)
    style, reads_strings = _find_style(renderer)
    draft = _derive(renderer, style, family)
    _check(renderer, style, draft, video, reads_strings and style.user == "list")
    segments = _segments(draft)
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


@dataclass(frozen=True)
class _Renderer:
    """One template with its variables."""

    template: str
    variables: dict[str, str]
    limits: TemplateLimits | None

    def render(self, requests: Sequence[ChatRequest]) -> tuple[Rendering, ...]:
        return render_all(self.template, self.variables, requests, limits=self.limits)


def _request(style: _Style, messages: Sequence[Message]) -> ChatRequest:
    """Messages in the form that chat templates read."""
    chat = []
    for message in messages:
        parts = message.parts
        if message.role == "user" and not style.placed:
            media = "".join(f"{MARKS[p.kind]}\n" for p in parts if isinstance(p, Media))
            text = "".join(p.text for p in parts if isinstance(p, Text))
            parts = (Text(media + text),)
        form = style.user if message.role == "user" else style.others
        content: Any
        if form == "string":
            content = "".join(p.text for p in parts if isinstance(p, Text))
        else:
            content = [
                {"type": "text", "text": p.text} if isinstance(p, Text) else {"type": p.kind}
                for p in parts
            ]
        chat.append({"role": message.role, "content": content})
    return ChatRequest(tuple(chat))


def _say(role: Literal["system", "assistant"], text: str) -> Message:
    return Message(role, (Text(text),))


def _find_style(renderer: _Renderer) -> tuple[_Style, bool]:
    """How the template wants content, and whether it shows plain strings.

    Lists are what the reference's processor is given; strings are taken only where lists raise an
    error or are printed as such.
    """
    spoken = (user_message(_FIRST), _say("assistant", _ANSWER), user_message(_SECOND))
    styles = (
        _Style("list", "list"),
        _Style("list", "string"),
        _Style("string", "string", placed=False),
    )
    pictured = (user_message(_FIRST, images=1),)
    *answers, with_list, with_string = renderer.render(
        [*(_request(s, spoken) for s in styles), *(_request(s, pictured) for s in styles[:2])]
    )
    shows = [
        answer.text is not None and all(t in answer.text for t in (_FIRST, _ANSWER, _SECOND))
        for answer in answers
    ]
    seen: list[str] = []
    for style, answer, image in zip(
        styles, answers, (with_list, with_string, Rendering(None)), strict=True
    ):
        if answer.text is None:
            seen.append(f"{style.user} content: {answer.error}")
            continue
        # A list printed as such shows its keys.
        if "'type'" in answer.text:
            seen.append(f"{style.user} content is printed as such: {answer.text!r:.200}")
            continue
        if not all(answer.text.count(t) == 1 for t in (_FIRST, _ANSWER, _SECOND)):
            seen.append(f"texts are missing or repeated in {answer.text!r:.200}")
            break
        placed = image.text is not None and MARKS["image"] in image.text
        return replace(style, placed=placed), shows[-1]
    raise _other_form("user, assistant, user has no usable text", "; ".join(seen))


def _derive(renderer: _Renderer, style: _Style, family: str) -> PromptFormat:
    ask, ask_again = user_message(_FIRST), user_message(_SECOND)
    say, rule = _say("assistant", _ANSWER), _say("system", _SYSTEM)
    spaced = f"  {_FIRST} \n"
    both = Message("user", (Text(_FIRST), Text(_SECOND)))
    late_image = Message("user", (Text(_FIRST), Media("image")))
    conversations: dict[str, tuple[Message, ...]] = {
        "ask": (ask,),
        "turns": (ask, say, ask_again),
        "rule": (rule, ask),
        "image": (user_message(_FIRST, images=1),),
        "late": (late_image,),
        "video": (user_message(_FIRST, videos=1),),
        "only": (user_message("", images=1),),
        "both": (both,),
        "spaced": (user_message(spaced),),
        "spaced answer": (ask, _say("assistant", f"  {_ANSWER} \n"), ask_again),
        "spaced rule": (_say("system", f"  {_SYSTEM} \n"), ask),
    }
    requests = [_request(style, c) for c in conversations.values()]
    open_end = [
        replace(_request(style, c), add_generation_prompt=False) for c in ((ask,), (ask, say))
    ]
    later = replace(_request(style, (ask,)), clock=_LATER)
    answers = renderer.render([*requests, *open_end, later])
    texts = {name: answer.text for name, answer in zip(conversations, answers, strict=False)}
    ended, answered, dated = (answer.text for answer in answers[-3:])
    asked = texts["ask"]
    if asked is None or asked.count(_FIRST) != 1:
        raise _other_form("one user message", f"{answers[0].error or asked!r:.200}")
    if asked != dated:
        raise _other_form("one user message", "the text holds the date, which segments cannot")
    head, tail = asked.split(_FIRST)
    start, answer_before, between, last = _cut(texts["turns"] or "", _FIRST, _ANSWER, _SECOND)
    if start != head or last != tail:
        raise _other_form(
            "user, assistant, user",
            f"it opens {start!r} alone {head!r}; ends {last!r}, alone {tail!r}",
        )

    # What follows a user's text before the next segment, whoever speaks next.
    end = ended.split(_FIRST)[-1] if ended is not None else None
    if end is None or not (tail.startswith(end) and answer_before.startswith(end)):
        end = _common_prefix(tail, answer_before)
    after_answer = answered.split(_ANSWER)[-1] if answered is not None else ""
    opening = between[len(after_answer) :]
    if not (between.startswith(after_answer) and opening and head.endswith(opening)):
        opening = _common_suffix(between, head)
    lead = head[: len(head) - len(opening)]
    bos = renderer.variables.get("bos_token", "")
    system, prefix, after_system = None, "", opening
    ruled = texts["rule"]
    if ruled is not None and ruled.count(_SYSTEM) == 1 and ruled.count(_FIRST) == 1:
        before, middle, _ = _cut(ruled, _SYSTEM, _FIRST)
        prefix = bos if before.startswith(bos) and lead.startswith(bos) else ""
        if not middle.endswith(opening):
            after_system = ""
        system = Turn(before[len(prefix) :], middle[: len(middle) - len(after_system)])
    elif lead.startswith(bos):
        prefix = bos
    text_after, image, video, media_first = "", "<image>\n", "<video>\n", True
    if style.placed:
        image = _mark_segment("image", texts["image"], head)
        if texts["video"] is not None and MARKS["video"] in texts["video"]:
            video = _mark_segment("video", texts["video"], head)
        media_first = texts["late"] == texts["image"]
        # An image alone has no text, so what text brings with it is missing there.
        bare = (texts["only"] or "").removeprefix(head + image)
        if texts["only"] is not None and bare and tail.endswith(bare):
            text_after = tail[: len(tail) - len(bare)]
    if not end.startswith(text_after):
        text_after = ""
    separator = text_after
    if texts["both"] is not None and style.placed:
        separator = _cut(texts["both"], _FIRST, _SECOND)[1]
    plain = {"user": "ask", "assistant": "turns", "system": "rule"}
    spaced_names = {"user": "spaced", "assistant": "spaced answer", "system": "spaced rule"}
    return PromptFormat(
        source="template",
        family=family,
        prefix=prefix,
        default_system=lead[len(prefix) :],
        system=system,
        user=Turn(opening, end[len(text_after) :]),
        user_after_system=after_system,
        assistant=Turn(answer_before[len(end) :], between[: len(between) - len(opening)]),
        generation_prompt=tail[len(end) :],
        text_separator=separator,
        text_after=text_after,
        image=image,
        video=video,
        media_first=media_first,
        stripped_roles=tuple(
            role
            for role, name in plain.items()
            if texts[name] is not None and texts[name] == texts[spaced_names[role]]
        ),
        special_tokens=(),
    )


def _cut(text: str, *marks: str) -> tuple[str, ...]:
    """Runs before, between and behind marks, each of which stands once and in order."""
    runs = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise _other_form("texts of a conversation", f"{mark!r} is missing or out of order")
        runs.append(before)
    return (*runs, text)


def _mark_segment(kind: Kind, text: str | None, head: str) -> str:
    segment = (text or "").split(_FIRST)[0].removeprefix(head)
    if segment.count(MARKS[kind]) == 1:
        return segment
    # The medium stands behind the text, or not at all; the check says what is wrong, if anything.
    return f"{MARKS[kind]}\n"


def _common_prefix(a: str, b: str) -> str:
    length = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return a[:length]


def _common_suffix(a: str, b: str) -> str:
    return _common_prefix(a[::-1], b[::-1])[::-1]


def _check(
    renderer: _Renderer, style: _Style, draft: PromptFormat, video: bool, strings: bool
) -> None:
    """Compare segments and template on every conversation of the check.

    Many templates of vision models read lists only: they drop a string's text or refuse it. That
    is no fault of the segments. A template that does show strings must show them the same way.
    """
    conversations = check_conversations(
        system=draft.system is not None, placed=style.placed, video=video
    )
    checks = [(c, _request(style, c.messages)) for c in conversations]
    if strings:
        plain = [replace(c, name=f"{c.name}, as strings") for c in conversations if c.is_plain]
        checks += [(c, _request(_Style("string", "string"), c.messages)) for c in plain]
    answers = renderer.render([request for _, request in checks])
    differing = [
        (conversation, fault)
        for (conversation, _), answer in zip(checks, answers, strict=True)
        if (fault := _difference(draft, conversation, answer)) is not None
    ]
    if differing:
        conversation, fault = differing[0]
        count = f"{len(differing)} of {len(checks)} differ, the first: "
        raise _other_form(count + conversation.name, fault)


def _difference(draft: PromptFormat, conversation: Conversation, answer: Rendering) -> str | None:
    ours = rendered(compose(draft, conversation.messages, image_marks=False))
    if answer.text == ours:
        return None
    if answer.text is None:
        return f"the template refuses it with {answer.error}"
    at = len(_common_prefix(answer.text, ours))
    start = max(0, at - 20)
    return (
        f"at character {at} the template has {answer.text[start : at + 40]!r} and the compiled "
        f"segments have {ours[start : at + 40]!r}"
    )


def _segments(draft: PromptFormat) -> list[str]:
    turns = [t for t in (draft.system, draft.user, draft.assistant) if t is not None]
    around = [text for turn in turns for text in (turn.before, turn.after)]
    rest = [draft.prefix, draft.default_system, draft.user_after_system, draft.generation_prompt]
    # Tokens may span two segments that always meet.
    joints = [
        draft.user.after + draft.generation_prompt,
        draft.user.after + draft.assistant.before,
        draft.assistant.after + draft.user.before,
    ]
    return [*around, *rest, *joints, draft.text_after, draft.text_separator]


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


def _other_form(conversation: str, fault: str) -> CheckpointError:
    return CheckpointError(
        "The checkpoint's chat template cannot be compiled into plain segments around each text. "
        f"Conversation: {conversation}. Difference: {fault}. Replace the template by a plain one, "
        "or remove it to use the built-in format of the model's family; raw prompts work as "
        "they are."
    )
