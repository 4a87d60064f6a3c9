"""GenerationConfig: how an answer is made. The one source of these options.

``LlavaEdge.generate``, ``LlavaEdge.stream``, ``Chat.send`` and ``Chat.stream`` take a config and
each of its fields as a keyword; the flags of ``llava-edge run`` are made from the fields as well.
Names and meanings are those of transformers' ``GenerationConfig`` 5.23.0, except ``temperature`` 0,
which means ``do_sample=False``, and ``seed``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.memory.buffers import MAX_DRAFT_TOKENS
from llava_edge.runtime.util.validation import NamedOptions, require_count, require_number, settle

MAX_PENALTY = 1000.0
"""Beyond it float32 logits overflow; a penalty of 2 is strong already."""


def _option(default: Any, text: str, metavar: str = "N", flag: str = "") -> Any:
    """A field with what its flag needs; ``flag`` is a second, shorter name."""
    return field(default=default, metadata={"help": text, "metavar": metavar, "flag": flag})


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(NamedOptions):
    """How tokens are chosen and how many; the defaults are greedy.

    The order of operations is transformers': repetition penalty, temperature, top-k, top-p.

    Attributes:
        max_new_tokens: the answer ends after this many tokens, the stop token included.
        temperature: 0 takes the largest logit; larger values flatten the distribution.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p; 1 keeps all.
        repetition_penalty: divides positive logits (multiplies negative ones) of tokens that
            occur in prompt or answer; 1 changes nothing.
        seed: makes sampling repeatable; None draws one.
        prompt_lookup_num_tokens: draft at most this many tokens from prompt and answer, and check
            them in one run; 0 is plain decoding. Answers that quote the prompt come faster. Tokens
            are chosen from the model's own logits either way, whose last bits differ between a run
            of one position and of several: where two tokens are equally good, another may come.

    Raises:
        RequestError: a value is out of range or of another type.
        UnknownOptionError: an option is unknown; names the nearest.
    """

    max_new_tokens: int = _option(256, "tokens of the answer at most")
    temperature: float = _option(0.0, "0 is greedy", "T")
    top_k: int = _option(0, "sample from the N most likely tokens; 0: from all")
    top_p: float = _option(
        1.0, "sample from the most likely tokens that together have this probability", "P"
    )
    repetition_penalty: float = _option(
        1.0, "above 1: tokens that occurred become less likely", "X"
    )
    seed: int | None = _option(None, "makes sampling repeatable")
    prompt_lookup_num_tokens: int = _option(
        0,
        "draft up to N tokens from prompt and answer, faster where it quotes; 0: off",
        flag="--prompt-lookup",
    )

    def __post_init__(self) -> None:
        drafts = self.prompt_lookup_num_tokens
        settle(
            self,
            max_new_tokens=require_count("max_new_tokens", self.max_new_tokens, 1),
            top_k=require_count("top_k", self.top_k, 0),
            prompt_lookup_num_tokens=require_count(
                "prompt_lookup_num_tokens", drafts, 0, MAX_DRAFT_TOKENS
            ),
        )
        for name in ("temperature", "top_p", "repetition_penalty"):
            settle(self, **{name: require_number(name, getattr(self, name))})
        if self.seed is not None:
            settle(self, seed=require_count("seed", self.seed, 0))
        faults = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            faults.append(f"temperature {self.temperature} must be 0 (greedy) or larger")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p {self.top_p} must lie in (0, 1]")
        if not 1 / MAX_PENALTY <= self.repetition_penalty <= MAX_PENALTY:
            faults.append(
                f"repetition_penalty {self.repetition_penalty} must lie between "
                f"{1 / MAX_PENALTY} and {MAX_PENALTY}"
            )
        if faults:
            raise RequestError("sampling options cannot be used: " + "; ".join(faults))

    @classmethod
    def merged(cls, config: GenerationConfig | None, **keywords: Any) -> GenerationConfig:
        """A config with the keywords that are not None in place of its own values.

        Args:
            config: None for the defaults.
            keywords: fields.

        Raises:
            RequestError: the config is of another type, or a value is out of range.
        """
        if config is not None and not isinstance(config, cls):
            raise RequestError(
                f"generation_config is a {type(config).__name__}; it must be a GenerationConfig"
            )
        given = {name: value for name, value in keywords.items() if value is not None}
        return replace(config or cls(), **given)

    @property
    def is_greedy(self) -> bool:
        """Whether the answer does not depend on a seed."""
        return self.temperature == 0.0 or self.top_k == 1


OPTION_NAMES = tuple(each.name for each in fields(GenerationConfig))
"""Names of the fields, for messages about unknown options."""
