"""Stage ``prompt``: prompt strings, token ids and stop ids are the reference's, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.text.builtin_templates import detect_family, stop_tokens
from llava_edge.convert.text.chat_template import compile_chat_template
from llava_edge.convert.text.template_checks import check_conversations
from llava_edge.convert.verification.reference.processor import ReferenceProcessor
from llava_edge.convert.verification.tokenizer.artifact import artifact_tokenizer
from llava_edge.profiles.errors import PromptError
from llava_edge.runtime.artifact.certificate import StageResult, exact
from llava_edge.runtime.artifact.manifest import Manifest, PromptFormat
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.artifact.prompt_date import COMPARED_NOW
from llava_edge.runtime.processing.text.chat_prompt import (
    MARKS,
    Message,
    Piece,
    Text,
    compose,
    raw_pieces,
    rendered,
    user_message,
)
from llava_edge.runtime.processing.text.tokenizer import Tokenizer

_RULE = "Answer in one word."
_MOST_STOPS = 6
_UNKNOWN_CHARACTER = "\U0010fffd"
_RAW = (
    "<image>\nWhat is shown in this image?",
    "A chat. USER: <image>\nWhat is the total? ASSISTANT:",
    "<image><image>\nWhich of the two is larger?",
    "Grüße, 日本語, 12.5 % of 7,000 \u2013 and  two blanks",
)
_RAW_VIDEO = (
    "USER: <video>\nWhy is this video funny? ASSISTANT:",
    "<image> first, then <video>: what is in both?",
)


def prompt_stage(
    artifact: Artifact, checkpoint: Checkpoint, reference: ReferenceProcessor
) -> StageResult:
    """Compare conversations, finished prompts and stop ids.

    Texts that hold control tokens are left out on purpose: in an artifact a person's text never
    becomes one, which is where it leaves the reference.
    """
    manifest = artifact.manifest
    tokenizer = artifact_tokenizer(artifact)
    faults: list[str] = []
    count = 0
    left_out = manifest.conversion.get("template_left_out", manifest.prompt is None)
    if not left_out:
        faults += _format_faults(manifest, checkpoint)
    if not _bos_fits(artifact, reference):
        faults.append(
            f"bos is {manifest.tokens.bos}; the checkpoint's tokenizer has {reference.bos_id}"
        )
    if manifest.prompt is not None and reference.has_template:
        looked_at, differing = _template_faults(
            manifest.prompt, checkpoint.dims.takes_video, reference, tokenizer
        )
        count += looked_at
        faults += differing
    for prompt in (*_RAW, *(_RAW_VIDEO if checkpoint.dims.takes_video else ())):
        count += 1
        pieces = raw_pieces(
            prompt, images=prompt.count(MARKS["image"]), videos=prompt.count(MARKS["video"])
        )
        if tokenizer.encode_pieces(pieces) != reference.ids(prompt):
            faults.append(f"the finished prompt {prompt!r:.60} has other ids")
    faults += _control_faults(tokenizer, reference)
    faults += _stop_faults(artifact, checkpoint, reference, tokenizer)
    looked = f"{count} prompts, stop ids {list(manifest.tokens.stop)}"
    looked += f"; reference of the ids: {reference.tokenizer.name}"
    if left_out:
        looked += "; the chat template was left out"
    elif not reference.has_template:
        looked += "; the checkpoint has no template, so the string is that of its family"
    return exact("prompt", "differing_prompts", faults, looked)


def _format_faults(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[str]:
    """Whether the prompt format writes what the checkpoint's template compiles to.

    An older tool may have drawn the lines between segments elsewhere, which is no fault.
    """
    prompt = manifest.prompt
    compiled = compile_chat_template(
        checkpoint.folder, checkpoint.config, source_id=checkpoint.source_id
    )
    if prompt == compiled:
        return
    wrong = "the prompt format is not what the checkpoint's template compiles to"
    if prompt is None or (prompt.system is None) != (compiled.system is None):
        yield wrong
        return
    # What no rendered prompt shows; an older tool may have kept other tokens.
    labels = ["source", "special_tokens", "dates"] * (manifest.schema_version > 3)
    # A hub's name may say of which family a model is.
    labels += ["family"] * (checkpoint.source_id == manifest.source.id)
    for name in labels:
        have, want = getattr(prompt, name), getattr(compiled, name)
        if have != want:
            yield f"prompt.{name}: it is {have!r:.80}; the template gives {want!r:.80}"
    for conversation in check_conversations(
        system=prompt.system is not None, placed=False, video=checkpoint.dims.takes_video
    ):
        ours, theirs = (
            rendered(compose(each, conversation.messages, image_marks=False, now=COMPARED_NOW))
            for each in (prompt, compiled)
        )
        if ours != theirs:
            yield f"{wrong}; {conversation.name}: {_apart(ours, theirs)}"
            return


def _template_faults(
    prompt: PromptFormat, has_video: bool, reference: ReferenceProcessor, tokenizer: Tokenizer
) -> tuple[int, list[str]]:
    """Conversations through the checkpoint's template and through ours; how many, and faults."""
    marks = reference.control_tokens
    rule = (Message("system", (Text(_RULE),)), user_message("what is this?"))
    chosen = [
        conversation
        for conversation in check_conversations(
            system=prompt.system is not None, placed=False, video=has_video
        )
        if not any(mark in text for mark in marks for text in _texts(conversation.messages))
    ]
    # The template decides whether there are system turns, not the manifest.
    now = current_time()
    times = [now if index % 2 else COMPARED_NOW for index in range(len(chosen))]
    asked = [(c.messages, time) for c, time in zip(chosen, times, strict=True)]
    ruled, *answers = reference.render_all([(rule, COMPARED_NOW), *asked])
    takes_system = ruled.text is not None and _RULE in ruled.text
    faults = []
    if (prompt.system is not None) != takes_system:
        faults.append("system turns: the template and the prompt format do not agree on them")
    for conversation, time, answer in zip(chosen, times, answers, strict=True):
        if answer.text is None:
            if conversation.messages[0].role != "system" or takes_system:
                faults.append(f"{conversation.name}: the template refuses it: {answer.error}")
            continue
        pieces = compose(prompt, conversation.messages, now=time)
        ours = rendered(pieces)
        if ours != answer.text:
            faults.append(f"{conversation.name}: {_apart(ours, answer.text)}")
        elif (ids := tokenizer.encode_pieces(pieces)) != (wanted := reference.ids(answer.text)):
            faults.append(f"{conversation.name}: ids are {ids[:12]}, the reference's {wanted[:12]}")
    return len(chosen), faults


def current_time() -> datetime:
    """What half of the conversations take for now; the other half is at ``COMPARED_NOW``."""
    return datetime.now(UTC)


def _bos_fits(artifact: Artifact, reference: ReferenceProcessor) -> bool:
    """Whether the manifest's bos is the one that the checkpoint's tokenizer names, if it does."""
    return reference.bos_id is None or artifact.manifest.tokens.bos == reference.bos_id


def _texts(messages: Iterable[Message]) -> Iterator[str]:
    for message in messages:
        yield from (part.text for part in message.parts if isinstance(part, Text))


def _apart(ours: str, theirs: str) -> str:
    place = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    start = max(0, place - 12)
    return (
        f"the prompt reads {ours[start : place + 24]!r}, the reference's "
        f"{theirs[start : place + 24]!r} from character {start}"
    )


def _control_faults(tokenizer: Tokenizer, reference: ReferenceProcessor) -> Iterator[str]:
    """Whether a person's text that names control tokens becomes one; it never may.

    All of them stand in one text, since text with control tokens takes long to encode; the stop
    tokens stand alone as well, so that a refusal of the others hides nothing.
    """
    backend = tokenizer.backend
    named = {token: backend.token_to_id(token) for token in sorted(reference.control_tokens)}
    # Added words are not among them: people may write those.
    control = {token: i for token, i in named.items() if i in tokenizer.control_ids}
    alone = [token for token, i in control.items() if i in tokenizer.stop_ids][:_MOST_STOPS]
    for text in (" ".join(control), "".join(control), *alone, *(f"a{each}b" for each in alone)):
        if not text:
            continue
        try:
            ids = tokenizer.encode_pieces((Piece("text", text),))
        except PromptError:
            # A refusal lets nothing through either.
            continue
        # The first may be the bos that every prompt has.
        ids = ids[int(ids[:1] == [tokenizer.bos_id]) :]
        found = [token for token, i in control.items() if i in ids]
        if found:
            # A character that no piece spells is <unk> in any text.
            unknown = _unknown(tokenizer, reference, text)
            found = [token for token in found if control[token] not in unknown]
        if found:
            yield f"{', '.join(found)[:80]} in a person's text become control tokens"
            return


def _unknown(tokenizer: Tokenizer, reference: ReferenceProcessor, text: str) -> set[int]:
    """The reference's id of unknown characters, where single characters of the text give it."""
    unk = set(reference.ids(_UNKNOWN_CHARACTER)[-1:])
    found: set[int] = set()
    for character in set(text):
        with suppress(PromptError):
            found.update(tokenizer.encode_pieces((Piece("text", character),)))
    return found & unk


def _stop_faults(
    artifact: Artifact, checkpoint: Checkpoint, reference: ReferenceProcessor, tokenizer: Tokenizer
) -> list[str]:
    """Every id that the checkpoint or its family calls an end must be there, and no other."""
    stated = {
        *_ids(checkpoint.generation_config().get("eos_token_id")),
        *_ids(checkpoint.config.get("eos_token_id")),
        *_ids((checkpoint.config.get("text_config") or {}).get("eos_token_id")),
        *reference.eos_ids,
    }
    family = detect_family(checkpoint.config, checkpoint.source_id)
    named = {
        number
        for text in stop_tokens(family)
        if text in reference.control_tokens
        for number in reference.ids(text)[-1:]
    }
    have = set(artifact.manifest.tokens.stop)
    faults = [
        f"{each} ends answers of the reference and not ours" for each in sorted(stated - have)
    ]
    faults += [
        f"{each} ends answers here and is no end in the checkpoint or its family"
        for each in sorted(have - stated - named)
    ]
    return faults


def _ids(value: object) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    return [each for each in listed if isinstance(each, int)]
