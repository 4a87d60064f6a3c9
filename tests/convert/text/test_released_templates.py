"""Templates in the forms that are in use compile into segments that write the same text."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from llava_edge.convert.text.chat_template import CLOCKS, compile_template
from llava_edge.convert.text.template_checks import check_conversations
from llava_edge.runtime.processing.text.chat_prompt import (
    MARKS,
    Media,
    Message,
    Text,
    compose,
    rendered,
)
from tests.convert.text.released_templates import ALL, VARIANTS, Released
from tests.support.tiers import slow_but

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


def chat(messages: Sequence[Message], released: Released) -> list[dict[str, Any]]:
    """What a user of transformers hands to the template."""
    found: list[dict[str, Any]] = []
    for m in messages:
        content: Any = [
            {"type": "text", "text": p.text} if isinstance(p, Text) else {"type": p.kind}
            for p in m.parts
        ]
        if released.strings or (released.system_string and m.role == "system"):
            media = "".join(MARKS[p.kind] + "\n" for p in m.parts if isinstance(p, Media))
            content = media + "".join(p.text for p in m.parts if isinstance(p, Text))
        found.append({"role": m.role, "content": content})
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=Backend(models.BPE()), **VARIABLES)


def reference(tokenizer: Any, released: Released, messages: Sequence[Message]) -> str:
    return str(
        tokenizer.apply_chat_template(
            chat(messages, released),
            chat_template=released.source,
            tokenize=False,
            add_generation_prompt=True,
        )
    )


def set_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> datetime:
    """Sets the clock of transformers' templates."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls.fromtimestamp(seconds, UTC)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return datetime.fromtimestamp(seconds, UTC)


@pytest.mark.parametrize("name", slow_but(VARIANTS, ALL))
def test_a_released_template_compiles_to_what_transformers_writes(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = ALL[name]
    compiled = compile_template(released.source, VARIABLES, "vicuna", video=released.video)
    assert (compiled.system is not None) == released.system
    for clock in (CLOCKS[1], CLOCKS[1] + 86_400 * 200 + 3_700):
        now = set_clock(monkeypatch, clock)
        for conversation in check_conversations(
            system=released.system, placed=not released.strings, video=released.video
        ):
            ours = rendered(compose(compiled, conversation.messages, image_marks=False, now=now))
            theirs = reference(tokenizer, released, conversation.messages)
            assert ours == theirs, conversation.name
        if not compiled.dates:
            break
    assert bool(compiled.dates) == (
        "strftime_now(" in released.source and "false" not in released.source
    )


def test_all_nine_variants_are_there() -> None:
    assert len(VARIANTS) == 9
    assert len(ALL) >= 25
