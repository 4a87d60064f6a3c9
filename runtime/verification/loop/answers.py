"""How answers end and how their text is streamed, with a scripted decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_edge.runtime.generation.deadline import TimeBudget
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.processing.request import Request
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.golden.loop import TextCase, drawn_logits
from llava_edge.runtime.verification.loop.bench import SENTENCE, Expected, LoopBench
from llava_edge.runtime.verification.loop.choice import Choose, Rule
from llava_edge.runtime.verification.loop.scripted_decoder import one_best

_LONG = 300
"""Tokens of an answer that is longer than what is usually left to the option."""
_SAMPLED = 12
"""Tokens of each sampled answer."""
_SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 11},
    {"temperature": 1.2, "top_k": 6, "seed": (1 << 40) + 12},
    {"temperature": 0.0, "repetition_penalty": 1.6},
)
_FAR = -1e4
"""A logit that is never drawn, and never the best by a penalty."""


def check_texts(bench: LoopBench, cases: Sequence[TextCase]) -> None:
    """Every case of the reference: text, pieces, tokens, and why the answer ends."""
    with bench.scripted():
        for case in cases:
            least = case.least

            def named(number: int, ids: tuple[int, ...] = case.ids) -> Array:
                return one_best(bench.table.vocab_size, ids[min(number, len(ids) - 1)])

            expected = Expected(
                case.ids[: case.count], case.finish_reason, case.text, least, logits=named
            )
            bench.ask(case.name, SENTENCE, expected, max_new_tokens=case.max_new_tokens)


def check_endings(bench: LoopBench) -> None:
    """The context's end, a deadline, and streams that are closed or fail."""
    words = bench.words
    base = bench.request(SENTENCE)
    script = (*words[::-1][:6], words[2], words[0])
    long = (words * (_LONG // len(words) + 1))[:_LONG]
    with bench.scripted():
        bench.ask("a long answer", SENTENCE, Expected(long, "length"), max_new_tokens=_LONG)
    with bench.scripted(capacity=base.num_tokens + 3):
        bench.ask("full context", SENTENCE, Expected(script[:4], "context"), max_new_tokens=8)
    with bench.scripted() as decoder:
        expected = Expected(script[:4], "deadline")
        options = GenerationConfig(max_new_tokens=8)
        budget = _Budget(lambda: decoder.length >= base.num_tokens + 3)
        bench.run("deadline", base, expected, lambda: bench.started(base, options, budget))
        whole = Expected(script, "length")
        bench.ask("after a deadline", SENTENCE, whole, max_new_tokens=len(script))
        _closed(bench, base, script)
        bench.ask("after a closed stream", SENTENCE, whole, max_new_tokens=len(script))
        decoder.fails_at = 4
        bench.prepare(base, whole)
        try:
            stream = bench.started(base, GenerationConfig(max_new_tokens=len(script)))
            for _ in stream:
                pass
            bench.faults.append("failing run: the stream goes on")
        except Exception:
            bench.refuses_answer("failing run", stream)
        decoder.fails_at = 0
        bench.ask("after a failing run", SENTENCE, whole, max_new_tokens=len(script))


def _closed(bench: LoopBench, base: Request, script: Sequence[int]) -> None:
    """A stream that is closed after its first pieces: no run after it, and no answer."""
    bench.prepare(base, Expected(tuple(script), "length"))
    stream = bench.started(base, GenerationConfig(max_new_tokens=len(script)))
    for _ in range(2):
        next(stream, None)
    runs = bench.decoder.runs
    stream.close()
    if next(stream, None) is not None or bench.decoder.runs != runs:
        bench.faults.append("closed stream: it goes on")
    bench.refuses_answer("closed stream", stream)


class _Budget(TimeBudget):
    """Over when it is told so."""

    def __init__(self, is_over: Any) -> None:
        super().__init__()
        self._is_over = is_over

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return bool(self._is_over())


def check_sampled_answers(bench: LoopBench, choose: Choose) -> None:
    """Whole answers with sampling options: with and without drafts, and from the best logits.

    The penalty counts prompt and answer, and one seed gives one answer however it is computed.
    """
    base = bench.request(SENTENCE)
    for number, options in enumerate(_SAMPLING):
        ids, rows = _sampled(bench, base, options, choose, number)
        expected = Expected(ids, "length", logits=[*rows, rows[-1]].__getitem__)
        name = f"sampled answer {number}"
        more = {**options, "max_new_tokens": len(ids)}
        with bench.scripted():
            bench.ask(name, SENTENCE, expected, **more)
            bench.ask(f"{name} again", SENTENCE, expected, **more)
        with bench.scripted(prefix_reuse=False):
            bench.ask(f"{name} with drafts", SENTENCE, expected, prompt_lookup_num_tokens=5, **more)
        with bench.scripted(picks_best=True):
            bench.ask(f"{name} of the best logits", SENTENCE, expected, **more)
        with bench.scripted():
            bench.count += 1
            bench.prepare(base, expected)
            whole = bench.model.generate(SENTENCE, raw=True, **more)
            if whole.token_ids != ids:
                bench.faults.append(f"{name} by generate(): tokens {whole.token_ids} for {ids}")


def _sampled(
    bench: LoopBench, base: Request, options: dict[str, Any], choose: Choose, number: int
) -> tuple[tuple[int, ...], list[Array]]:
    """The tokens that must be drawn, and the logits of each.

    Logits of the prompt's own words and of some others are drawn, so that drafts are made and
    penalties count; the rest is far below.
    """
    rule = Rule(GenerationConfig(**options), bench.tokens.num_text_tokens, bench.places)
    uniform = np.random.Generator(np.random.PCG64(options.get("seed", 0)))
    seen, rows, ids = base.ids.tolist(), [], []
    own = np.array([*bench.words, *bench.unsaid])
    for at in range(_SAMPLED):
        row = np.full(bench.table.vocab_size, _FAR, np.float32)
        row[own] = drawn_logits("spread", 900 + 100 * number + at, own.size)
        quantile = 0.0 if rule.options.is_greedy else float(uniform.random())
        ids.append(choose(row, rule, seen, quantile))
        seen.append(ids[-1])
        rows.append(row)
    return tuple(ids), rows


def check_answers(bench: LoopBench, texts: Sequence[TextCase], choose: Choose) -> None:
    """All of the above."""
    check_texts(bench, texts)
    check_endings(bench)
    check_sampled_answers(bench, choose)
