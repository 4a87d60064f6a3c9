"""Telling a finished prompt, copied from a model's card, from a question."""

from __future__ import annotations

import logging
import re

from llava_edge.runtime.artifact.manifest import PromptFormat

_LOG = logging.getLogger(__name__)

_KNOWN = (
    ("[INST]", "[/INST]"),
    ("USER:", "ASSISTANT:"),
    ("### Human:", "### Assistant:"),
    ("<|im_start|>user", "<|im_start|>assistant"),
    ("<|im_start|>user", "<|im_end|>"),
    ("<|start_header_id|>user<|end_header_id|>", "<|start_header_id|>assistant<|end_header_id|>"),
    ("<|start_header_id|>user<|end_header_id|>", "<|eot_id|>"),
    ("<|user|>", "<|assistant|>"),
)
"""How prompts of common formats open a user's turn and end."""

_PRECEDING = ("\n", ">", ".", "!", "。")
"""What may stand in front of a turn: nothing, a line, a token or a sentence of the system. Inside
a sentence it is a mention."""

_SHORTEST = 4
"""Shorter openings and ends of a template may stand in any question."""


def warn_if_finished(prompt_format: PromptFormat, text: str) -> None:
    """Log a warning if a user's text opens a user's turn and ends as a chat template writes it.

    Args:
        prompt_format: of the artifact.
        text: given as a question, to which the template will be applied.
    """
    found = finished_marks(prompt_format, text)
    if found is None:
        return
    opening, end = found
    _LOG.warning(
        "the prompt looks finished: it has %r and ends with %r, as a chat template writes them. "
        "The artifact's template is applied to it all the same, so the model reads both. If the "
        "prompt is complete, give it with raw=True (--raw); otherwise give the question alone.",
        opening,
        end,
    )


def finished_marks(prompt_format: PromptFormat, text: str) -> tuple[str, str] | None:
    """Opening and end of a prompt format that a text has; None where it looks like a question.

    A mention of a format inside a question is none: the text must end as a prompt does.
    """
    own = (
        prompt_format.user.before.strip(),
        (prompt_format.user.after + prompt_format.generation_prompt).strip(),
    )
    written = text.rstrip()
    for opening, end in (own, *_KNOWN):
        if min(len(opening), len(end)) < _SHORTEST or not written.endswith(end):
            continue
        for found in re.finditer(re.escape(opening), written[: -len(end)]):
            before = written[: found.start()].rstrip(" \t")
            if not before or before.endswith(_PRECEDING):
                return opening, end
    return None
