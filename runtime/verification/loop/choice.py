"""Which token must be chosen, worked out step by step, and how sure that is.

Apart from ``sampling.py``, which is judged with it: no function is shared. Verification puts
transformers' processors in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.util.arrays import Array


@dataclass(frozen=True)
class Rule:
    """What decides beside the logits.

    Attributes:
        options: of the request.
        num_text_tokens: ids from here on are never sampled.
        places: ids that are never sampled.
    """

    options: GenerationConfig
    num_text_tokens: int
    places: tuple[int, ...] = ()


Choose = Callable[[Array, Rule, Sequence[int], float], int]
"""``choose(logits, rule, seen, quantile)``: the token, given the ids so far and a number in [0, 1)
in place of the random one."""


def choose_plainly(logits: Array, rule: Rule, seen: Sequence[int], quantile: float) -> int:
    """The token that must be chosen; see ``Choose``."""
    scores = _penalised(logits, rule, seen)
    if rule.options.is_greedy:
        return int(np.flatnonzero(scores == scores.max())[0])
    ids, weights = _distribution(scores, rule)
    place = int(np.count_nonzero(np.cumsum(weights) <= quantile))
    return int(ids[min(place, len(ids) - 1)])


def choice_margin(logits: Array, rule: Rule, seen: Sequence[int], quantile: float) -> float:
    """How far each logit may be off before another token may be chosen."""
    scores = _penalised(logits, rule, seen)
    options = rule.options
    if options.is_greedy:
        first, second = np.partition(scores, -2)[-2:][::-1] if scores.size > 1 else (0.0, -np.inf)
        return _half(first - second)
    ids, weights = _distribution(scores, rule)
    scaled = scores[ids] / options.temperature
    edges = np.cumsum(weights)
    place = min(int((edges <= quantile).sum()), len(ids) - 1)
    inner = edges[max(0, place - 1) : min(place + 1, len(ids) - 1)]
    # Of the cumulated probability: an error of the scaled scores moves it by half as much.
    rooms = [float(np.abs(inner - quantile).min(initial=np.inf))]
    rooms += [_half(step) for step in -np.diff(scaled[max(0, place - 1) : place + 2])]
    if options.top_k or options.top_p < 1:
        all_ids, all_weights = _distribution(scores, rule, cuts=False)
        ordered = scores[all_ids] / options.temperature
        if 0 < options.top_k < len(all_ids):
            rooms.append(_half(ordered[options.top_k - 1] - ordered[options.top_k]))
            all_weights = all_weights[: options.top_k] / all_weights[: options.top_k].sum()
        if options.top_p < 1:
            rooms.append(float(np.abs(np.cumsum(all_weights) - options.top_p).min()))
    return min(rooms) * options.temperature


def _half(step: float) -> float:
    # Equal values stay equal where their logits are the same number, and are told by their ids.
    return float(step) / 2 if step > 0 else np.inf


def _penalised(logits: Array, rule: Rule, seen: Sequence[int]) -> Array:
    scores = np.asarray(logits, np.float64).copy()
    penalty = rule.options.repetition_penalty
    for token in {int(each) for each in seen}:
        if token < scores.size:
            scores[token] *= penalty if scores[token] < 0 else 1 / penalty
    return scores


def _distribution(scores: Array, rule: Rule, *, cuts: bool = True) -> tuple[Array, Array]:
    """Ids by falling score, and their probabilities, after temperature, top-k and top-p."""
    options = rule.options
    words = np.arange(min(rule.num_text_tokens, scores.size))
    words = words[~np.isin(words, rule.places) & (scores[words] > -np.inf)]
    ids = words[np.argsort(-scores[words], kind="stable")]
    values = scores[ids] / options.temperature
    if cuts and 0 < options.top_k < len(ids):
        # As many as reach the k-th value, equal ones included.
        ids = ids[: np.count_nonzero(values >= values[options.top_k - 1])]
        values = values[: len(ids)]
    weights = np.exp(values - values[0])
    weights /= weights.sum()
    if cuts and options.top_p < 1:
        kept = 1 + int(np.count_nonzero(np.cumsum(weights)[:-1] < options.top_p))
        ids, weights = ids[:kept], weights[:kept] / weights[:kept].sum()
    return ids, weights
