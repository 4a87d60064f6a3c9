"""AnswerOptions: how an answer is made; checked before any picture is opened."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from llava_edge.profiles.buffers import MAX_DRAFT_TOKENS
from llava_edge.runtime.arguments import (
    refuse_unknown,
    require_callable,
    require_count,
    settle,
)
from llava_edge.runtime.progress import ReportProgress, no_progress
from llava_edge.runtime.sampling import SamplingOptions


@dataclass(frozen=True)
class AnswerOptions:
    """Options of ``LlavaEdge.stream`` that concern the answer alone; see there.

    Raises:
        RequestError: one is out of range or of another type.
    """

    max_new_tokens: int = 256
    prompt_lookup_num_tokens: int = 0
    progress: ReportProgress = no_progress
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        drafts = require_count(
            "prompt_lookup_num_tokens", self.prompt_lookup_num_tokens, 0, MAX_DRAFT_TOKENS
        )
        settle(
            self,
            max_new_tokens=require_count("max_new_tokens", self.max_new_tokens, 1),
            prompt_lookup_num_tokens=drafts,
        )
        require_callable("progress", self.progress)

    @classmethod
    def of(cls, call: str, known: tuple[str, ...] = (), **options: Any) -> AnswerOptions:
        """Options by name, those of sampling among them.

        Args:
            call: whose options they are, for messages.
            known: other options that the call has, for messages.
            options: fields of this class and of ``SamplingOptions``.

        Raises:
            RequestError: as the class, or an option is unknown.
        """
        sampling = {each.name for each in fields(SamplingOptions)}
        own = {each.name for each in fields(cls)} - {"sampling"}
        unknown = {name: options[name] for name in options if name not in sampling | own}
        refuse_unknown(call, unknown, {*known, *sampling, *own})
        chosen = SamplingOptions(**{name: options.pop(name) for name in sampling & set(options)})
        return cls(sampling=chosen, **options)
