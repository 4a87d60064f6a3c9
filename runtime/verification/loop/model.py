"""The loop with the model itself: chunks, reuse, drafts and sampling against plain runs of it.

One run of the model with given tokens, in one chunk and token by token, is the measure: other
stages compare exactly that with the reference. Every other path must come to the same keys, values
and logits, within what kernels for other numbers of positions round otherwise; and tokens that the
model chose itself must follow from those logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llava_edge.runtime.artifact.certificate import StageResult, bounded, exact
from llava_edge.runtime.generation.deadline import TimeBudget
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.generation.output import Answer
from llava_edge.runtime.processing.degradation import Degradation
from llava_edge.runtime.processing.request import PromptOptions, Request
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.loaded_model import LoadedModel
from llava_edge.runtime.verification.loop.bench import SENTENCE
from llava_edge.runtime.verification.loop.choice import Choose, Rule, choice_margin
from llava_edge.runtime.verification.loop.forced_decoder import ForcedDecoder
from llava_edge.runtime.verification.tolerances import GAP, Bounds

STAGE = "loop"
CACHE_GAP = "cache_gap_of_range"
_CHUNK = 5
_LEAST = 8
"""So many of the tokens that the model chose must be farther from every edge than noise."""
_NOISE = {"cpu": 1e-10, "cuda": 1e-4}
"""Of the range of logits: how far two equal runs may differ. On a CPU they are the same, and what
follows is float64: a penalty of two, and none, change no digit of a logit."""
_SAMPLING: tuple[tuple[dict[str, Any], int], ...] = (
    ({"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 2.0, "seed": 7}, 8),
    ({"temperature": 1.1, "top_k": 4, "seed": 8}, 5),
    ({"repetition_penalty": 2.0}, 4),
    ({}, 5),
)
"""Options, and how many tokens. Of the second and the last the best logits are enough."""


@dataclass
class LoopOnModel:
    """What the paths of one model came to.

    Attributes:
        logits: largest gap over the range of the logits, and where.
        cache: largest gap of keys and values of the first layer over their range, and where.
        faults: what differs in kind.
        choices: tokens that the model chose.
        sure: how many of them are far from every edge.
        left_out: why nothing was run; empty where it was.
    """

    logits: tuple[float, str] = (0.0, "")
    cache: tuple[float, str] = (0.0, "")
    faults: list[str] = field(default_factory=list)
    choices: int = 0
    sure: int = 0
    left_out: str = ""

    def rows(self, bounds: Bounds) -> list[StageResult]:
        """As rows of a certificate."""
        if self.left_out:
            return [
                StageResult(
                    STAGE, "differing_choices", None, 0.0, "inconclusive", "export", self.left_out
                )
            ]
        looked = f"{self.choices} tokens chosen by the model, {self.sure} clear of every edge"
        chosen = exact(STAGE, "differing_choices", self.faults, looked)
        if chosen.verdict == "pass" and self.sure < _LEAST:
            detail = f"{looked}; needed are {_LEAST}"
            chosen = replace(chosen, verdict="inconclusive", detail=detail)
        return [
            chosen,
            bounded(STAGE, GAP, self.logits[0], bounds.path_gap(), detail=self.logits[1]),
            bounded(
                STAGE,
                CACHE_GAP,
                self.cache[0],
                bounds.value(STAGE, CACHE_GAP),
                detail=self.cache[1],
            ),
        ]


def check_loop_on_model(model: LoadedModel, choose: Choose) -> LoopOnModel:
    """Run the paths; needs a prompt of some forty tokens and a dozen for answers.

    Args:
        model: loaded; its answers, cache and options are as before afterwards.
        choose: how tokens follow from logits.
    """
    found = LoopOnModel()
    paths = _Paths(model, found)
    needed = paths.base.num_tokens + len(paths.script) + 1
    if needed > model.context_tokens:
        found.left_out = f"{needed} tokens of context are needed, loaded are {model.context_tokens}"
        return found
    try:
        paths.compare()
        for options, count in _SAMPLING:
            paths.recompute(options, count, choose)
    except Exception as error:
        found.faults.append(f"{type(error).__name__}: {error}"[:300])
    return found


class _Paths:
    def __init__(self, model: LoadedModel, found: LoopOnModel) -> None:
        self.model, self.found = model, found
        tokens = model.artifact.manifest.tokens
        self.places = tuple(i for i in (tokens.image, tokens.video) if i is not None)
        self.base = model._requests.build(SENTENCE, (), PromptOptions(raw=True))
        ids = [int(i) for i in self.base.ids if int(i) not in model._tokenizer.control_ids]
        # A draft that holds, one that fails in its middle, and text that stands nowhere.
        self.script = (*ids[:7], ids[0], *ids[8:2:-3])

    def compare(self) -> None:
        """Small chunks without reuse; then what is left of another request, with drafts."""
        plain = _Plain(self.model, self.base, self.script)
        ids, half = self.base.ids, self.base.num_tokens // 2
        other = replace(self.base, ids=np.concatenate((ids[:half], ids[1:half])))
        with self._chunks_of(_CHUNK):
            decoder = self._forced(self.base, self.script)
            self._answer(self.base, len(self.script), decoder, "small chunks")
            plain.compare(decoder, self.found, "small chunks")
        first = self._forced(other, self.script[:2])
        reusing = self._over(first, prefix_reuse=True)
        self._answer(other, 2, first, "another request", reusing)
        decoder = self._forced(self.base, self.script)
        reusing._decoder = decoder
        answer = self._answer(self.base, len(self.script), decoder, "reuse and drafts", reusing, 4)
        plain.compare(decoder, self.found, "reuse and drafts")
        if answer is None:
            return
        if answer.reused_tokens != half:
            self.found.faults.append(f"{answer.reused_tokens} positions were reused, not {half}")
        drafts = self.model._decoder.drafts
        if drafts and (not decoder.accepted or not decoder.rejected):
            self.found.faults.append(
                f"{decoder.accepted} drafted tokens held, {decoder.rejected} drafts failed; both "
                "must occur"
            )

    def recompute(self, options: dict[str, Any], count: int, choose: Choose) -> None:
        """Tokens that the model chooses, by the logits that follow them."""
        model = self.model
        chosen = GenerationConfig.merged(None, max_new_tokens=count, **options)
        with self._answering(model._engine.over(model._decoder, prefix_reuse=False, stops=False)):
            answer = self._asked(self.base, chosen)
        rows: list[Array] = []
        model.replay(
            SENTENCE,
            (),
            answer.token_ids[:-1],
            lambda _, row: rows.append(row.copy()),
            PromptOptions(raw=True),
        )
        tokens = model.artifact.manifest.tokens
        rule = Rule(chosen, tokens.num_text_tokens, self.places)
        uniform = np.random.Generator(np.random.PCG64(options.get("seed", 0)))
        seen = self.base.ids.tolist()
        noise = _NOISE["cpu" if model.device == "cpu" else "cuda"]
        for place, (token, row) in enumerate(zip(answer.token_ids, rows, strict=True)):
            quantile = 0.0 if rule.options.is_greedy else float(uniform.random())
            self.found.choices += 1
            if choice_margin(row, rule, seen, quantile) > noise * float(np.ptp(row)):
                self.found.sure += 1
                wanted = choose(row, rule, seen, quantile)
                if token != wanted:
                    self.found.faults.append(
                        f"token {place} is {token}; its logits and {_told(options)} give {wanted}"
                    )
                    return
            seen.append(token)

    def _forced(self, request: Request, ids: Sequence[int]) -> ForcedDecoder:
        vocab = self.model._table.vocab_size
        return ForcedDecoder(self.model._decoder, vocab, request.num_tokens, ids)

    def _over(self, decoder: Any, *, prefix_reuse: bool) -> Any:
        self.model._decoder.rewind(0)
        return self.model._engine.over(decoder, prefix_reuse=prefix_reuse, stops=False)

    def _answer(
        self,
        request: Request,
        count: int,
        decoder: ForcedDecoder,
        name: str,
        engine: Any = None,
        lookup: int = 0,
    ) -> Answer:
        options = GenerationConfig(max_new_tokens=count, prompt_lookup_num_tokens=lookup)
        with self._answering(engine or self._over(decoder, prefix_reuse=False)):
            answer = self._asked(request, options)
        if answer.token_ids != decoder._ids:
            self.found.faults.append(f"{name}: tokens {answer.token_ids}, not {decoder._ids}")
        return answer

    def _asked(self, request: Request, options: GenerationConfig) -> Answer:
        with self.model._start(Degradation(lambda: request), options, TimeBudget()) as stream:
            for _ in stream:
                pass
            return stream.answer

    @contextmanager
    def _answering(self, engine: Any) -> Iterator[None]:
        real, self.model._engine = self.model._engine, engine
        try:
            yield
        finally:
            self.model._engine = real
            real.forget()

    @contextmanager
    def _chunks_of(self, count: int) -> Iterator[None]:
        decoder = self.model._decoder
        size, decoder.chunk_tokens = decoder.chunk_tokens, count
        try:
            yield
        finally:
            decoder.chunk_tokens = size


class _Plain:
    """Logits, keys and values of one chunk and single steps."""

    def __init__(self, model: LoadedModel, request: Request, ids: Sequence[int]) -> None:
        self._num_prompt = request.num_tokens
        rows: list[Array] = []
        model.replay(
            SENTENCE,
            (),
            ids[:-1],
            lambda _, row: rows.append(row.copy()),
            PromptOptions(raw=True),
        )
        self._logits = rows
        self._cache = _first_layer(model._decoder.cache)
        # Codes of an int8 cache: a value at the edge of two may become either.
        self._step = 1.0 if model.cache == "int8" else 0.0

    def compare(self, decoder: ForcedDecoder, found: LoopOnModel, name: str) -> None:
        """Note the largest gaps."""
        for place, wanted in enumerate(self._logits):
            ours = decoder.logits.get(place)
            if ours is None:
                found.faults.append(f"{name}: no logits came before token {place}")
                continue
            gap = float(np.abs(ours - wanted).max()) / max(float(np.ptp(wanted)), 1e-30)
            found.logits = _worse(found.logits, gap, f"{name}, before token {place}")
        for part, wanted in self._cache.items():
            held = _first_layer(decoder.cache)[part]
            if held.shape != wanted.shape:
                found.faults.append(
                    f"{name}: the cache has {held.shape[1]} positions, not {wanted.shape[1]}"
                )
                return
            # NaN stays NaN.
            gaps = np.maximum(np.abs(held - wanted).max(axis=(0, 2)) - self._step, 0.0)
            gaps /= max(float(np.ptp(wanted)), 1e-30)
            at = int(gaps.argmax())
            found.cache = _worse(found.cache, float(gaps[at]), f"{name}, {part} of position {at}")


def _first_layer(cache: Any) -> dict[str, Array]:
    """Keys and values float32 [kv_heads, positions, head_dim], which no other position changes."""
    return {part: cache.part(0, part).astype(np.float32) for part in ("key", "value")}


def _worse(before: tuple[float, str], gap: float, where: str) -> tuple[float, str]:
    # What is no number is the worst.
    return before if gap <= before[0] or before[0] != before[0] else (gap, where)


def _told(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())
