"""How the reference draws: transformers' own processors, and an inverse of the distribution.

transformers leaves the draw itself to torch. What a seed means is the runtime's own promise: tokens
by falling logit, equal ones by id, and the one where the cumulated probability passes the next
number of numpy's PCG64. Here it is written anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.golden.loop import DrawCase, LogitKind
from llava_edge.runtime.verification.loop.choice import Rule, choice_margin

_EDGE = 1e-5
"""Of the cumulated probability and of logits: where less decides, nothing is compared."""
_MOST_QUANTILES = 16
_TOKENS = 12
_MOST_SEEDS = 1000
_NO_IDS = torch.empty(1, 0, dtype=torch.int64)


def choose_by_reference(logits: Array, rule: Rule, seen: Sequence[int], quantile: float) -> int:
    """The token that the reference's processors lead to; see ``loop_choice.Choose``."""
    scores = reference_scores(logits, rule, seen)
    if rule.options.is_greedy:
        return int(np.flatnonzero(scores == scores.max())[0])
    ids, edges = _edges(scores)
    return int(ids[min(int((edges <= quantile).sum()), len(ids) - 1)])


def reference_scores(logits: Array, rule: Rule, seen: Sequence[int]) -> Array:
    """Scores float64 (vocab,) after all processors that the options name; -inf where cut."""
    options = rule.options
    scores = torch.from_numpy(np.asarray(logits, np.float64).copy())[None]
    if options.repetition_penalty != 1.0 and len(seen):
        ids = torch.tensor([list(seen)], dtype=torch.int64)
        scores = RepetitionPenaltyLogitsProcessor(options.repetition_penalty)(ids, scores)
    if not options.is_greedy:
        blocked = [each for each in rule.places if each < scores.shape[-1]]
        scores[:, blocked] = -torch.inf
        scores[:, rule.num_text_tokens :] = -torch.inf
        scores = TemperatureLogitsWarper(options.temperature)(_NO_IDS, scores)
        if options.top_k:
            scores = TopKLogitsWarper(options.top_k)(_NO_IDS, scores)
        if options.top_p < 1:
            return _lowest_of_equal(scores, TopPLogitsWarper(options.top_p)(_NO_IDS, scores))
    found: Array = scores[0].numpy()
    return found


def _lowest_of_equal(before: Any, after: Any) -> Array:
    """What top-p kept, of equal scores those with the lowest ids.

    Which of equal ones it cuts is up to the order in which torch sorts them; how many is not.
    """
    scores, found = before[0].numpy(), after[0].numpy().copy()
    least = found[found > -np.inf].min()
    equal = np.flatnonzero(scores == least)
    count = np.count_nonzero(found[equal] > -np.inf)
    found[equal[count:]], found[equal[:count]] = -np.inf, least
    kept: Array = found
    return kept


def _edges(scores: Array) -> tuple[Array, Array]:
    """Ids by falling score, equal ones by id, and the cumulated probability up to each."""
    kept = np.flatnonzero(scores > -np.inf)
    order = kept[np.argsort(-scores[kept], kind="stable")]
    weights = np.exp(scores[order] - scores[order[0]])
    return order, np.cumsum(weights / weights.sum())


@cache
def draw_cases() -> tuple[DrawCase, ...]:
    """The cases that travel in every artifact, with what the reference draws."""
    return tuple(_drawn(case) for case in _CASES)


def _drawn(case: DrawCase) -> DrawCase:
    rule = Rule(case.options, case.num_text_tokens, case.places)
    row = case.row(0)
    quantiles = [
        each
        for each in _quantiles(reference_scores(row, rule, case.prompt), rule)
        if choice_margin(row, rule, case.prompt, each) > _EDGE / 4
    ]
    ids = [choose_by_reference(row, rule, case.prompt, each) for each in quantiles]
    for seed in range(case.seed, case.seed + _MOST_SEEDS):
        taken = _with_seed(case, rule, seed)
        if taken is not None:
            return replace(
                case, seed=seed, ids=taken, quantiles=tuple(quantiles), quantile_ids=tuple(ids)
            )
    raise ValueError(f"no seed of the case {case.name!r} is clear of every edge")


def _quantiles(scores: Array, rule: Rule) -> list[float]:
    """Just inside both edges of the first tokens and of the last, and both ends."""
    if rule.options.is_greedy:
        return [0.0]
    edges = _edges(scores)[1]
    starts = np.concatenate(([0.0], edges[:-1]))
    chosen = [*range(min(len(edges), _MOST_QUANTILES // 2 - 2)), len(edges) - 1]
    found = [q for at in chosen for q in (starts[at] + _EDGE, edges[at] - _EDGE)]
    return sorted({0.0, 1 - 2**-53, *(float(q) for q in found if 0 <= q < 1)})


def _with_seed(case: DrawCase, rule: Rule, seed: int) -> tuple[int, ...] | None:
    """A token a row; None where one lies too near to an edge."""
    uniform = np.random.Generator(np.random.PCG64(seed))
    seen, ids = list(case.prompt), []
    for number in range(_TOKENS):
        row, quantile = case.row(number), float(uniform.random())
        if choice_margin(row, rule, seen, quantile) <= _EDGE / 4:
            return None
        ids.append(choose_by_reference(row, rule, seen, quantile))
        seen.append(ids[-1])
    return tuple(ids)


def _case(
    name: str,
    logits: LogitKind,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    penalty: float = 1.0,
    *,
    vocab: int = 64,
    words: int | None = None,
    places: tuple[int, ...] = (),
    prompt: tuple[int, ...] = (),
    seed: int = 0,
) -> DrawCase:
    return DrawCase(
        name=name,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=penalty,
        seed=seed,
        logits=logits,
        # Far apart, so that no two cases see the same rows.
        logits_seed=1000 * sum(map(ord, name)),
        vocab_size=vocab,
        num_text_tokens=vocab if words is None else words,
        places=places,
        prompt=prompt,
    )


_PROMPT = tuple(range(0, 64, 2))
"""Every other id has occurred: the penalty moves as many high logits as low ones."""

_CASES = (
    _case("temperature", "spread", 0.7),
    _case("temperature, another seed", "spread", 0.7, seed=5000),
    _case("high temperature", "spread", 100.0),
    _case("low temperature", "spread", 0.05),
    _case("top-k", "spread", 1.7, 5),
    _case("top-k beyond the vocabulary", "spread", 1.5, 74),
    _case("top-k with ties", "tied", 1.0, 3),
    _case("top-k of equal logits", "equal", 1.0, 4),
    _case("top-k of a long vocabulary", "peaked", 1.0, 50, vocab=500),
    _case("top-p", "spread", 2.0, 0, 0.9),
    _case("top-p of less than one token", "spread", 3.0, 0, 1e-6),
    _case("top-p with temperature", "peaked", 0.6, 0, 0.7),
    _case("top-p with ties", "tied", 1.0, 0, 0.6),
    _case("top-p of equal logits", "equal", 1.0, 0, 0.51),
    _case("top-k and top-p", "spread", 2.5, 8, 0.8),
    _case("top-k and top-p of a long vocabulary", "peaked", 0.9, 40, 0.95, vocab=500),
    _case("penalty", "spread", 2.0, penalty=1.3, prompt=_PROMPT),
    _case("penalty below one", "spread", 2.0, penalty=0.7, prompt=_PROMPT),
    _case("penalty on what is generated", "spread", 3.0, 6, penalty=1.8),
    _case("penalty and ids beyond the vocabulary", "tied", 1.0, penalty=1.5, prompt=(1, 64, 900)),
    _case("penalty, top-k and top-p", "spread", 2.4, 20, 0.85, 1.2, prompt=_PROMPT),
    _case("logits at minus infinity", "holes", 2.0, 60, 0.99, 1.4, prompt=_PROMPT),
    _case("padding and places", "spread", 9.0, words=50, places=(3, 20, 49)),
    _case("padding and places with top-k", "spread", 4.0, 7, words=50, places=(3, 20, 60)),
    _case("greedy", "spread", 0.0),
    _case("greedy with ties", "tied", 0.0),
    _case("greedy with ties of a long vocabulary", "tied", 0.0, vocab=500),
    _case("greedy with a penalty", "spread", 0.0, penalty=1.3, prompt=_PROMPT),
    _case(
        "greedy with a penalty and a long vocabulary",
        *("peaked", 0.0),
        penalty=1.3,
        vocab=500,
        prompt=tuple(range(0, 500, 4)),
    ),
    _case("greedy with a penalty on what is generated", "tied", 0.0, penalty=1.9),
    _case("greedy with padding", "spread", 0.0, words=20, places=(3,)),
    _case("top-k of one", "spread", 1.0, 1, penalty=1.4, prompt=_PROMPT),
)
