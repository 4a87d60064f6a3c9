"""How the sampler draws, against cases whose results are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from llava_edge.profiles.errors import EngineError
from llava_edge.profiles.memory.buffers import BEST_TOKENS
from llava_edge.runtime.generation.decoder.sampling import Sampler
from llava_edge.runtime.generation.decoder.topk_logits import TopkLogits
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.golden.loop import DrawCase, drawn_logits

_UNSEEDED = 24
"""Tokens that two samplers without a seed draw from 4,096 equal logits; never the same ones."""


def draw_faults(cases: Sequence[DrawCase]) -> list[str]:
    """What the sampler draws otherwise than a case says.

    Each case is drawn at its quantiles, which measures the distribution itself, then with its seed
    over several tokens, and where the best logits decide from those alone as well.
    """
    found: list[str] = []
    checks = [(case.name, _case_faults(case)) for case in cases]
    checks += [("no seed", _seed_faults()), ("no numbers", _overflow_faults())]
    for name, check in checks:
        try:
            found += check
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}: {error}"[:300])
    return found


def _case_faults(case: DrawCase) -> Iterable[str]:
    row = case.row(0).copy()
    for quantile, wanted in zip(case.quantiles, case.quantile_ids, strict=True):
        token = _sampler(case, iter((quantile,)).__next__).choose(row)
        if token != wanted:
            yield f"{case.name}: {token} for {wanted} at {quantile:.6f}"
            return
    if not np.array_equal(row, case.row(0)):
        yield f"{case.name}: the logits were changed"
    sampler = _sampler(case)
    few = _sampler(case) if sampler.needs_few and case.vocab_size > BEST_TOKENS else None
    for number, wanted in enumerate(case.ids):
        row = case.row(number)
        token = sampler.choose(row)
        if token != wanted:
            yield f"{case.name}: {token} for {wanted} as token {number} with the seed {case.seed}"
            return
        if few is not None and (token := few.choose(_best(row))) != wanted:
            yield f"{case.name}: {token} for {wanted} as token {number} of the best logits"
            return


def _sampler(case: DrawCase, uniform: Callable[[], float] | None = None) -> Sampler:
    return Sampler(
        case.options,
        case.vocab_size,
        case.num_text_tokens,
        np.array(case.prompt, np.int64),
        case.places,
        uniform=uniform,
    )


def _best(row: Array) -> TopkLogits:
    """The best of a row as a graph may give them: of equal ones the highest id first."""
    order = np.lexsort((-np.arange(row.size), -row))[:BEST_TOKENS]
    return TopkLogits(row[order], order.astype(np.int64), row.copy)


def _seed_faults() -> Iterable[str]:
    """Without a seed two answers differ."""
    row = drawn_logits("equal", 0, 4096)
    found = []
    for _ in range(2):
        sampler = Sampler(GenerationConfig(temperature=1.0), row.size, row.size)
        found.append([sampler.choose(row) for _ in range(_UNSEEDED)])
    if found[0] == found[1]:
        yield "two samplers without a seed draw the same tokens"


def _overflow_faults() -> Iterable[str]:
    """Logits that are no numbers are an error and no token."""
    for value in (math.nan, math.inf):
        for temperature in (0.0, 1.0):
            row = drawn_logits("spread", 1, 64).copy()
            row[5] = value
            try:
                token = Sampler(
                    GenerationConfig(temperature=temperature), row.size, row.size
                ).choose(row)
            except EngineError:
                continue
            yield f"token {token} was drawn from logits that hold {value}"
