"""Prompts of the bench are those of transformers, from a process with bounds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from llava_edge.bench.lab.chat_prompt import chat_prompts

PAGES = Path(__file__).parents[3] / "bench" / "lab" / "pages" / "llava-next-pages"


def test_they_are_what_transformers_writes() -> None:
    loader: Any = transformers.LlavaNextProcessor
    processor = loader.from_pretrained(PAGES)
    questions = ["Which line is SKY on?", " with blanks \n"]
    expected = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for text in questions
    ]
    assert chat_prompts(processor, questions) == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('never') }}", "TemplateError: never"),
        ("{{ 'a' * 9000000000 }}", "status 81"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_writes_nothing_is_an_error(template: str, words: str) -> None:
    tokenizer = SimpleNamespace(special_tokens_map={})
    processor = SimpleNamespace(chat_template=template, tokenizer=tokenizer)
    with pytest.raises(RuntimeError, match=words):
        chat_prompts(processor, ["why?"])
