"""Prompts of a checkpoint's own chat template, rendered in the converter's bounded process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_SECONDS = 300


def chat_prompts(processor: Any, questions: Sequence[str]) -> list[str]:
    """Questions about one picture each, as the template writes them.

    Args:
        processor: transformers' own, with its template and special tokens.
        questions: texts.

    Raises:
        RuntimeError: the template refuses a question, or leaves its bounds.
    """
    conversations = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
            ],
            "add_generation_prompt": True,
        }
        for text in questions
    ]
    request = {
        "template": processor.chat_template,
        "variables": processor.tokenizer.special_tokens_map,
        "environment": "own",
        "conversations": conversations,
    }
    done = subprocess.run(
        [sys.executable, "-m", "llava_edge.convert.text.template_sandbox"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"rendering the chat template ended with status {done.returncode}")
    answer = json.loads(done.stdout)
    texts = [each.get("text") for each in answer.get("answers", [])]
    if len(texts) != len(questions) or None in texts:
        raise RuntimeError(f"the chat template wrote no prompt: {answer!s:.300}")
    return texts
